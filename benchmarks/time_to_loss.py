"""What loss a recipe ends at: ours, and peers in PyTorch on the same batches and evals.

    uv run python benchmarks/time_to_loss.py gpt2-adamw --learning_rate 2e-3 4e-3 --seed 0 1 2

Needs torch and transformers (the `parity` group). The shape, data and batches are those of
`benchmarks/5m.py`; each peer has its non-embedding parameters. Every run has the schedule of its
own length. Prints a JSON object a run.
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxlm.config import MAIN, Config
from jaxlm.data.batches import EvalBatches
from jaxlm.device.optim import make_schedule
from jaxlm.launch import parse_config
from jaxlm.terminal import log_to
from jaxlm.training.inputs import find_inputs

# A peer's model, and its optimizers, each with what its learning rate is of the run's.
Peer = tuple[Any, list[tuple[Any, float]]]

CONFIG = Path(__file__).with_name("5m.py")


def ours(config: Config) -> dict[int, float]:
    """Eval step -> eval loss of a run of ours."""
    from jaxlm.training.train import train

    losses: dict[int, float] = {}

    def keep(step: int, row: dict[str, Any]) -> None:
        if "eval/loss" in row:
            losses[step] = row["eval/loss"]

    with tempfile.TemporaryDirectory() as folder:
        train(dataclasses.replace(config, run_dir=folder), callbacks=[keep])
    return losses


def gpt2_adamw(config: Config) -> Peer:
    """GPT-2 of transformers, its MLP sized to our parameters, and AdamW."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    shape = config.model
    per_layer = shape.d_model * (
        2 * shape.num_heads * shape.head_dim
        + 2 * shape.num_kv_heads * shape.head_dim
        + 3 * shape.d_ff
    )
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=config.seq_len,
            n_embd=shape.d_model,
            n_layer=shape.num_layers,
            n_head=shape.num_heads,
            n_inner=(per_layer - 4 * shape.d_model**2) // (2 * shape.d_model),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1.0,
        betas=(0.9, 0.95),
    )
    return model, [(adamw, 1.0)]


def qwen3_muon(config: Config) -> Peer:
    """A recipe of today: Qwen3 of transformers, untied, outputs of blocks from zero, and Muon."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    shape = config.model
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=config.seq_len,
            tie_word_embeddings=False,
        )
    )
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in others]
    muon = torch.optim.Muon(hidden, lr=1.0, weight_decay=0.0)
    adam = torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    return model, [(muon, 1.0), (adam, 0.2)]


PEERS: dict[str, Callable[[Config], Peer]] = {
    "gpt2-adamw": gpt2_adamw,
    "qwen3-muon": qwen3_muon,
}


def peer(name: str, config: Config) -> dict[int, float]:
    """Eval step -> eval loss of a peer on the batches of `config`."""
    import torch  # pyright: ignore[reportMissingImports]

    with log_to(lambda line: None):
        config, inputs = find_inputs(config, None, None, None)
    batches, held_out = (
        inputs.rows_of(inputs.phases([], 0)),
        cast(EvalBatches, inputs.held_out[MAIN]),
    )
    rates = np.asarray(make_schedule(config.optim, config.num_steps)(np.arange(config.num_steps)))
    torch.manual_seed(config.seed)
    model, optimizers = PEERS[name](config)

    def loss_sum(batch: dict[str, np.ndarray]) -> Any:
        logits = model(input_ids=torch.from_numpy(batch["inputs"]).long()).logits
        targets = torch.from_numpy(batch["targets"]).long().flatten()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        mask = batch.get("loss_mask", np.ones_like(batch["targets"], np.float32))
        return losses @ torch.from_numpy(mask).flatten()

    losses = {}
    for step in range(config.num_steps):
        (loss_sum(batches(step, slice(None))) / (config.batch_size * config.seq_len)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, ratio in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = ratio * float(rates[step])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % config.eval_interval == 0 or step + 1 == config.num_steps:
            with torch.no_grad():
                total = sum(loss_sum(held_out(i)).item() for i in range(len(held_out)))
            losses[step + 1] = total / held_out.num_targets
    return losses


def main() -> None:
    """Runs each number of steps with each learning rate and seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=["jaxlm", *PEERS])
    parser.add_argument("--num_steps", type=int, nargs="+", default=[1000])
    parser.add_argument("--learning_rate", type=float, nargs="+", default=[None])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    args, flags = parser.parse_known_args()
    for num_steps, rate, seed in itertools.product(args.num_steps, args.learning_rate, args.seed):
        changes = ["--config", str(CONFIG), f"--num_steps={num_steps}", f"--seed={seed}", *flags]
        if rate is not None:
            changes.append(f"--optim.learning_rate={rate}")
        config = parse_config(changes, prog="time_to_loss.py")
        started = time.perf_counter()
        losses = ours(config) if args.recipe == "jaxlm" else peer(args.recipe, config)
        row = {
            "recipe": args.recipe,
            "num_steps": num_steps,
            "learning_rate": config.optim.learning_rate,
            "seed": seed,
            "eval_loss": losses[num_steps],
            "evals": losses,
            "seconds": time.perf_counter() - started,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
