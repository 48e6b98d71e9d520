"""Files that are, after a kill or a power cut at any instant, whole or absent."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

from jaxlm.errors import InputError, RunError

NO_ANSWER = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
"""What says nothing about a file but that it cannot be had now."""
_MAX_NAME_BYTES = 255
"""Of a file's name: ext4, XFS, APFS and NFS take no more."""
_MAX_PATH_BYTES = 4096
"""Of a path: Linux takes one byte less."""


class DiskError(RunError):
    """A disk or its server gives no answer about a file, which may be sound for all we know."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises `DiskError` where the disk gives no answer."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ANSWER:
            raise
        raise no_answer(path, str(error.strerror)) from error


def no_answer(path: Path, reason: str) -> DiskError:
    """The error to raise."""
    return DiskError(
        f"{path} cannot be read ({reason}), and may be sound: it was left as it is. "
        "Look at its disk, then start again"
    )


def fsync(path: Path) -> None:
    """Puts a file or a folder on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file as a whole.

    Raises:
      OSError: it could not be written; the old file is as it was, and nothing is left of the new.
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
    """All of a file that is not too large; nothing that would have to be waited for.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no regular file (a pipe, a device, a folder), or larger; names it.
      DiskError: the disk gives no answer.
    """
    with reading(path):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: not a file")
        if found.st_size > max_bytes:
            raise InputError(f"{path}: {found.st_size:,} bytes, expected at most {max_bytes:,}")
        return path.read_bytes()


def crc32c(path: Path, chunk_bytes: int = 1 << 22) -> int:
    """The checksum of a file's content, read in chunks.

    Raises:
      OSError: it cannot be read.
      DiskError: the disk gives no answer.
    """
    checksum = google_crc32c.Checksum()
    with reading(path), path.open("rb", buffering=0) as file:
        while chunk := file.read(chunk_bytes):
            checksum.update(chunk)
    return int.from_bytes(checksum.digest(), "big")


def folder_bytes(folder: Path) -> int:
    """The size of the files in a folder, without those that go while we look."""
    num_bytes = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                num_bytes += os.lstat(os.path.join(parent, name)).st_size
    return num_bytes


def free_path(path: Path) -> Path:
    """The path, or the first of `PATH-2`, `PATH-3`, … that is not there yet."""
    found, number = path, 2
    while found.exists():
        found, number = path.with_name(f"{path.name}-{number}"), number + 1
    return found


def link(source: str, target: str) -> None:
    """A hard link to a file that is never written again; a copy, where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def expand(path: str, what: str) -> str:
    """A path as a person gives it, with the home folder in the place of `~`.

    Args:
      path: of a file or folder that may not be there yet.
      what: the setting, flag or argument that it is of, for the message.

    Raises:
      ValueError: it, or a name in it, is longer than file systems take.
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


def check_out(path: Path) -> Path:
    """The path with `~` as the home folder.

    Raises:
      ValueError: no file can be written, or replaced, under this name.
    """
    path = Path(expand(str(path), "--out"))
    expand(f".{path.name}.tmp", "--out")  # the name that the file has while it is written
    # A device or a pipe would be replaced as well.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"--out: found {path}, which is no plain file; name another")
    if not path.parent.is_dir():
        raise InputError(f"--out: found no folder {path.parent}, expected one; make it first")
    return path
