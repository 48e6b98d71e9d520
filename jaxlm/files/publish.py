"""Folders that appear under their name when they are whole."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.files.durable import put_in_place
from jaxlm.files.lock import lock, unlock


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
    if target.exists():
        raise ValueError(
            f"{target} exists already, expected a new name; choose another one, or move it away"
        )
    partial = target.with_name(f".{target.name}.partial")
    held = lock(partial, required=False, warn=warn)
    try:
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield partial
        put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        unlock(held)
