"""What a model makes of given tokens: how likely each is, and which one is likeliest next.

Arrays in, arrays out. Dims: B batch, T time, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxlm.loss import Batch, cross_entropy, segments
from jaxlm.sharding import batch_sharding, replicated
from jaxlm.state import Blueprint, Params

TokenScores = Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
NextTokens = Callable[[Params, Batch], jax.Array]


def make_token_scores(blueprint: Blueprint, mesh: Mesh, eos_id: int | None) -> TokenScores:
    """The compiled `(params, batch) -> (log-probabilities, likeliest)` of `targets` after `inputs`.

    Args:
      blueprint: of the model.
      mesh: the mesh.
      eos_id: where given, attention stays within a document; documents end at this token.

    Returns:
      A function of params and a batch of `inputs` and `targets`, int32 [B, T], that gives float32
      [B, T] (nats) and bool [B, T], whether no token is likelier. One compilation a shape.
    """

    def token_scores(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits_BTV = _logits(blueprint, mesh, eos_id, params, batch["inputs"])
        targets_BT = batch["targets"]
        likeliest_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
        return -cross_entropy(logits_BTV, targets_BT), likeliest_BT

    return _compiled(token_scores, blueprint, mesh)


def make_next_tokens(blueprint: Blueprint, mesh: Mesh, eos_id: int | None) -> NextTokens:
    """The compiled `(params, batch) -> likeliest next tokens`, by a forward pass over all of it.

    Arguments are those of `make_token_scores`.

    Returns:
      A function of params and a batch of `inputs`, int32 [B, T], padded at the end, and
      `last`, int32 [B], the index of the last token of each row; it gives int32 [B].
    """

    def next_tokens(params: Params, batch: Batch) -> jax.Array:
        logits_BTV = _logits(blueprint, mesh, eos_id, params, batch["inputs"])
        last_BTV = jnp.take_along_axis(logits_BTV, batch["last"][:, None, None], axis=1)
        return jnp.argmax(last_BTV[:, 0], axis=-1).astype(jnp.int32)

    return _compiled(next_tokens, blueprint, mesh)


def _logits(
    blueprint: Blueprint, mesh: Mesh, eos_id: int | None, params: Params, inputs_BT: jax.Array
) -> jax.Array:
    segment_ids_BT = None if eos_id is None else segments(inputs_BT, eos_id)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return nnx.merge(blueprint.graphdef, params)(inputs_BT, segment_ids_BT)


def _compiled(function: Callable[..., Any], blueprint: Blueprint, mesh: Mesh) -> Any:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, blueprint.abstract.params)
    return jax.jit(
        function, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=replicated(mesh)
    )
