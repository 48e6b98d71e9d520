"""The order of a source's rows in a run: shuffled passes, each of which holds each row once."""

import itertools
from collections.abc import Sequence

import numpy as np

_ROUNDS = 8  # With 6, the shuffles of a handful of rows are measurably uneven.


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): uint64 -> uint64, wrapping."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The images of indices under a pseudo-random permutation of range(size), by (seed, epoch).

    A Feistel network permutes the smallest range of 4^k numbers that holds `size`; an image outside
    is permuted again until it is inside ("cycle walking": Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", 2002). O(1) in memory and time for any size.

    Args:
      indices: integers in range(size), [N].
      size: at most 2^62.
      seed: of the run.
      epoch: from 0.

    Returns:
      int64 [N].
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    words = np.array([seed % 2**64, epoch % 2**64], np.uint64)
    key = _mix(_mix(words[:1]) ^ words[1:])
    keys = _mix(key + np.arange(_ROUNDS, dtype=np.uint64))

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return (left << half) | right

    x = network(np.asarray(indices, np.uint64))
    while (outside := x >= np.uint64(size)).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)


class Order:
    """Endless passes over the rows of a source, reshuffled each time.

    A source that grows during a run ends its pass; then come the new rows, then passes over all.
    """

    def __init__(self, sizes: Sequence[int], growth: Sequence[tuple[int, int]], seed: int):
        """Computes the passes; no row is made.

        Args:
          sizes: number of rows that the source has after each stage of its growth.
          growth: (row of the run, numbered within this source; stages that it has from there on),
            from row 0 on.
          seed: of the source.
        """
        # First row of the run, and the rows of the source that it passes through from there on.
        ranges = list[tuple[int, int, int]]()
        for row, stages in growth:
            size = sizes[stages - 1]
            begun = [one for one in ranges if one[0] < row]
            if not begun:
                ranges = [(0, 0, size)]
            elif size != ranges[-1][2]:
                # Finish the pass, then the new rows once, then all.
                first, low, high = begun[-1]
                end = first - (first - row) // (high - low) * (high - low)
                ranges = [*begun, (end, high, size), (end + size - high, 0, size)]
        self._first, self._low, high = np.array(ranges).T
        self._size, self._seed = high - self._low, seed
        passes = np.diff(self._first) // self._size[:-1]
        self._epoch = np.concatenate([[0], np.cumsum(passes)])

    def times(self, sizes: Sequence[int], num_rows: int) -> list[float]:
        """How often the first rows of the run go through the rows that each stage has added."""
        ends = np.append(self._first[1:], np.iinfo(np.int64).max)
        counts = np.clip(num_rows, self._first, ends) - self._first
        high = self._low + self._size
        inside = [
            (self._low <= start) & (stop <= high) for start, stop in itertools.pairwise([0, *sizes])
        ]
        return [float((counts / self._size)[here].sum()) for here in inside]

    def place(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pass, and row of the source, of rows of the run in this source: each int64 [N]."""
        part = np.searchsorted(self._first, rows, side="right") - 1
        epoch, place = np.divmod(rows - self._first[part], self._size[part])
        epoch, found = epoch + self._epoch[part], np.empty_like(place)
        for value in np.unique(epoch):
            here = epoch == value
            of_pass = part[here][0]
            shuffled = permute(place[here], int(self._size[of_pass]), self._seed, int(value))
            found[here] = self._low[of_pass] + shuffled
        return epoch, found
