"""Token shards -> batch n: a pure function of (tokens, mixture, seed, n).

Axes: B batch, T time, W windows of an epoch. Window w of a source holds its tokens w*T to w*T + T;
its last token is also the first of the next window, so each token but the first is a target once an
epoch. Row r of a run is row r % B of batch r // B. The mixture maps row r to row q of a source,
which holds window permutation(q % W) of the source's epoch q // W.
"""

import collections
import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from jaxlm.config import MAIN
from jaxlm.data.mixture import Mixture
from jaxlm.data.shards import TokenShards
from jaxlm.errors import InputError

X = TypeVar("X")

_ROUNDS = 8  # With 6, the shuffles of a handful of windows are measurably uneven.


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


class TrainBatches:
    """Training batches: endless passes over the windows of each source, reshuffled each epoch."""

    def __init__(
        self,
        sources: Mapping[str, TokenShards],
        mixture: Mixture,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
    ) -> None:
        """`sources` has those of the mixture's rows from now on; others may be gone."""
        for name, tokens in sources.items():
            if tokens.num_tokens < seq_len + 1:
                raise InputError(
                    f"corpus {name}: {tokens.num_tokens:,} training tokens, and one window of "
                    f"seq_len {seq_len:,} takes {seq_len + 1:,}: give it more text, a "
                    "larger weight or data.max_tokens, or lower seq_len"
                )
        self._sources, self._mixture = sources, mixture
        self._batch_size, self._seq_len = batch_size, seq_len
        self._seeds = {name: seed_of(seed, name) for name in sources}

    def __call__(self, index: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Rows of batch `index`: inputs and targets, each int32 [rows, T]."""
        numbers = np.arange(self._batch_size, dtype=np.int64)[rows] + index * self._batch_size
        of_sources = self._mixture.split(numbers)
        if gone := of_sources.keys() - self._sources.keys():
            raise InputError(
                f"data.sources: found none named {', '.join(sorted(gone))}, and batch {index} has "
                "rows of it; name it, with weight 0 if it is not to be trained on any more"
            )
        parts = [(own, self._windows(name, row)) for name, (own, row) in of_sources.items()]
        if len(parts) == 1:  # a copy would take two thirds of the time again
            tokens_BT = parts[0][1]
        else:
            tokens_BT = np.empty((len(numbers), self._seq_len + 1), np.int32)
            for own, windows in parts:
                tokens_BT[own] = windows
        return {"inputs": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]}

    def locate(self, index: int, row: int) -> tuple[str, int, int]:
        """Source, epoch and window of a row of batch `index`."""
        ((name, (_, rows)),) = self._mixture.split(
            np.array([index * self._batch_size + row])
        ).items()
        epoch, window = self._shuffled(name, rows)
        return name, int(epoch[0]), int(window[0])

    def _windows(self, name: str, row: np.ndarray) -> np.ndarray:
        _, window = self._shuffled(name, row)
        return self._sources[name].windows(window * self._seq_len, self._seq_len + 1)

    def _shuffled(self, name: str, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Epoch and window of rows of a source.
        num_windows = windows_per_epoch(self._sources[name], self._seq_len)
        epoch, place = np.divmod(row, num_windows)
        window = np.empty_like(place)
        for value in np.unique(epoch):
            here = epoch == value
            window[here] = permute(place[here], num_windows, self._seeds[name], int(value))
        return epoch, window


def seed_of(seed: int, name: str) -> int:
    """The seed of a source's shuffles, so that equal sources have different orders."""
    if name == MAIN:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8])


def windows_per_epoch(tokens: TokenShards, seq_len: int) -> int:
    """Number of windows in one pass over the tokens."""
    return (tokens.num_tokens - 1) // seq_len


class EvalBatches:
    """The whole held-out set, once and in order; missing rows of the last batch are masked."""

    def __init__(
        self,
        tokens: TokenShards,
        *,
        batch_size: int,
        seq_len: int,
        fingerprint: str = "",
        num_bytes: int | None = None,
    ) -> None:
        self.fingerprint, self.num_bytes = fingerprint, num_bytes
        if tokens.num_tokens < 2:
            raise InputError(
                f"held-out set: {tokens.num_tokens} tokens, and an eval takes at least 2: "
                "give it more text, or raise data.eval_tokens"
            )
        self.num_targets = tokens.num_tokens - 1
        self._tokens, self._batch_size, self._seq_len = tokens, batch_size, seq_len

    def __len__(self) -> int:
        return -(-self.num_targets // (self._batch_size * self._seq_len))

    def __call__(self, index: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Rows of batch `index`: inputs, targets (int32) and loss_mask (float32), [rows, T]."""
        if not 0 <= index < len(self):
            raise IndexError(f"eval batch {index}: there are {len(self)}")
        size = self._batch_size * self._seq_len
        start = index * size
        count = min(self.num_targets - start, size)
        tokens = self._tokens.read(start, start + count + 1).astype(np.int32)
        mask = np.ones(count, np.float32)
        batch = {"inputs": tokens[:-1], "targets": tokens[1:], "loss_mask": mask}
        padded = {name: np.pad(array, (0, size - count)) for name, array in batch.items()}
        return {name: array.reshape(-1, self._seq_len)[rows] for name, array in padded.items()}


Rows = Callable[[int, slice], dict[str, np.ndarray]]


def recorded(batches: Rows, path: str | None) -> Rows:
    """`batches`, with the SHA-256 of each result appended to a file, one JSON object a line.

    The keys are `batch` (the index), `rows` (first, and last plus one) and `sha256`. Without a
    path, returns `batches` unchanged.
    """
    if path is None:
        return batches

    def give(index: int, rows: slice) -> dict[str, np.ndarray]:
        batch = batches(index, rows)
        sha256 = hashlib.sha256()
        for name in sorted(batch):
            sha256.update(name.encode() + batch[name].tobytes())
        row = {"batch": index, "rows": [rows.start, rows.stop], "sha256": sha256.hexdigest()}
        with open(path, "ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")
        return batch

    return give


def prefetch(
    make: Callable[[int], X], start: int, stop: int, depth: int
) -> Generator[tuple[int, X], None, None]:
    """Yields (n, make(n)) for n in range(start, stop), made up to `depth` ahead on a host thread.

    An error of `make` is raised here, in its turn. The thread ends when the iterator is exhausted
    or closed.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        pending = collections.deque(
            pool.submit(make, index) for index in range(start, min(start + depth, stop))
        )
        for index in range(start, stop):
            item = pending.popleft().result()
            if index + depth < stop:
                pending.append(pool.submit(make, index + depth))
            yield index, item
    finally:
        pool.shutdown(cancel_futures=True)
