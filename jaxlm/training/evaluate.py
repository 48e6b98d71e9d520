"""The held-out loss of a state."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol

import jax
import numpy as np

from jaxlm.data.batches import prefetch
from jaxlm.device.loss import Batch
from jaxlm.device.state import Params
from jaxlm.tracking.metrics import perplexity

EvalStep = Callable[[Params, Batch], dict[str, jax.Array]]
"""The sums of a batch by name, `loss` (nats) and `tokens` among them."""
Sums = dict[str, np.ndarray]
"""Name -> float64 [count], one sum for each batch."""


class EvalSet(Protocol):
    """The batches of the whole held-out set, always in the same order.

    An optional attribute `fingerprint` is kept in each checkpoint, and a resume that would judge
    the best by another set is refused. Another one, `num_bytes`, is the size of the text that the
    targets stand for, for bits per byte.
    """

    def __len__(self) -> int: ...

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """The given rows of batch `index`, as host arrays."""
        ...


class HeldOut(NamedTuple):
    """One held-out set."""

    put: Callable[[int], Batch]
    """Index -> that batch on the mesh."""
    num_batches: int
    num_bytes: int | None = None
    """Bytes of the text that is predicted; None if unknown."""


class Stopped(Exception):
    """A stop request cut an eval short."""


def batch_sums(
    eval_step: EvalStep,
    params: Params,
    held_out: HeldOut,
    stops: Callable[[], bool] = lambda: False,
) -> Sums:
    """The sums of each batch of the set.

    The order is fixed, so the same state on the same mesh gives the same bits.

    Args:
      eval_step: the compiled `(params, batch) -> sums`.
      params: the params.
      held_out: the set.
      stops: called before each batch; whether to stop.

    Raises:
      Stopped: `stops` returned True.
    """
    sums = []
    with closing(prefetch(held_out.put, 0, held_out.num_batches, depth=2)) as batches:
        for _, batch in batches:
            if stops():
                raise Stopped
            sums.append(eval_step(params, batch))
            # Without this wait the host would queue the whole set, and a stop would come too late.
            jax.block_until_ready(sums[-2:-1])
    fetched = jax.device_get(sums)
    return {name: np.array([of[name] for of in fetched], np.float64) for name in fetched[0]}


def means(sums: Sums, num_bytes: int | None = None) -> dict[str, float]:
    """The means of `batch_sums` over all tokens, each of the same weight; `loss` (nats) first.

    `perplexity` and, with the size of the text, `bits_per_byte` are made of the loss.
    """
    names = ["tokens", "loss", *sorted(sums.keys() - {"loss", "tokens"})]
    num_tokens, *totals = np.stack([sums[name] for name in names], axis=1).sum(axis=0)
    found = {name: float(x / num_tokens) for name, x in zip(names[1:], totals, strict=True)}
    found["perplexity"] = perplexity(found["loss"])
    if num_bytes:
        found["bits_per_byte"] = float(totals[0]) / math.log(2) / num_bytes
    return found


def joined(sums: Sequence[Sums]) -> Sums:
    """The sums of several sets as those of one."""
    return {name: np.concatenate([of[name] for of in sums]) for name in sums[0]}


def evaluate(
    eval_step: EvalStep,
    params: Params,
    held_out: Mapping[str, HeldOut],
    best_by: Sequence[str],
    stops: Callable[[], bool],
) -> dict[str, float]:
    """The row of an eval: `eval/METRIC` of the sets of `best_by`, as of one set.

    Of several sets, each has its own `eval/NAME/METRIC` too. Arguments are as in `batch_sums`.
    """
    sums = {name: batch_sums(eval_step, params, of, stops) for name, of in held_out.items()}

    def row_of(names: Sequence[str], prefix: str) -> dict[str, float]:
        sizes = [size for name in names if (size := held_out[name].num_bytes)]
        num_bytes = sum(sizes) if len(sizes) == len(names) else None
        found = means(joined([sums[name] for name in names]), num_bytes)
        return {f"{prefix}/{metric}": mean for metric, mean in found.items()}

    row = row_of(best_by, "eval")
    for name in sums if len(sums) > 1 else ():
        row |= row_of([name], f"eval/{name}")
    return row
