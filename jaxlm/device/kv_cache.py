"""What a model has seen of its rows: keys and values, so that a new token costs a step of one.

Dims: B batch, T time of this call, S slots, K key/value heads, H head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.device.sharding import constrain

NOWHERE = 2**30
"""The position of no token: of padding, and of slots that are not filled. No token sees it."""


class Past(NamedTuple):
    """The share of one layer, and where the tokens of this call stand in it."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    positions_BS: jax.Array
    positions_BT: jax.Array
    start: jax.Array

    def extend(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "Past":
        """With the keys and values of this call in their slots."""

        def write(old_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            new_BKTH = jnp.swapaxes(new_BTKH, 1, 2)
            written = jax.lax.dynamic_update_slice_in_dim(old_BKSH, new_BKTH, self.start, axis=2)
            return constrain(written, "batch", "kv_heads", None, None)

        return self._replace(k_BKSH=write(self.k_BKSH, k_BTKH), v_BKSH=write(self.v_BKSH, v_BTKH))


class KVCache(NamedTuple):
    """Keys and values in slots, which are filled in the order of the calls, for all rows alike.

    Rows of different lengths are padded with tokens at `NOWHERE`, so that all of them write to the
    same slot in each step.
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    """Of each layer, [B, K, S, H]."""
    positions_BS: jax.Array
    """The position in its row of the token in each slot, int32."""
    size: jax.Array
    """Slots that are filled, int32 []."""

    def begin(self, positions_BT: jax.Array) -> list[Past]:
        """Each layer's share, for tokens at these positions of their rows."""
        positions_BS = jax.lax.dynamic_update_slice_in_dim(
            self.positions_BS, positions_BT, self.size, axis=1
        )
        return [Past(k, v, positions_BS, positions_BT, self.size) for k, v in self.layers]


def end(pasts: Sequence[Past]) -> KVCache:
    """The cache, once each layer has extended its share."""
    layers = tuple((past.k_BKSH, past.v_BKSH) for past in pasts)
    return KVCache(layers, pasts[0].positions_BS, pasts[0].start + pasts[0].positions_BT.shape[1])


def make_cache(config: ModelConfig, batch: int, num_slots: int, dtype: jnp.dtype) -> KVCache:
    """An empty one."""
    zeros_BKSH = jnp.zeros((batch, config.num_kv_heads, num_slots, config.head_dim), dtype)
    nowhere_BS = jnp.full((batch, num_slots), NOWHERE, jnp.int32)
    layers = ((zeros_BKSH, zeros_BKSH),) * config.num_layers
    return KVCache(layers, nowhere_BS, jnp.zeros((), jnp.int32))
