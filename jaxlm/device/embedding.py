"""Rows of an embedding table by token, with a gradient for each platform.

Dims: B batch, T time, D model, V vocabulary; S tokens in order of their ids, in C blocks of b.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxlm.device.sharding import AXES_OF

Lookup = Callable[[jax.Array, jax.Array, jnp.dtype], Any]
"""`(table_VD, tokens_BT, dtype) -> x_BTD` of that dtype, as `plain_lookup`."""

_BLOCK_SIZE = 128


def lookup_for(platform: str) -> Lookup:
    """The lookup for `cpu`, `gpu` or `tpu`; all compute the same function."""
    return sorted_lookup if platform == "gpu" else plain_lookup


def plain_lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The rows of the tokens, [B, T, D]."""
    return table_VD.astype(dtype)[tokens_BT]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def sorted_lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`plain_lookup`, with a gradient added up in float32 and in a fixed order.

    XLA:GPU adds up the gradient of `plain_lookup` by atomics, in any order; with deterministic
    kernels it sorts all B * T * D numbers first. Here only the B * T tokens are sorted. Like any
    `custom_vjp`, it has no forward mode (`jax.jvp`).
    """
    return plain_lookup(table_VD, tokens_BT, dtype)


def _forward(
    table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return plain_lookup(table_VD, tokens_BT, dtype), (table_VD, tokens_BT)


def _backward(
    dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], grad_BTD: jax.Array
) -> tuple[jax.Array, None]:
    del dtype
    table_VD, tokens_BT = saved
    V, mesh = len(table_VD), jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _add_rows(tokens_BT, grad_BTD, V).astype(table_VD.dtype), None
    # To sort, GSPMD would gather all tokens with their gradients. Here each device adds up its part
    # of the table. As `fsdp` splits D too, devices exchange rows: fewer bytes than sums [V, D].
    (vocab,), (model,) = AXES_OF["vocab"], AXES_OF["model"]
    others = tuple(axis for axis in AXES_OF["batch"] if axis != model)
    V_here = V // mesh.shape[vocab]

    def add(tokens_BT: jax.Array, grad_BTD: jax.Array) -> jax.Array:
        ids_BT = tokens_BT - jax.lax.axis_index(vocab) * V_here
        return jax.lax.psum(_add_rows(ids_BT, grad_BTD, V_here), others)

    add = jax.shard_map(
        add, in_specs=(P(others), P(others, None, model)), out_specs=P(vocab, model)
    )
    return add(tokens_BT, grad_BTD).astype(table_VD.dtype), None


sorted_lookup.defvjp(_forward, _backward)


def _add_rows(ids_BT: jax.Array, rows_BTD: jax.Array, V: int) -> jax.Array:
    """The sum of the rows of each id below V, float32 [V, D]; rows of other ids are left out."""
    D = rows_BTD.shape[-1]
    ids_S = jnp.where((ids_BT >= 0) & (ids_BT < V), ids_BT, V).reshape(-1)
    ids_S = jnp.pad(ids_S, (0, -ids_S.size % _BLOCK_SIZE), constant_values=V)
    order_S = jnp.argsort(ids_S)
    ids_S = ids_S[order_S]
    rows_SD = rows_BTD.reshape(-1, D).at[order_S].get(mode="fill", fill_value=0)  # 0 for padding
    ids_Cb, rows_CbD = ids_S.reshape(-1, _BLOCK_SIZE), rows_SD.reshape(-1, _BLOCK_SIZE, D)

    # In a block, a product adds up the rows of equal ids. Without TF32, which would round sums.
    precise = {"preferred_element_type": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
    equal_Cbb = (ids_Cb[:, :, None] == ids_Cb[:, None, :]).astype(rows_CbD.dtype)
    sums_CbD = jnp.einsum("Cab,CbD->CaD", equal_Cbb, rows_CbD, **precise)
    # If earlier blocks end with the id that begins this one, their sums of that id belong here too.
    first_Cb, last_C = ids_Cb[:, :1], ids_Cb[:, -1]
    before_CC = jnp.tri(len(ids_Cb), k=-1, dtype=bool) & (first_Cb == last_C[None, :])
    carried_CD = jnp.einsum("cC,CD->cD", before_CC.astype(jnp.float32), sums_CbD[:, -1], **precise)
    sums_CbD += jnp.where((ids_Cb == first_Cb)[:, :, None], carried_CD[:, None, :], 0)

    # The last position of an id has the complete sum. All indices differ, or XLA would sort again.
    is_last_S = jnp.append(ids_S[1:] != ids_S[:-1], True)
    to_S = jnp.where(is_last_S, ids_S, V + 1 + jnp.arange(ids_S.size))
    zeros_VD = jnp.zeros((V, D), jnp.float32)
    return zeros_VD.at[to_S].set(sums_CbD.reshape(-1, D), mode="drop", unique_indices=True)
