"""Losses: `(model, batch) -> (sum over tokens, number of tokens)`, so that parts add up.

Instead of one sum there may be a dict of them, which has `loss` and terms that the gradient takes
in besides. Evals leave the terms out, so that losses compare whatever a term weighs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
Sums = jax.Array | dict[str, jax.Array]
Loss = Callable[[Any, Batch], tuple[Sums, jax.Array]]


def loss_and_terms(sums: Sums) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of the loss itself, and those of the terms besides."""
    if not isinstance(sums, dict):
        return sums, {}
    return sums["loss"], {name: value for name, value in sums.items() if name != "loss"}


def objective(sums: Sums) -> jax.Array:
    """What the gradient is of: the loss and its terms."""
    return functools.reduce(jnp.add, jax.tree.leaves(sums))


def next_token_loss(*, z_loss: float = 0.0, eos_id: int | None = None, num_chunks: int = 1) -> Loss:
    """Cross-entropy of the next token.

    Args:
      z_loss: weight of the term `z_loss`, the squared log-normalizer, which keeps logits from
        drifting (PaLM, 2204.02311).
      eos_id: where given, attention stays within a document; documents end at this token.
      num_chunks: parts of the sequence whose logits are made one after the other, and again in the
        backward pass, so that no [B, T, V] is ever in memory. More than one takes a model with
        `hidden(tokens_BT, segment_ids_BT) -> (x_BTD, None)` and `readout()(x_BTD) -> logits_BTV`.

    Returns:
      A loss of a model `(tokens_BT, segment_ids_BT or None) -> logits_BTV` and a batch of
      `inputs` and `targets`, int32 [B, T], and optionally `loss_mask`, float32 [B, T].
    """

    def loss(model: Any, batch: Batch) -> tuple[Sums, jax.Array]:
        inputs_BT = batch["inputs"]
        segment_ids_BT = None if eos_id is None else segments(inputs_BT, eos_id)
        if num_chunks == 1:
            logits_BTV = model(inputs_BT, segment_ids_BT)
            losses_BT, log_normalizer_BT = _token_losses(logits_BTV, batch["targets"])
        else:
            x_BTD, _ = model.hidden(inputs_BT, segment_ids_BT)
            # The readout is made out here, so that gradients of its weights are summed, and sent
            # between devices, in the dtype that it casts them to.
            losses_BT, log_normalizer_BT = _in_chunks(
                model.readout(), x_BTD, batch["targets"], num_chunks
            )
        mask_BT = batch.get("loss_mask", jnp.ones_like(losses_BT))
        total, count = jnp.sum(losses_BT * mask_BT), jnp.sum(mask_BT)
        if not z_loss:
            return total, count
        return {"loss": total, "z_loss": z_loss * jnp.sum(log_normalizer_BT**2 * mask_BT)}, count

    return loss


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], float32 [B, T]."""
    return _token_losses(logits_BTV, targets_BT)[0]


def _token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The cross-entropy and the log-normalizer, log(sum exp logits), of each token.
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return log_normalizer_BT - target_BT, log_normalizer_BT


def _in_chunks(
    readout: Callable[[jax.Array], jax.Array],
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    num_chunks: int,
) -> tuple[jax.Array, jax.Array]:
    B, T = targets_BT.shape

    @jax.checkpoint
    def losses(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, targets = chunk
        return _token_losses(readout(x), targets)

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(B, num_chunks, T // num_chunks, *x.shape[2:]), 0, 1)

    def join(x_CBT: jax.Array) -> jax.Array:
        return jnp.swapaxes(x_CBT, 0, 1).reshape(B, T)

    losses_CBT, log_normalizer_CBT = jax.lax.map(losses, (split(x_BTD), split(targets_BT)))
    return join(losses_CBT), join(log_normalizer_CBT)


def segments(tokens_BT: jax.Array, eos_id: int) -> jax.Array:
    """Which document of its row each token belongs to, int32 [B, T]; an EOS ends its document."""
    ends_BT = (tokens_BT == eos_id).astype(jnp.int32)
    return jnp.cumsum(ends_BT, axis=1) - ends_BT
