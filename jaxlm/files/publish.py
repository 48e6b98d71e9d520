"""Atomic creation of folders: a folder appears under its name once it is complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxlm.errors import InputError
from jaxlm.files.durable import expand, fsync
from jaxlm.files.lock import locked
from jaxlm.files.ours import MARKER


def check_free(folder: str | Path) -> Path:
    """The path of a new folder, with `~` expanded.

    Raises:
      ValueError: the path exists and is no empty folder, is a URL, or is too long.
    """
    if "://" in str(folder):
        raise InputError(f"{folder}: found a URL, expected a local path or gs://BUCKET/PATH")
    target = Path(expand(str(folder), str(folder)[:80]))
    expand(_partial(target).name, target.name[:80])
    taken = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if taken or target.is_symlink():
        raise InputError(
            f"{target}: found something there, expected no folder or an empty one; "
            "name another, or remove it first"
        )
    return target


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """A new folder to be filled; renamed to `target` once all of it is flushed to disk.

    An error leaves nothing; a kill leaves `.NAME.partial`, which the next try removes.

    Args:
      target: the final path.

    Raises:
      ValueError: the name is taken, or there is a `.NAME.partial` of another program.
      RuntimeError: another process is filling the folder, or the folder cannot be written.
    """
    target = Path(os.path.abspath(check_free(target)))  # "." has no name
    partial = _partial(target)
    try:
        with locked(partial, required=False):
            new = partial / target.name
            shutil.rmtree(new, ignore_errors=True)  # left by a killed try
            new.mkdir()
            try:
                yield new
                for path in (*new.rglob("*"), new):
                    fsync(path)
                new.rename(target)
                fsync(target.parent)
            finally:
                shutil.rmtree(new, ignore_errors=True)
                (partial / MARKER).unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):  # it is not ours, or another process has it
            partial.rmdir()
