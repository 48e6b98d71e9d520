"""A trace of some steps, for XProf, TensorBoard and ui.perfetto.dev."""

import contextlib
import logging
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import jax

_log = logging.getLogger(__name__)

X = TypeVar("X")
_WARM_UP = 5  # Steps that are unlike the others: first calls, first logs.


def traced(
    batches: Iterable[tuple[int, X]], folder: Path, num_steps: int
) -> Generator[tuple[int, X], None, None]:
    """The (step, batch) pairs; traces the caller's work from the sixth on.

    Args:
      batches: the pairs.
      folder: folder of the trace.
      num_steps: number of steps to trace; 0 for none.
    """
    if num_steps:
        folder.mkdir(parents=True, exist_ok=True)  # fails before the first step, not at the sixth
    with contextlib.ExitStack() as trace:
        for count, (step, batch) in enumerate(batches):
            if num_steps and count == _WARM_UP:
                trace.enter_context(_trace(folder))
            if count == _WARM_UP + num_steps:
                trace.close()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield step, batch


@contextlib.contextmanager
def _trace(folder: Path) -> Iterator[None]:
    with jax.profiler.trace(folder, create_perfetto_trace=True):
        yield
    _log.info(
        f"trace: {folder}; open perfetto_trace.json.gz below it at ui.perfetto.dev, or the folder "
        "with xprof"
    )
