"""Folders that appear under their name when they are whole."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.files.durable import expand, fsync
from jaxlm.files.lock import lock, unlock


def check_free(folder: str | Path) -> Path:
    """The path of a new folder, as `expand` gives it.

    Raises:
      ValueError: something is there that is no empty folder, it is a URL, or the name is too long.
    """
    if "://" in str(folder):
        raise ValueError(f"{folder}: found a URL, expected a local path or gs://BUCKET/PATH")
    target = Path(expand(str(folder), str(folder)[:80]))
    expand(_partial(target).name, target.name[:80])
    taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if taken or target.is_symlink():
        raise ValueError(
            f"{target}: found something there, expected no folder or an empty one; "
            "name another, or remove it first"
        )
    return target


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


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
    target = Path(os.path.abspath(check_free(target)))  # "." has no name
    partial = _partial(target)
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
