"""Log-probabilities of given tokens under a model.

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


def make_token_scores(blueprint: Blueprint, mesh: Mesh, eos_id: int | None) -> TokenScores:
    """The compiled `(params, batch) -> (log-probabilities, likeliest)` of `targets` after `inputs`.

    Args:
      blueprint: of the model.
      mesh: the mesh.
      eos_id: if given, attention stays within a document; documents end at this token.

    Returns:
      A function of params and a batch of `inputs` and `targets`, int32 [B, T], that gives float32
      [B, T] (nats) and bool [B, T], whether no token is likelier. One compilation a shape.
    """

    def token_scores(model: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs_BT = batch["inputs"]
        logits_BTV = model(inputs_BT, None if eos_id is None else segments(inputs_BT, eos_id))
        targets_BT = batch["targets"]
        likeliest_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
        return -cross_entropy(logits_BTV, targets_BT), likeliest_BT

    return jit_with_model(token_scores, blueprint, mesh)
