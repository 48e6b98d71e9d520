"""Reads a checkpoint while a trainer may delete it, by choosing another one."""

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
    """The result of `use` on `RUN@STEP`; chooses another step if a trainer deletes the one read.

    Args:
      run: a run folder or checkpoint folder, with `@STEP` or without.
      use: reads the checkpoint; called again with the next choice.
      default: the STEP if none is given.
      first: an earlier choice to begin with.

    Raises:
      ValueError: as `select` raises; or each choice was deleted before it was read.
      Exception: an error of `use` on a checkpoint that still exists.
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
