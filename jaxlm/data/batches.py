"""Rows of sources -> batch n: a pure function of (tokens, mixture, seed, n).

Dims: B batch, T time. Row r of a run is row r % B of batch r // B. The mixture maps it to row q of
a source, and the source's order maps q to a row of its tokens.
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
from jaxlm.data.order import Order
from jaxlm.data.packing import RowReader
from jaxlm.data.shards import TokenShards
from jaxlm.errors import InputError

X = TypeVar("X")


class TrainBatches:
    """Training batches: endless passes over the rows of each source, reshuffled each time."""

    def __init__(
        self,
        sources: Mapping[str, RowReader],
        mixture: Mixture,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        """`sources` has those of the mixture's rows from now on; others may be gone."""
        for name, rows in sources.items():
            if not rows.sizes[-1]:
                raise InputError(
                    f"corpus {name}: {rows.num_tokens:,} training tokens, and one window of "
                    f"seq_len {rows.seq_len:,} takes {rows.seq_len + 1:,}: give it more text, a "
                    "larger weight or data.max_tokens, or lower seq_len"
                )
        self._sources, self._mixture, self._batch_size = sources, mixture, batch_size
        self._orders = {
            name: Order(rows.sizes, mixture.growth(name), seed_of(seed, name))
            for name, rows in sources.items()
        }

    def __call__(self, index: int, rows: slice = slice(None)) -> dict[str, np.ndarray]:
        """Rows of batch `index`: inputs and targets, int32 [rows, T]; if packed, the mask too."""
        numbers = np.arange(self._batch_size, dtype=np.int64)[rows] + index * self._batch_size
        of_sources = self._mixture.split(numbers)
        if gone := of_sources.keys() - self._sources.keys():
            raise InputError(
                f"data.sources: found none named {', '.join(sorted(gone))}, and batch {index} has "
                "rows of it; name it, with weight 0 if it is not to be trained on any more"
            )
        parts = [
            (own, *self._sources[name].read(self._orders[name].place(row)[1]))
            for name, (own, row) in of_sources.items()
        ]
        if len(parts) == 1:  # a copy would take two thirds of the time again
            _, tokens_BT, mask_BT = parts[0]
        else:
            seq_len = next(iter(self._sources.values())).seq_len
            tokens_BT = np.empty((len(numbers), seq_len + 1), np.int32)
            has_mask = any(mask is not None for _, _, mask in parts)
            mask_BT = np.empty((len(numbers), seq_len), np.float32) if has_mask else None
            for own, tokens, mask in parts:
                tokens_BT[own] = tokens
                if mask_BT is not None:
                    mask_BT[own] = mask
        batch = {"inputs": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]}
        return batch if mask_BT is None else {**batch, "loss_mask": mask_BT}

    def times(self, name: str, num_steps: int) -> list[float]:
        """How often so many steps go through what each stage has added to a source."""
        taken = self._mixture.rows_before(name, num_steps * self._batch_size)
        return self._orders[name].times(self._sources[name].sizes, taken)

    def locate(self, index: int, row: int) -> tuple[str, int, int]:
        """Source, pass and row of the source of a row of batch `index`."""
        ((name, (_, rows)),) = self._mixture.split(
            np.array([index * self._batch_size + row])
        ).items()
        epoch, place = self._orders[name].place(rows)
        return name, int(epoch[0]), int(place[0])


def seed_of(seed: int, name: str) -> int:
    """The seed of a source's shuffles, so that equal sources have different orders."""
    if name == MAIN:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8])


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
