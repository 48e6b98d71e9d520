"""Files that are, after a kill or a power cut at any instant, whole or absent."""

import os
import stat
from pathlib import Path

import google_crc32c


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
      ValueError: it is no regular file (a pipe, a device, a folder), or larger.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a file")
    if found.st_size > max_bytes:
        raise ValueError(f"{found.st_size:,} bytes, expected at most {max_bytes:,}")
    return path.read_bytes()


def crc32c(path: Path, chunk_bytes: int = 1 << 22) -> int:
    """The checksum of a file's content, read in chunks."""
    checksum = google_crc32c.Checksum()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(chunk_bytes):
            checksum.update(chunk)
    return int.from_bytes(checksum.digest(), "big")
