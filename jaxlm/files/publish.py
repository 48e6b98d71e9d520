"""Folders that appear under their name when they are whole."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.files.durable import fsync
from jaxlm.files.lock import lock, unlock


def check_free(target: Path) -> None:
    """Raises ValueError unless a folder can be made here: nothing is there, or an empty one."""
    taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if taken or target.is_symlink():
        raise ValueError(
            f"{target}: found something there, expected no folder or an empty one; "
            "name another, or remove it first"
        )


@contextlib.contextmanager
def published(target: Path, warn: Callable[[str], None]) -> Iterator[Path]:
    """A new folder to be filled, which gets its name once all of it is on the disk.

    An error leaves nothing; a kill leaves `.NAME.partial`, which the next try clears.

    Args:
      target: the name that it gets.
      warn: takes a line where the file system has no locks.

    Raises:
      ValueError: there is something of that name.
      RuntimeError: another process is filling it, or it cannot be written.
    """
    check_free(target)
    target = Path(os.path.abspath(target))  # "." has no name
    partial = target.with_name(f".{target.name}.partial")
    held = lock(partial, required=False, warn=warn)
    try:
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield partial
        for path in (*partial.rglob("*"), partial):
            fsync(path)
        partial.rename(target)
        fsync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        unlock(held)
