"""The held-out loss of a state."""

from collections.abc import Callable
from contextlib import closing
from typing import Protocol

import jax
import numpy as np

from jaxlm.data.batches import prefetch
from jaxlm.device.loss import Batch
from jaxlm.device.state import Params

EvalStep = Callable[[Params, Batch], dict[str, jax.Array]]
"""The sums of a batch by name, `loss` (nats) and `tokens` among them."""
Sums = dict[str, np.ndarray]
"""Name -> float64 [count], one sum for each batch."""


class EvalSet(Protocol):
    """The batches of the whole held-out set, always in the same order.

    An optional attribute `fingerprint` is kept in each checkpoint, and a resume that would judge
    the best by another set is refused.
    """

    def __len__(self) -> int: ...

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """The given rows of batch `index`, as host arrays."""
        ...


class Stopped(Exception):
    """A stop request cut an eval short."""


def batch_sums(
    eval_step: EvalStep,
    params: Params,
    put: Callable[[int], Batch],
    count: int,
    stops: Callable[[], bool] = lambda: False,
) -> Sums:
    """The sums of each batch of the set.

    The order is fixed, so the same state on the same mesh gives the same bits.

    Args:
      eval_step: the compiled `(params, batch) -> sums`.
      params: the params.
      put: index -> that batch on the device.
      count: number of batches.
      stops: called before each batch; whether to stop.

    Raises:
      Stopped: `stops` returned True.
    """
    sums = []
    with closing(prefetch(put, 0, count, depth=2)) as batches:
        for _, batch in batches:
            if stops():
                raise Stopped
            sums.append(eval_step(params, batch))
            # Without this wait the host would queue the whole set, and a stop would come too late.
            jax.block_until_ready(sums[-2:-1])
    fetched = jax.device_get(sums)
    return {name: np.array([of[name] for of in fetched], np.float64) for name in fetched[0]}


def evaluate(
    eval_step: EvalStep,
    params: Params,
    put: Callable[[int], Batch],
    count: int,
    stops: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """The means per token over the whole set, `loss` (nats) first; arguments as in `batch_sums`.

    Every token has the same weight, also in a shorter last batch.
    """
    return means(batch_sums(eval_step, params, put, count, stops))


def means(sums: Sums) -> dict[str, float]:
    """Each sum of `batch_sums`, divided by the number of tokens; `loss` first."""
    names = ["tokens", "loss", *sorted(sums.keys() - {"loss", "tokens"})]
    num_tokens, *totals = np.stack([sums[name] for name in names], axis=1).sum(axis=0)
    return {name: float(x / num_tokens) for name, x in zip(names[1:], totals, strict=True)}
