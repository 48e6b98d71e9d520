"""On one GPU: our attention beside XLA's own, and PyTorch's step at `configs/180m.py`.

    uv run --extra cuda python benchmarks/on_gpu.py attention
    python benchmarks/on_gpu.py torch | torch-compile     # needs torch and transformers

Our own step is timed by a run, as a user sees it: see benchmarks/README.md.
"""

import statistics
import sys
import time
from typing import Any

BATCH, MICROBATCHES, SEQ_LEN = 128, 4, 1024
SHAPES = [(32, 1024, 6, 6, 128), (4, 1024, 16, 4, 128), (4, 2048, 8, 8, 64), (2, 1000, 6, 2, 128)]
"""Rows, time, heads, heads for keys and values, head dim."""


def attention() -> None:
    """Errors against float32, times of forward and backward, and temporaries."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxlm.device.attention import cudnn_attention, reference_attention

    def with_grads(attend: Any) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array) -> tuple[Any, Any]:
            out = attend(q, k, v)
            return (out.astype(jnp.float32) * w).sum(), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    def error(found: Any, wanted: Any) -> float:
        found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    for rows, length, heads, kv_heads, dim in SHAPES:
        keys = jax.random.split(jax.random.key(rows), 4)
        q, k, v, w = (
            jax.random.normal(key, (rows, length, num, dim))
            for key, num in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
        )
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        with jax.default_matmul_precision("highest"):
            (_, out), grads = with_grads(reference_attention)(*wide, w)
        for name, attend in (("XLA", reference_attention), ("cuDNN", cudnn_attention)):
            compiled = with_grads(attend).lower(q, k, v, w).compile()
            (_, found), found_grads = compiled(q, k, v, w)
            times = []
            for _ in range(8):
                started = time.perf_counter()
                jax.block_until_ready([compiled(q, k, v, w) for _ in range(5)])
                times.append((time.perf_counter() - started) / 5)
            errors = [error(found, out), *map(error, found_grads, grads)]
            temporaries = compiled.memory_analysis().temp_size_in_bytes
            print(
                f"{(rows, length, heads, kv_heads, dim)} {name}: "
                f"{1e3 * statistics.median(times):.2f} ms, {temporaries / 1e9:.2f} GB, "
                f"errors {', '.join(f'{e:.1e}' for e in errors)}"
            )


def torch_step(compiled: bool) -> None:
    """Llama of transformers at the size of 180m: bfloat16 by autocast, fused AdamW, clipping."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.set_float32_matmul_precision("high")
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=20,
        num_attention_heads=6,
        head_dim=128,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model) if compiled else model
    shape = MICROBATCHES, BATCH // MICROBATCHES, SEQ_LEN
    tokens = torch.randint(0, config.vocab_size, shape, device="cuda")
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for part in tokens:
            with torch.autocast("cuda", torch.bfloat16):
                loss = forward(input_ids=part, labels=part).loss / MICROBATCHES
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    step_s = statistics.median(times[3:])
    peak_gb = torch.cuda.max_memory_allocated() / 1e9
    print(f"{step_s:.3f} s/step, {BATCH * SEQ_LEN / step_s:,.0f} tokens/s, peak {peak_gb:.1f} GB")


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "attention"
    attention() if what == "attention" else torch_step(compiled=what == "torch-compile")
