"""Causal attention: a reference, and a fast implementation for each platform.

Dims: B batch, T queries, S keys, N query heads, K key/value heads, G query heads per K,
H head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.device.sharding import AXES_OF

Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
"""`(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT or None) -> out_BTNH`, as `reference_attention`."""


def for_platform(platform: str) -> Attention:
    """The attention for `cpu`, `gpu` or `tpu`; all compute the same function."""
    return {"cpu": blocked_attention, "gpu": cudnn_attention, "tpu": splash_attention}[platform]


def reference_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Causal softmax attention, with all scores in memory at once.

    Args:
      q: queries [B, T, N, H].
      k: keys [B, T, K, H]; K divides N, and query head n reads key head n // (N / K).
      v: values [B, T, K, H].
      segment_ids: [B, T]; a query sees only keys of its own segment. None is one segment.

    Returns:
      [B, T, N, H], in the dtype of `q`; the softmax is in float32.
    """
    return _attend(q, k, v, segment_ids, start=0)


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    block_size: int = 64,
) -> jax.Array:
    """`reference_attention` by blocks of queries, each over the keys up to the block's end.

    Skips about half of the FLOPs, and keeps the scores of a block in the cache of a CPU.
    """
    outs = []
    for start in range(0, q.shape[1], block_size):
        stop = min(start + block_size, q.shape[1])
        segments = None if segment_ids is None else segment_ids[:, :stop]
        outs.append(_attend(q[:, start:stop], k[:, :stop], v[:, :stop], segments, start))
    return jnp.concatenate(outs, axis=1)


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`reference_attention` by JAX's TPU splash kernel; stores no scores (arXiv 2205.14135).

    Lengths T not divisible by 128 use `reference_attention`. `interpret` runs the kernel on a CPU,
    slowly.
    """
    if q.shape[1] % 128:
        return reference_attention(q, k, v, segment_ids)
    attend = partial(_splash, interpret=interpret)
    if jax.sharding.get_abstract_mesh().empty:
        return attend(q, k, v, segment_ids)
    # GSPMD does not shard a kernel: each device calls the kernel for its own rows and heads.
    rows, heads = P(AXES_OF["batch"]), P(AXES_OF["batch"], None, AXES_OF["heads"])
    specs = heads, heads, heads, None if segment_ids is None else rows
    attend = jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)
    return attend(q, k, v, segment_ids)


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, *, interpret: bool
) -> jax.Array:
    # Imported for a TPU only: the import takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, H = q.shape[1:]
    block = next(size for size in (512, 256, 128) if T % size == 0)
    attend: Any = kernel.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * N),
        block_sizes=kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None if segment_ids is None else kernel.SegmentIds(segment_ids, segment_ids)
    q_BNTH, k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (q * H**-0.5, k, v))
    return jnp.swapaxes(jax.vmap(attend)(q_BNTH, k_BKSH, v_BKSH, segments), 1, 2)


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """`reference_attention` by cuDNN's kernel, without storing scores.

    Needs two-byte floats, a head dim of at most 128 (a multiple of 8), no segments, and cuDNN; else
    it is `reference_attention`.
    """
    H = q.shape[-1]
    if q.dtype.itemsize != 2 or H > 128 or H % 8 or segment_ids is not None:
        return reference_attention(q, k, v, segment_ids)
    try:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    except RuntimeError:  # no cuDNN here, as for `jaxlm plan`, or a GPU too old for its kernel
        return reference_attention(q, k, v)


def cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, key_positions: jax.Array
) -> jax.Array:
    """Causal attention to cached keys and values: slots may be in any order of position.

    Args:
      q: queries [B, T, N, H].
      k: keys [B, K, S, H], heads first: a step of one token then reads them without a copy.
      v: values [B, K, S, H].
      positions: of the queries in their rows, [B, T].
      key_positions: of the keys, [B, S]; a query sees keys at its position or before.

    Returns:
      [B, T, N, H], in the dtype of `q`; the softmax is in float32.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    q_BKTGH = jnp.swapaxes(q.reshape(B, T, K, N // K, H) * H**-0.5, 1, 2)
    scores_BKTGS = jnp.einsum("BKTGH,BKSH->BKTGS", q_BKTGH, k, preferred_element_type=jnp.float32)
    mask_BTS = key_positions[:, None, :] <= positions[:, :, None]
    scores_BKTGS = jnp.where(mask_BTS[:, None, :, None], scores_BKTGS, jnp.finfo(jnp.float32).min)
    weights_BKTGS = jax.nn.softmax(scores_BKTGS, axis=-1).astype(v.dtype)
    out_BKTGH = jnp.einsum("BKTGS,BKSH->BKTGH", weights_BKTGS, v)
    return jnp.swapaxes(out_BKTGH, 1, 2).reshape(B, T, N, H)


def _attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BS: jax.Array | None,
    start: int,
) -> jax.Array:
    # Queries are at times start .. start + T, keys at times 0 .. S.
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    query_times_T, key_times_S = start + jnp.arange(T), jnp.arange(S)
    mask_BTS = (query_times_T[:, None] >= key_times_S[None, :])[None]
    if segment_ids_BS is not None:
        query_segments_BT = jax.lax.slice_in_dim(segment_ids_BS, start, start + T, axis=1)
        mask_BTS = mask_BTS & (query_segments_BT[:, :, None] == segment_ids_BS[:, None, :])
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(B, T, N, H)
