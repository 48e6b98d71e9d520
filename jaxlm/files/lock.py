"""A lock on a folder, for one writer. `flock` on the folder itself: no lock file to delete."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict

from jaxlm.errors import RunError
from jaxlm.files.durable import write_file
from jaxlm.files.ours import MARKER, check_ours, mark
from jaxlm.files.strict import read_json

_log = logging.getLogger(__name__)

HOLDER = "holder.json"
"""Names the process with the lock, in errors; other processes of a run check that they see it."""

# NFS refuses an exclusive lock on a folder, which is not open for writing (EBADF); other file
# systems have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL)
_held: set[int] = set()


class _Holder(TypedDict):
    host: str
    pid: int
    started: str


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


# A forked child would keep the lock after the death of its holder: children close their copy.
os.register_at_fork(after_in_child=_let_go)


class Lock(NamedTuple):
    """A lock that this process holds."""

    folder: Path
    descriptor: int
    made: list[Path]
    """The folders that were made for it, innermost first."""
    found: set[str]
    """The names that were in the folder before."""


def lock(folder: Path, *, required: bool, files: Collection[str] | None = None) -> Lock:
    """Locks a folder of jaxlm, made if missing; the kernel frees the lock when its holder dies.

    Args:
      folder: the folder.
      required: raise where the file system has no locks; else warn, and go on without.
      files: as in `check_ours`.

    Returns:
      The lock, for `unlock`.

    Raises:
      ValueError: jaxlm did not make the folder.
      RuntimeError: another process has the lock, the file system has no locks, or the folder cannot
        be written.
    """
    check_ours(folder, files)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    try:
        return Lock(folder, _lock(folder, required), made, found)
    except (OSError, RuntimeError):
        _remove_empty(made)
        raise


def _lock(folder: Path, required: bool) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunError(
            f"{folder} is in use by another trainer ({describe_holder(folder)}); wait for it, stop "
            "it, or start a new run with --run_dir"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        text = f"{folder} is on a file system without locks ({error.strerror})"
        if required:
            os.close(descriptor)
            raise RunError(
                f"{text}: a second trainer there could not be kept out. Choose another "
                "--checkpoint_dir, or make sure of that yourself and add "
                "--checkpoint.lock if_possible"
            ) from error
        _log.warning(f"{text}: see to it that there is no second trainer")
    _held.add(descriptor)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.ctime()}
    try:
        mark(folder)
        write_file(folder / HOLDER, json.dumps(holder).encode())
    except OSError as error:
        _free(descriptor)
        raise _not_writable(folder, error) from error
    return descriptor


def unlock(held: Lock) -> None:
    """Frees the lock, and removes what `lock` made if nothing else was written."""
    with contextlib.suppress(OSError):  # The disk may be read-only by now, or the folder deleted.
        if os.path.samestat(held.folder.stat(), os.fstat(held.descriptor)):
            (held.folder / HOLDER).unlink(missing_ok=True)
            made = {path.name for path in held.folder.iterdir()} - held.found
            if made == {MARKER}:
                (held.folder / MARKER).unlink()
                _remove_empty(held.made)
    _free(held.descriptor)


@contextlib.contextmanager
def locked(folder: Path, *, required: bool, files: Collection[str] | None = None) -> Iterator[None]:
    """Holds the lock while in context; arguments and errors are those of `lock`."""
    held = lock(folder, required=required, files=files)
    try:
        yield
    finally:
        unlock(held)


def _free(descriptor: int) -> None:
    _held.remove(descriptor)
    os.close(descriptor)


def _remove_empty(made: list[Path]) -> None:
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir()


def _not_writable(folder: Path, error: OSError) -> RuntimeError:
    return RunError(
        f"{folder} cannot be written ({error.strerror}); look at its disk, or choose another "
        "--run_dir"
    )


def describe_holder(folder: Path) -> str:
    """Host, process and start time of the lock's holder, as far as known."""
    try:
        holder = read_json(folder / HOLDER, _Holder)
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (OSError, ValueError):
        return "holder unknown"
