"""Token shards: files of little-endian token ids, each known by its size and its crc32c."""

import errno
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import google_crc32c
import numpy as np

from jaxlm.durable import crc32c, write_file
from jaxlm.strict import shown


class Record(TypedDict):
    """What a file held when it was written."""

    name: str
    num_bytes: int
    crc32c: int


class Shard(Record):
    """A record of token ids."""

    num_tokens: int


def write_durably(path: Path, data: bytes) -> Record:
    """Writes a file that is, after a kill at any instant, whole or absent.

    Raises:
      OSError: the disk is full, or a quota is; nothing is left of the file.
    """
    try:
        write_file(path, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno,
            f"{error.strerror} while writing {len(data):,} bytes ({free:,} free): make room, or "
            "name another place with --data.cache-dir or JAXLM_CACHE. What was finished is kept, "
            "and the same command goes on from there",
            str(path),
        ) from error
    return {"name": path.name, "num_bytes": len(data), "crc32c": google_crc32c.value(data)}


def damage(folder: Path, record: Record) -> str | None:
    """How a file differs from its record, or None if it does not; reads all of it."""
    path = folder / record["name"]
    if not re.fullmatch(r"[\w-][\w.-]{,99}", record["name"]):
        return f"{shown(record['name'])} is not the name of a file in it"
    if not path.is_file():
        return f"{path.name} is missing"
    found = path.stat().st_size
    if found != record["num_bytes"]:
        return f"{path.name} has {found:,} bytes, expected {record['num_bytes']:,}"
    crc = crc32c(path)
    if crc != record["crc32c"]:
        return f"{path.name} has crc32c {crc:08x}, expected {record['crc32c']:08x}"
    return None


class TokenShards:
    """The tokens of one split, memory-mapped; positions count over all its shards."""

    def __init__(self, paths: Sequence[Path], dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self._arrays = [np.memmap(path, self.dtype, "r") for path in paths]
        self._ends = np.cumsum([len(array) for array in self._arrays], dtype=np.int64)
        self.num_tokens = int(self._ends[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1.

        Raises:
          IndexError: they are not all there.
        """
        if not 0 <= start < stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop}: expected within 0 to {self.num_tokens}")
        parts = []
        for shard in range(np.searchsorted(self._ends, start, side="right"), len(self._ends)):
            offset = int(self._ends[shard]) - len(self._arrays[shard])
            parts.append(self._arrays[shard][max(start - offset, 0) : stop - offset])
            if stop <= self._ends[shard]:
                break
        return np.concatenate(parts)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of `length` tokens from each of the B starts: int32 [B, length]."""
        tokens = np.empty((len(starts), length), np.int32)
        # A copy per window: faster than one fancy index over all positions.
        for row, start in zip(tokens, starts.tolist(), strict=True):
            row[:] = self.read(start, start + length)
        return tokens
