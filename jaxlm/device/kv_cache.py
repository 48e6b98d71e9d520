"""The KV cache: keys and values of earlier tokens, so that a call computes only the new.

Dims: B batch, T new tokens, S slots (a token each), K KV heads, H head dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.config import ModelConfig
from jaxlm.device.sharding import constrain

NOWHERE = 2**30
"""Position of padding and of empty slots, which no token attends to."""


class Past(NamedTuple):
    """One layer's cache; this call's tokens go to slots `start` onwards."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    positions_BS: jax.Array
    positions_BT: jax.Array
    start: jax.Array

    def extend(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> "Past":
        """This cache, with this call's keys and values in their slots."""

        def write(old_BKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            new_BKTH = jnp.swapaxes(new_BTKH, 1, 2)
            written = jax.lax.dynamic_update_slice_in_dim(old_BKSH, new_BKTH, self.start, axis=2)
            return constrain(written, "batch", "kv_heads", None, None)

        return self._replace(k_BKSH=write(self.k_BKSH, k_BTKH), v_BKSH=write(self.v_BKSH, v_BTKH))


class KVCache(NamedTuple):
    """Keys and values in slots, filled in the order of the calls, the same slot in every row.

    Rows of different lengths are padded with tokens at `NOWHERE`, so that every row writes to the
    same slot in each step.
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]
    """Keys, values: [B, K, S, H]."""
    positions_BS: jax.Array
    """Position, in its row, of the token in each slot, int32."""
    used: jax.Array
    """Number of filled slots, int32 []."""

    def begin(self, positions_BT: jax.Array) -> list[Past]:
        """Each layer's cache for T tokens at these positions; T slots are free."""
        positions_BS = jax.lax.dynamic_update_slice_in_dim(
            self.positions_BS, positions_BT, self.used, axis=1
        )
        return [Past(k, v, positions_BS, positions_BT, self.used) for k, v in self.layers]


def join(pasts: Sequence[Past]) -> KVCache:
    """One cache, from each layer's extended one."""
    layers = tuple((past.k_BKSH, past.v_BKSH) for past in pasts)
    return KVCache(layers, pasts[0].positions_BS, pasts[0].start + pasts[0].positions_BT.shape[1])


def make_cache(config: ModelConfig, batch: int, num_slots: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache."""
    zeros_BKSH = jnp.zeros((batch, config.num_kv_heads, num_slots, config.head_dim), dtype)
    nowhere_BS = jnp.full((batch, num_slots), NOWHERE, jnp.int32)
    layers = ((zeros_BKSH, zeros_BKSH),) * config.num_layers
    return KVCache(layers, nowhere_BS, jnp.zeros((), jnp.int32))
