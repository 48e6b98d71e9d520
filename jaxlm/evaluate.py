"""The held-out loss of a state."""

from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from jaxlm.data.batches import prefetch
from jaxlm.loss import Batch
from jaxlm.state import Params

EvalStep = Callable[[Params, Batch], tuple[jax.Array, jax.Array]]


class EvalSet(Protocol):
    """The batches of the whole held-out set, always in the same order."""

    def __len__(self) -> int: ...

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """Those rows of batch `index`, as host arrays."""
        ...


def evaluate(eval_step: EvalStep, params: Params, put: Callable[[int], Batch], count: int) -> float:
    """The mean loss per token (nats) over the whole set.

    Every token weighs the same, whatever batch it is in; the order is fixed, so the same state on
    the same mesh gives the same bits.

    Args:
      eval_step: the compiled `(params, batch) -> (loss sum, number of tokens)`.
      params: the params.
      put: index -> that batch on the device.
      count: number of batches.
    """
    sums = [eval_step(params, batch) for _, batch in prefetch(put, 0, count, depth=2)]
    losses, tokens = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
    return float(losses / tokens)
