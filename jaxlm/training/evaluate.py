"""The held-out loss of a state."""

from collections.abc import Callable
from contextlib import closing
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


class Stopped(Exception):
    """An eval was asked to stop before its end."""


def batch_sums(
    eval_step: EvalStep,
    params: Params,
    put: Callable[[int], Batch],
    count: int,
    stops: Callable[[], bool] = lambda: False,
) -> np.ndarray:
    """Loss sum (nats) and number of tokens of each batch of the set: float64 [count, 2].

    The order is fixed, so the same state on the same mesh gives the same bits.

    Args:
      eval_step: the compiled `(params, batch) -> (loss sum, number of tokens)`.
      params: the params.
      put: index -> that batch on the device.
      count: number of batches.
      stops: called before each batch; whether to stop.

    Raises:
      Stopped: `stops` said so.
    """
    sums = []
    with closing(prefetch(put, 0, count, depth=2)) as batches:
        for _, batch in batches:
            if stops():
                raise Stopped
            sums.append(eval_step(params, batch))
            # Else the host would queue the whole set, and have nothing left to stop.
            jax.block_until_ready(sums[-2:-1])
    return np.asarray(jax.device_get(sums), np.float64)


def evaluate(
    eval_step: EvalStep,
    params: Params,
    put: Callable[[int], Batch],
    count: int,
    stops: Callable[[], bool] = lambda: False,
) -> float:
    """The mean loss per token (nats) over the whole set; arguments are those of `batch_sums`.

    Every token weighs the same, whatever batch it is in.
    """
    return mean_loss(batch_sums(eval_step, params, put, count, stops))


def mean_loss(sums: np.ndarray) -> float:
    """The mean loss per token (nats) of `batch_sums`."""
    losses, tokens = sums.sum(axis=0)
    return float(losses / tokens)
