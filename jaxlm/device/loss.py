"""Losses: `(model, batch) -> (sum over tokens, number of tokens)`, so that parts add up."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
Loss = Callable[[Any, Batch], tuple[jax.Array, jax.Array]]


def next_token_loss(*, z_loss: float = 0.0, eos_id: int | None = None, num_chunks: int = 1) -> Loss:
    """Cross-entropy of the next token.

    Args:
      z_loss: weight of the squared log-normalizer, which keeps logits from drifting
        (PaLM, 2204.02311).
      eos_id: where given, attention stays within a document; documents end at this token.
      num_chunks: parts of the sequence whose logits are made one after the other, and again in the
        backward pass, so that no [B, T, V] is ever in memory. More than one takes a model with
        `hidden(tokens_BT, segment_ids_BT) -> (x_BTD, None)` and `readout()(x_BTD) -> logits_BTV`.

    Returns:
      A loss of a model `(tokens_BT, segment_ids_BT or None) -> logits_BTV` and a batch of
      `inputs` and `targets`, int32 [B, T], and optionally `loss_mask`, float32 [B, T].
    """

    def loss(model: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        inputs_BT = batch["inputs"]
        segment_ids_BT = None if eos_id is None else segments(inputs_BT, eos_id)
        if num_chunks == 1:
            logits_BTV = model(inputs_BT, segment_ids_BT)
            losses_BT = cross_entropy(logits_BTV, batch["targets"], z_loss)
        else:
            x_BTD, _ = model.hidden(inputs_BT, segment_ids_BT)
            # The readout is made out here, so that gradients of its weights are summed, and sent
            # between devices, in the dtype that it casts them to.
            losses_BT = _in_chunks(model.readout(), x_BTD, batch["targets"], z_loss, num_chunks)
        mask_BT = batch.get("loss_mask", jnp.ones_like(losses_BT))
        return jnp.sum(losses_BT * mask_BT), jnp.sum(mask_BT)

    return loss


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, z_loss: float = 0.0) -> jax.Array:
    """-log softmax(logits)[target] + z_loss * log(sum exp logits)^2, float32 [B, T]."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return log_normalizer_BT - target_BT + z_loss * log_normalizer_BT**2


def _in_chunks(
    readout: Callable[[jax.Array], jax.Array],
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    z_loss: float,
    num_chunks: int,
) -> jax.Array:
    B, T = targets_BT.shape

    @jax.checkpoint
    def losses(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, targets = chunk
        return cross_entropy(readout(x), targets, z_loss)

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(B, num_chunks, T // num_chunks, *x.shape[2:]), 0, 1)

    losses_CBT = jax.lax.map(losses, (split(x_BTD), split(targets_BT)))
    return jnp.swapaxes(losses_CBT, 0, 1).reshape(B, T)


def segments(tokens_BT: jax.Array, eos_id: int) -> jax.Array:
    """Which document of its row each token belongs to, int32 [B, T]; an EOS ends its document."""
    ends_BT = (tokens_BT == eos_id).astype(jnp.int32)
    return jnp.cumsum(ends_BT, axis=1) - ends_BT
