"""What a model makes of given tokens: how likely each is, and which one is likeliest next.

Arrays in, arrays out. Dims: B batch, T time, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.device.loss import Batch, cross_entropy, segments
from jaxlm.device.state import Blueprint, Params, jit_with_model

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

    def token_scores(model: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits_BTV = _logits(model, batch["inputs"], eos_id)
        targets_BT = batch["targets"]
        likeliest_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
        return -cross_entropy(logits_BTV, targets_BT), likeliest_BT

    return jit_with_model(token_scores, blueprint, mesh)


def make_next_tokens(blueprint: Blueprint, mesh: Mesh, eos_id: int | None) -> NextTokens:
    """The compiled `(params, batch) -> likeliest next tokens`, by a forward pass over all of it.

    Arguments are those of `make_token_scores`.

    Returns:
      A function of params and a batch of `inputs`, int32 [B, T], padded at the end, and
      `last`, int32 [B], the index of the last token of each row; it gives int32 [B].
    """

    def next_tokens(model: Any, batch: Batch) -> jax.Array:
        logits_BTV = _logits(model, batch["inputs"], eos_id)
        last_BTV = jnp.take_along_axis(logits_BTV, batch["last"][:, None, None], axis=1)
        return jnp.argmax(last_BTV[:, 0], axis=-1).astype(jnp.int32)

    return jit_with_model(next_tokens, blueprint, mesh)


def _logits(model: Any, inputs_BT: jax.Array, eos_id: int | None) -> jax.Array:
    return model(inputs_BT, None if eos_id is None else segments(inputs_BT, eos_id))
