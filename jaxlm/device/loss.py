"""Losses: sums over the tokens of a batch, so that the parts of a batch add up.

A loss is a function `(model, batch) -> (sum, number of tokens)`. A sum may be a dict: `loss`, and
terms to optimise besides. A dict as a third value holds metrics, without a gradient.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.errors import InputError

Batch = dict[str, jax.Array]
Sums = jax.Array | dict[str, jax.Array]
Loss = Callable[..., tuple[Sums, jax.Array] | tuple[Sums, jax.Array, dict[str, jax.Array]]]
"""Called as `loss(model, batch)`, or `loss(model, batch, key=…)` if the loss has this parameter."""


class Totals(NamedTuple):
    """The sums over tokens that a loss returns; terms and metrics have names."""

    loss: jax.Array
    terms: dict[str, jax.Array]
    """Auxiliary terms of the objective, not part of the loss."""
    metrics: dict[str, jax.Array]
    num_tokens: jax.Array
    """Number of tokens."""

    def objective(self) -> jax.Array:
        """The sum to differentiate: the loss and its terms."""
        return sum(self.terms.values(), self.loss)

    def means(self) -> "Totals":
        """Each sum, divided by the number of tokens."""
        loss, terms, metrics = jax.tree.map(lambda x: x / self.num_tokens, self[:3])
        return Totals(loss, terms, metrics, self.num_tokens)


def total(loss: Loss, model: Any, batch: Batch, key: jax.Array | None) -> Totals:
    """The sums of a batch; `key` is the randomness of this batch, None in evals."""
    given = {"key": key} if takes(loss, "key") else {}
    sums, num_tokens, *metrics = loss(model, batch, **given)
    terms = dict(sums) if isinstance(sums, dict) else {"loss": sums}
    return Totals(terms.pop("loss"), terms, metrics[0] if metrics else {}, num_tokens)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters


def _rngs_for(function: Callable[..., Any], key: jax.Array | None) -> dict[str, nnx.Rngs | None]:
    return {"rngs": None if key is None else nnx.Rngs(key)} if takes(function, "rngs") else {}


def next_token_loss(*, z_loss: float = 0.0, eos_id: int | None = None, num_chunks: int = 1) -> Loss:
    """Cross-entropy of the next token.

    Args:
      z_loss: weight of the term `z_loss`, the squared log-normalizer, which keeps logits from
        drifting (PaLM, 2204.02311).
      eos_id: if given, attention stays within a document; documents end at this token.
      num_chunks: parts of the sequence whose logits are computed one after the other, and again in
        the backward pass, so that [B, T, V] is never in memory. More than one needs a model with
        `hidden(tokens_BT, segment_ids_BT) -> (x_BTD, _)` and `readout()(x_BTD) -> logits_BTV`.

    Returns:
      A loss of a model `(tokens_BT, segment_ids_BT or None) -> logits_BTV` and a batch of
      `inputs` and `targets`, int32 [B, T], and optionally `loss_mask`, float32 [B, T]. A parameter
      `rngs` of the model (and of `hidden`) receives `nnx.Rngs` of this batch, and None in evals.
    """

    def loss(model: Any, batch: Batch, key: jax.Array | None = None) -> tuple[Sums, jax.Array]:
        inputs_BT = batch["inputs"]
        segment_ids_BT = None if eos_id is None else segments(inputs_BT, eos_id)
        if num_chunks == 1:
            logits_BTV = model(inputs_BT, segment_ids_BT, **_rngs_for(model, key))
            losses_BT, log_normalizer_BT = _token_losses(logits_BTV, batch["targets"])
        else:
            if takes(model, "rngs") and not takes(model.hidden, "rngs"):
                raise InputError(
                    "model: found `rngs` in `__call__` and not in `hidden`, which loss_chunks "
                    "calls; expected it in both, or loss_chunks 1"
                )
            x_BTD, _ = model.hidden(inputs_BT, segment_ids_BT, **_rngs_for(model.hidden, key))
            # Made outside of the loop: inside, its weights' gradients would be added up and
            # sent between devices in float32, at twice the bytes.
            losses_BT, log_normalizer_BT = _in_chunks(
                model.readout(), x_BTD, batch["targets"], num_chunks
            )
        mask_BT = batch.get("loss_mask", jnp.ones_like(losses_BT))
        nll, count = jnp.sum(losses_BT * mask_BT), jnp.sum(mask_BT)
        if not z_loss:
            return nll, count
        return {"loss": nll, "z_loss": z_loss * jnp.sum(log_normalizer_BT**2 * mask_BT)}, count

    return loss


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target], float32 [B, T]."""
    return _token_losses(logits_BTV, targets_BT)[0]


def _token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Cross-entropy and log-normalizer, log(sum exp logits), of each token.
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return log_normalizer_BT - _pick(logits_BTV, targets_BT), log_normalizer_BT


@jax.custom_jvp
def _pick(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    # JAX's gradient is a scatter, which XLA does not fuse with the softmax: on a GPU, the gradient
    # of all logits would be written and read once more.
    return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]


@_pick.defjvp
def _pick_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    logits_BTV, targets_BT = primals
    ids_BTV = jax.lax.broadcasted_iota(targets_BT.dtype, logits_BTV.shape, logits_BTV.ndim - 1)
    picked_BTV = jnp.where(targets_BT[..., None] == ids_BTV, tangents[0], 0)
    return _pick(logits_BTV, targets_BT), picked_BTV.sum(axis=-1)


def _in_chunks(
    readout: Callable[[jax.Array], jax.Array],
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    num_chunks: int,
) -> tuple[jax.Array, jax.Array]:
    B, T = targets_BT.shape

    @jax.checkpoint
    def of_one(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, targets = chunk
        return _token_losses(readout(x), targets)

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(B, num_chunks, T // num_chunks, *x.shape[2:]), 0, 1)

    def join(x_CBT: jax.Array) -> jax.Array:
        return jnp.swapaxes(x_CBT, 0, 1).reshape(B, T)

    losses_CBT, log_normalizer_CBT = jax.lax.map(of_one, (split(x_BTD), split(targets_BT)))
    return join(losses_CBT), join(log_normalizer_CBT)


def segments(tokens_BT: jax.Array, eos_id: int) -> jax.Array:
    """Document number of each token in its row, int32 [B, T]; an EOS ends its document."""
    ends_BT = (tokens_BT == eos_id).astype(jnp.int32)
    return jnp.cumsum(ends_BT, axis=1) - ends_BT
