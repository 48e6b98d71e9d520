"""Causal attention, in the form that suits the platform.

Dims: B batch, T query time, S key time, N query heads, K key/value heads, G queries per key head,
H head dim.
"""

from typing import Protocol

import jax
import jax.numpy as jnp


class Attention(Protocol):
    """`(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT or None) -> out_BTNH`."""

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        """Shapes as in `reference_attention`."""
        ...


def for_platform(platform: str) -> Attention:
    """The attention for `cpu`, `gpu` or `tpu`; all compute the same function."""
    return blocked_attention if platform == "cpu" else reference_attention


def reference_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Softmax attention over the past and the present, in one piece.

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
    """`reference_attention` by blocks of queries, each over the keys up to its own end.

    Leaves out about half of the products, and keeps a block's scores in the cache of a CPU.
    """
    outs = []
    for start in range(0, q.shape[1], block_size):
        stop = min(start + block_size, q.shape[1])
        segments = None if segment_ids is None else segment_ids[:, :stop]
        outs.append(_attend(q[:, start:stop], k[:, :stop], v[:, :stop], segments, start))
    return jnp.concatenate(outs, axis=1)


def _attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BS: jax.Array | None,
    start: int,
) -> jax.Array:
    # The queries are those of times start .. start + T; the keys those of times 0 .. S.
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
