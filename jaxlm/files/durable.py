"""Atomic writes: after a kill or a power cut, a file is complete or absent."""

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c

from jaxlm.errors import InputError, RunError

NO_ANSWER = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""Errnos of storage that does not respond; the file may be intact."""
_MAX_NAME_BYTES = 255
"""Longest file name on ext4, XFS, APFS and NFS."""
_MAX_PATH_BYTES = 4096
"""Linux PATH_MAX, with the terminating NUL."""


class DiskError(RunError):
    """A disk or its server does not respond; the file may be intact."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError of storage that does not respond into `DiskError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ANSWER:
            raise
        raise no_answer(path, str(error.strerror)) from error


def no_answer(path: Path, reason: str) -> DiskError:
    """The `DiskError` of a file that cannot be read."""
    return DiskError(
        f"{path} cannot be read ({reason}), and may be sound: it was left as it is. "
        "Look at its disk, then start again"
    )


def fsync(path: Path) -> None:
    """Flushes a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file atomically.

    Raises:
      OSError: the write failed and the old file is intact; if only the fsync of the folder failed,
        the new file is in place.
    """
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes`.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is larger or not regular; a FIFO would block the reader.
      DiskError: the disk does not respond.
    """
    with reading(path):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: not a file")
        if found.st_size > max_bytes:
            raise InputError(f"{path}: {found.st_size:,} bytes, expected at most {max_bytes:,}")
        return path.read_bytes()


def crc32c(
    path: Path, chunk_bytes: int = 1 << 22, rest: Callable[[float], None] = lambda _: None
) -> int:
    """The checksum of a file's content, read in chunks.

    Args:
      path: the file.
      chunk_bytes: size of a chunk.
      rest: called after each chunk with the seconds that it took.

    Raises:
      OSError: the file cannot be read.
      DiskError: the disk does not respond.
    """
    checksum = google_crc32c.Checksum()
    with reading(path), path.open("rb", buffering=0) as file:
        started_s = time.monotonic()
        while chunk := file.read(chunk_bytes):
            checksum.update(chunk)
            rest(time.monotonic() - started_s)
            started_s = time.monotonic()
    return int.from_bytes(checksum.digest(), "big")


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; files deleted meanwhile are left out."""
    num_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                num_bytes += os.lstat(os.path.join(parent, name)).st_size
    return num_bytes


def free_path(path: Path) -> Path:
    """The path, or the first of `PATH-2`, `PATH-3`, … that does not exist."""
    found, number = path, 2
    while found.exists():
        found, number = path.with_name(f"{path.name}-{number}"), number + 1
    return found


def link(source: str, target: str) -> None:
    """Hard-links a file that is never written again; copies it on a disk without links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def expand(path: str, what: str) -> str:
    """A path given by a user, with `~` expanded.

    Args:
      path: of a file or folder that need not exist.
      what: name of the setting, flag or argument, for the message.

    Raises:
      ValueError: the path, or a name in it, is longer than file systems allow.
    """
    if (num_bytes := len(os.fsencode(path))) >= _MAX_PATH_BYTES:
        raise InputError(
            f"{what}: found a path of {num_bytes} bytes ({path[:20]}…), expected fewer than "
            f"{_MAX_PATH_BYTES}; choose a shorter one"
        )
    for name in path.split("/"):
        if (num_bytes := len(os.fsencode(name))) > _MAX_NAME_BYTES:
            raise InputError(
                f"{what}: found a name of {num_bytes} bytes ({name[:20]}…), expected "
                f"{_MAX_NAME_BYTES} at most; choose a shorter one"
            )
    return os.path.expanduser(path)


def check_output_path(path: Path) -> Path:
    """The `--out` path, with `~` expanded.

    Raises:
      ValueError: the path is too long, in a missing folder, a symlink, or no regular file.
    """
    path = Path(expand(str(path), "--out"))
    expand(f".{path.name}.tmp", "--out")  # `write_file` writes under this name first.
    # A rename would replace a device or a pipe.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"--out: found {path}, which is no plain file; name another")
    if not path.parent.is_dir():
        raise InputError(f"--out: found no folder {path.parent}, expected one; make it first")
    return path
