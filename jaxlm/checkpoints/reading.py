"""A checkpoint that is read while a trainer, which deletes what it no longer keeps, is at work."""

from collections.abc import Callable
from typing import TypeVar

from jaxlm.checkpoints.entries import identity
from jaxlm.checkpoints.folder import MAX_CHOICES, Selected, deleted_each_time, select

X = TypeVar("X")


def read(
    run: str,
    use: Callable[[Selected], X],
    default: str = "best",
    *,
    first: Selected | None = None,
) -> X:
    """What `use` makes of `RUN@STEP`; another step is chosen where a trainer deletes the one read.

    Args:
      run: a run folder or checkpoint folder, with `@STEP` or without.
      use: reads the checkpoint; called again with the next choice.
      default: the STEP where none is given.
      first: what has been chosen already.

    Raises:
      ValueError: as `select` raises; or each choice was deleted before it was read.
      Exception: what `use` raises about a checkpoint that is still there.
    """
    selected = first
    for _ in range(MAX_CHOICES):
        selected = selected or select(run, default)
        try:
            return use(selected)
        except (OSError, ValueError, RuntimeError):
            if identity(selected.path) == selected.identity:
                raise
            selected = None
    raise deleted_each_time(run)
