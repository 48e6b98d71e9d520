"""Token shards: memory-mapped files of little-endian token ids."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_CHUNK_TOKENS = 1 << 22


def map_tokens(
    path: Path, dtype: Any, offset: int = 0, num_tokens: int | None = None
) -> np.ndarray:
    """The tokens of a file, from a byte on; all that follow by default."""
    shape = None if num_tokens is None else (num_tokens,)
    # A plain array over the mapped file: a slice of an `np.memmap` costs ten times as much.
    return np.asarray(np.memmap(path, np.dtype(dtype), "r", offset, shape))


class TokenShards:
    """The tokens of one split; positions count over all its arrays."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.dtype = arrays[0].dtype if arrays else np.dtype("<u2")
        self._arrays = list(arrays)
        self._ends = np.cumsum([len(array) for array in self._arrays], dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if arrays else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop - 1.

        Raises:
          IndexError: the range reaches beyond the tokens.
        """
        if not 0 <= start < stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop}: expected within 0 to {self.num_tokens}")
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        parts = []
        for shard in range(first, last + 1):
            offset = int(self._ends[shard]) - len(self._arrays[shard])
            parts.append(self._arrays[shard][max(start - offset, 0) : stop - offset])
        return np.concatenate(parts)

    def chunks(self, overlap: int = 0) -> Iterator[np.ndarray]:
        """All tokens in order, some millions at a time; each chunk has the first of the next too.

        Args:
          overlap: how many tokens of the next chunk.
        """
        for start in range(0, self.num_tokens, _CHUNK_TOKENS):
            yield self.read(start, min(start + _CHUNK_TOKENS + overlap, self.num_tokens))

    def ends(self, eos_id: int) -> np.ndarray:
        """Position after each EOS, by a scan of all tokens: int64, ascending."""
        found, start = [np.empty(0, np.int64)], 0
        for chunk in self.chunks():
            found.append(np.flatnonzero(chunk == eos_id) + start + 1)
            start += len(chunk)
        return np.concatenate(found)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Windows of `length` tokens from each of the B starts: int32 [B, length]."""
        tokens = np.empty((len(starts), length), np.int32)
        shards = np.searchsorted(self._ends, starts, side="right").tolist()
        offsets = [0, *self._ends.tolist()]
        # A copy per window: faster than one fancy index over all positions.
        for row, start, shard in zip(tokens, starts.tolist(), shards, strict=True):
            first = start - offsets[shard]
            inside = self._arrays[shard][first : first + length]
            row[:] = inside if len(inside) == length else self.read(start, start + length)
        return tokens
