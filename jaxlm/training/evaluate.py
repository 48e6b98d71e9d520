"""The held-out loss of a state."""

from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from jaxlm.data.batches import prefetch
from jaxlm.device.loss import Batch
from jaxlm.device.state import Params

EvalStep = Callable[[Params, Batch], tuple[jax.Array, jax.Array]]


class EvalSet(Protocol):
    """The batches of the whole held-out set, always in the same order."""

    def __len__(self) -> int: ...

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """Those rows of batch `index`, as host arrays."""
        ...


def batch_sums(
    eval_step: EvalStep, params: Params, put: Callable[[int], Batch], count: int
) -> np.ndarray:
    """Loss sum (nats) and number of tokens of each batch of the set: float64 [count, 2].

    The order is fixed, so the same state on the same mesh gives the same bits.

    Args:
      eval_step: the compiled `(params, batch) -> (loss sum, number of tokens)`.
      params: the params.
      put: index -> that batch on the device.
      count: number of batches.
    """
    sums = [eval_step(params, batch) for _, batch in prefetch(put, 0, count, depth=2)]
    return np.asarray(jax.device_get(sums), np.float64)


def evaluate(eval_step: EvalStep, params: Params, put: Callable[[int], Batch], count: int) -> float:
    """The mean loss per token (nats) over the whole set; arguments are those of `batch_sums`.

    Every token weighs the same, whatever batch it is in.
    """
    return mean_loss(batch_sums(eval_step, params, put, count))


def mean_loss(sums: np.ndarray) -> float:
    """The mean loss per token (nats) of `batch_sums`."""
    losses, tokens = sums.sum(axis=0)
    return float(losses / tokens)
