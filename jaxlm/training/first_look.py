"""Checks of a caller's own model, losses and batches, before anything is compiled."""

from collections.abc import Callable, Mapping, Sized
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm.device.guard import Guard
from jaxlm.device.loss import Batch, Loss, takes
from jaxlm.device.state import Blueprint, Own
from jaxlm.errors import InputError

_BATCHES = "a function (index, rows) -> dict of host arrays"
_LOSS = (
    "expected (sum over tokens, number of tokens), or a dict of metrics as a third value; a sum is "
    "float32 [], or a dict of such with a `loss` among them (a mean would not add up)"
)

_TAKEN = {
    "perplexity",
    "bits_per_byte",
    "tokens",
    "best_loss",
    "grad_norm",
    "learning_rate",
    *Guard._fields,
}
"""Names of other metrics of a step or an eval."""


def check_given(model: Any, batches: Any, eval_batches: Any) -> None:
    """Refuses arguments of the wrong kind.

    Raises:
      ValueError: names the argument, what was found and what was expected.
    """
    if isinstance(model, nnx.Module) or not (model is None or callable(model)):
        raise InputError(
            f"model: found an instance of {type(model).__name__}, expected a function of nnx.Rngs "
            "that makes one, such as its class"
        )
    sets = {"eval_batches": eval_batches}
    if isinstance(eval_batches, Mapping):
        sets = {f"eval_batches[{name!r}]": value for name, value in eval_batches.items()}
    for name, value in {"batches": batches, **sets}.items():
        if not (value is None or callable(value)):
            raise InputError(f"{name}: found a {type(value).__name__}, expected {_BATCHES}")
    for name, value in sets.items():
        if not (value is None or isinstance(value, Sized)):
            raise InputError(f"{name}: found no length, expected `__len__`: how many there are")
        if isinstance(eval_batches, Mapping) and isinstance(value, Sized) and not len(value):
            raise InputError(f"{name}: found no batch, expected at least one in a named set")


def look_at(
    blueprint: Blueprint, batch: Batch, own: Own, loss: Loss | None, eval_loss: Loss | None
) -> None:
    """Calls a caller's model or losses on batch 0, abstractly.

    Raises:
      ValueError: the call fails, or returns a value of another kind or shape.
    """
    if loss is None and own.model is not None:
        _look_at_model(blueprint, batch)
    for name, given in {"loss": loss, "eval_loss": eval_loss}.items():
        if given is not None:
            _look_at_loss(name, given, blueprint, batch)


def _look_at_model(blueprint: Blueprint, batch: Batch) -> None:
    inputs, targets = (batch.get(name) for name in ("inputs", "targets"))
    if inputs is None or targets is None:
        raise InputError(
            f"batches: found {', '.join(batch)}, expected int32 `inputs` and `targets` [rows, time]"
        )

    def call(params: Any, inputs: Any) -> Any:
        return nnx.merge(blueprint.graphdef, params)(inputs, None)

    logits = _look("model", "model(tokens, segment_ids)", call, blueprint, inputs)
    found = getattr(logits, "shape", type(logits).__name__)
    if not (isinstance(found, tuple) and len(found) == 3 and found[:2] == inputs.shape):
        raise InputError(
            f"model: found logits {found} of tokens {inputs.shape}, expected "
            f"[rows, time, vocabulary], so {(*inputs.shape, '…')}"
        )
    # A target beyond the last logit would make the loss NaN.
    if (largest := int(targets.max())) >= found[-1]:
        raise InputError(
            f"model: found logits for {found[-1]} tokens, expected at least {largest + 1}: "
            f"batch 0 has the target {largest}"
        )


def _look_at_loss(name: str, loss: Loss, blueprint: Blueprint, batch: Batch) -> None:
    key = jax.eval_shape(partial(jax.random.key, 0))

    def call(params: Any, batch_and_key: Any) -> Any:
        batch, key = batch_and_key
        given = {"key": key} if takes(loss, "key") else {}
        return loss(nnx.merge(blueprint.graphdef, params), batch, **given)

    found = _look(name, f"{name}(model, batch)", call, blueprint, (batch, key))
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        size = f" of {len(found)}" if isinstance(found, tuple) else ""
        raise InputError(f"{name}: found a {type(found).__name__}{size}, {_LOSS}")
    sums, weight, *metrics = found
    if isinstance(sums, dict) and "loss" not in sums:
        raise InputError(f"{name}: found sums of {', '.join(sums) or 'nothing'}, {_LOSS}")
    if metrics and not isinstance(metrics[0], dict):
        raise InputError(f"{name}: found a third value that is no dict, {_LOSS}")
    names = [*(sums if isinstance(sums, dict) else ("loss",)), *(metrics[0] if metrics else ())]
    if taken := sorted({name for name in names if names.count(name) > 1 or name in _TAKEN}):
        raise InputError(f"{name}: found the name {taken[0]}, which is taken; choose another")
    for leaf in jax.tree.leaves((sums, metrics)):
        if leaf.shape or not np.issubdtype(leaf.dtype, np.inexact):
            raise InputError(f"{name}: found a sum {leaf.dtype} {list(leaf.shape)}, {_LOSS}")
    if getattr(weight, "shape", None) not in ((), None):
        raise InputError(f"{name}: found {list(weight.shape)} numbers of tokens, {_LOSS}")


def _look(
    name: str, how: str, call: Callable[[Any, Any], Any], blueprint: Blueprint, given: Any
) -> Any:
    try:
        return jax.eval_shape(call, blueprint.abstract.params, given)
    except TypeError as error:
        raise InputError(f"{name}: expected to be called as {how}; {error}") from error
