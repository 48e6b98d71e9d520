"""Times our training step beside PyTorch's, in turn, on this machine's CPU; and its peak memory.

    uv run python benchmarks/step_time.py [5m | 10m | 180m] [NANOGPT]

Needs torch and transformers (the `parity` group); NANOGPT is a checkout of nanoGPT, whose model.py
is then a peer too. Each turn is a process of its own; what counts is the ratio of the medians, turn
by turn, since a shared machine drifts.
"""

import json
import resource
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from jaxlm.huge_pages import use_huge_pages

# Layers, heads, width, MLP, time, batch, vocabulary; steps to time.
SHAPES = {
    "5m": (4, 4, 256, 704, 256, 8, 4096, 20),
    "10m": (6, 6, 384, 1024, 256, 16, 512, 6),
    "180m": (20, 6, 768, 2048, 1024, 2, 49152, 2),
}
SHAPE = sys.argv[1] if len(sys.argv) > 1 else "10m"
NANOGPT = sys.argv[2] if len(sys.argv) > 2 else ""
LAYERS, HEADS, WIDTH, FF, SEQ_LEN, BATCH, VOCAB, STEPS = SHAPES[SHAPE]
WARMUP, TURNS = 2, 3


def ours() -> Callable[[], None]:
    """One step of jaxlm: Llama-shaped, 10.7 M parameters, float32."""
    import jax

    from jaxlm.config import MeshConfig, ModelConfig, OptimConfig
    from jaxlm.device.loss import next_token_loss
    from jaxlm.device.model import model_factory
    from jaxlm.device.optim import make_optimizer, make_schedule
    from jaxlm.device.sharding import make_mesh, put_batch
    from jaxlm.device.state import make_blueprint
    from jaxlm.device.step import make_train_step, scheduled

    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=LAYERS,
        d_model=WIDTH,
        d_ff=FF,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=WIDTH // HEADS,
        tie_embeddings=True,
    )
    mesh, optim = make_mesh(MeshConfig()), OptimConfig(name="adamw")
    schedule = make_schedule(optim, 1000)
    blueprint = make_blueprint(model_factory(config, "cpu"), partial(make_optimizer, optim), mesh)
    step = scheduled(make_train_step(blueprint, next_token_loss(), mesh), schedule, mesh)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ_LEN + 1)).astype(np.int32)
    batch = put_batch(
        lambda rows: {"inputs": tokens[rows, :-1], "targets": tokens[rows, 1:]}, mesh, BATCH
    )
    state = blueprint.make(0)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return run


def products() -> Callable[[], None]:
    """The matrix products of our step, and nothing else: attention by blocks of 64 queries."""
    import jax
    import jax.numpy as jnp

    block, heads = 64, (BATCH, HEADS)
    multiply = jax.jit(jnp.matmul)
    multiply_rows = jax.jit(lambda x, y: x.mT @ y)
    multiply_columns = jax.jit(lambda x, y: x @ y.mT)
    rng = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    sizes = [(WIDTH, WIDTH)] * 4 + [(WIDTH, FF)] * 2 + [(FF, WIDTH)]
    linear = [
        (random(BATCH * SEQ_LEN, n), random(n, m), random(BATCH * SEQ_LEN, m))
        for n, m in [*sizes * LAYERS, (WIDTH, VOCAB)]
    ]
    attention = [
        (
            random(*heads, block, WIDTH // HEADS),
            random(*heads, block, end),
            random(*heads, end, WIDTH // HEADS),
        )
        for end in range(block, SEQ_LEN + 1, block)
    ] * LAYERS

    def run() -> None:
        done = []
        for x, w, grad in linear:
            done += [multiply(x, w), multiply_columns(grad, w), multiply_rows(x, grad)]
        for q, weights, k in attention:
            # Scores and outputs; then the gradients of v, weights, k and q.
            done += [multiply_columns(q, k), multiply(weights, k), multiply_rows(weights, q)]
            done += [multiply_columns(q, k), multiply_rows(weights, q), multiply(weights, k)]
        jax.block_until_ready(done)

    return run


def torch_model(kind: str, compiled: bool = False) -> Callable[[], None]:
    """One step of transformers' GPT-2 or Llama in PyTorch, AdamW and clipping included."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=SEQ_LEN,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=FF,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=SEQ_LEN,
            tie_word_embeddings=True,
        )
        model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model = torch.compile(model) if compiled else model
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN))

    def run() -> None:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def nanogpt(compiled: bool = False) -> Callable[[], None]:
    """One step of nanoGPT, as its train.py does it: AdamW of its groups, clipping."""
    import torch  # pyright: ignore[reportMissingImports]

    names = runpy.run_path(f"{NANOGPT}/model.py")
    config = names["GPTConfig"](
        block_size=SEQ_LEN, vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH
    )
    model = names["GPT"](config)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    model = torch.compile(model) if compiled else model
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN + 1))

    def run() -> None:
        _, loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


PEERS = {
    "jaxlm": ours,
    "its products alone": products,
    "PyTorch eager GPT-2": lambda: torch_model("gpt2"),
    "PyTorch eager Llama": lambda: torch_model("llama"),
    "torch.compile GPT-2": lambda: torch_model("gpt2", compiled=True),
    "torch.compile Llama": lambda: torch_model("llama", compiled=True),
}
if NANOGPT:
    PEERS["PyTorch eager nanoGPT"] = nanogpt
    PEERS["torch.compile nanoGPT"] = lambda: nanogpt(compiled=True)


def time_steps(name: str) -> None:
    """Prints the step times of one peer (s) and its peak memory (GB) as JSON."""
    if name == "jaxlm":
        use_huge_pages()  # as launch.py does
    run = PEERS[name]()
    times = []
    for _ in range(WARMUP + STEPS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps([times[WARMUP:], peak_gb]))


def main() -> None:
    """Runs the peers in turn and prints a table."""
    medians: dict[str, list[float]] = {name: [] for name in PEERS}
    peaks_gb = dict.fromkeys(PEERS, 0.0)
    for _ in range(TURNS):
        for name, found in medians.items():
            output = subprocess.run(
                [sys.executable, __file__, SHAPE, NANOGPT, name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            times, peak_gb = json.loads(output.splitlines()[-1])
            found.append(statistics.median(times))
            peaks_gb[name] = max(peaks_gb[name], peak_gb)
    print(f"{'':20} | s/step | tokens/s | peak GB | jaxlm is faster by (each turn)")
    for name, found in medians.items():
        ratios = [peer / own for peer, own in zip(found, medians["jaxlm"], strict=True)]
        step_s = statistics.median(found)
        print(
            f"{name:20} | {step_s:6.2f} | {BATCH * SEQ_LEN / step_s:8,.0f} | "
            f"{peaks_gb[name]:7.2f} | " + ", ".join(f"{ratio:.2f}x" for ratio in ratios)
        )


if __name__ == "__main__":
    time_steps(sys.argv[3]) if len(sys.argv) > 3 else main()
