"""Peaks of devices, and FLOPs of a training step."""

import math
from typing import NamedTuple

from jaxlm.config import ModelConfig


class Device(NamedTuple):
    """Peaks of one JAX device; NaN if no code here needs the value."""

    flops: float
    """Dense bfloat16 matmuls (FLOP/s)."""
    memory_bytes: float = math.nan
    """Limit of one program: on TPU that of the compiler, on GPU the 3/4 that JAX preallocates."""
    memory_bytes_per_s: float = math.nan
    """To and from its main memory."""
    link_bytes_per_s: float = math.nan
    """To the other devices of its slice or host, over all links, one way."""


# From the vendors' data sheets: docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, and NVIDIA's
# of A100, H100 SXM and H200.
DEVICES = {
    "TPU v4": Device(275e12),
    "TPU v5 lite": Device(197e12, 15.75 * 2**30, 819e9, 200e9),
    "TPU v5": Device(459e12, 95.73 * 2**30, 2765e9, 600e9),
    "TPU v6 lite": Device(918e12, 31.24 * 2**30, 1638e9, 400e9),
    "TPU v6e": Device(918e12),
    "NVIDIA A100": Device(312e12),
    "NVIDIA H100": Device(989e12, 0.75 * 84_942_979_072, 3350e9, 450e9),
    "NVIDIA H200": Device(989e12),
}


def find_device(device_kind: str) -> Device | None:
    """The peaks of a kind of device, or None if unknown."""
    names = [name for name in DEVICES if device_kind.startswith(name)]
    # The longest match: "TPU v5 lite" also begins with "TPU v5".
    return DEVICES[max(names, key=len)] if names else None


def peak_flops(device_kind: str) -> float | None:
    """The peak of one device (FLOP/s), or None if unknown."""
    device = find_device(device_kind)
    return device.flops if device else None


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of a training step per token (PaLM, 2204.02311, appendix B).

    Six for each weight of a matmul, and, by convention, attention without the causal saving.
    """
    attention = config.d_model * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * config.d_model * config.d_ff
    weights = config.num_layers * layer + config.d_model * config.vocab_size
    return 6 * weights + 12 * config.num_layers * config.num_heads * config.head_dim * seq_len
