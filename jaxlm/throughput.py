"""How fast a run goes, and how far that is from what the hardware can do."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from jaxlm.config import ModelConfig

# Dense bfloat16 peak, in FLOP/s per JAX device, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The peak of one device (FLOP/s), or None where it is not known."""
    # The longest name first: "TPU v5 lite" is no "TPU v5".
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if device_kind.startswith(name):
            return PEAK_FLOPS[name]
    return None


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of a training step per token (PaLM, 2204.02311, appendix B).

    Six per weight of a matrix product, and causal attention in full, as is the custom.
    """
    attention = config.d_model * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * config.d_model * config.d_ff
    weights = config.num_layers * layer + config.d_model * config.vocab_size
    return 6 * weights + 12 * config.num_layers * config.num_heads * config.head_dim * seq_len


class Meter:
    """Steps per second of training alone: evals and saves are left out."""

    def __init__(self, step: int) -> None:
        self._step = step
        self._started_s = time.perf_counter()
        self._paused_s = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time inside."""
        before_s = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - before_s

    def rate(self, step: int) -> float:
        """Steps per second since the last call."""
        now_s = time.perf_counter()
        elapsed_s = max(now_s - self._started_s - self._paused_s, 1e-9)
        rate = (step - self._step) / elapsed_s
        self._step, self._started_s, self._paused_s = step, now_s, 0.0
        return rate
