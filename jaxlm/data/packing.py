"""Tokens of a source -> its rows: windows of consecutive tokens, or whole documents.

Dims: B rows of a batch, T time, R rows of a source, P pieces of documents.
"""

import bisect
import contextlib
import logging
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import google_crc32c
import numpy as np

from jaxlm.data.dataset import Dataset, digest
from jaxlm.data.shards import TokenShards
from jaxlm.files.durable import write_file

_log = logging.getLogger(__name__)

# Tokens that are packed as one group; the memory for a plan grows with it.
_GROUP_TOKENS = 2**25

Packing = Literal["windows", "documents"]


class RowReader(Protocol):
    """The rows of a source, in the order of its tokens."""

    seq_len: int
    num_tokens: int
    sizes: list[int]
    """Rows of each stage of the data; the last is the number of all."""
    padding: float
    """Share of the targets that are padding (0 to 1)."""

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens int32 [B, T+1] of these rows, and the mask float32 [B, T] of their targets."""
        ...

    def ranges(self, row: int) -> list[tuple[int, int]]:
        """Positions of the tokens that a row takes in: (first, last plus one) of each part."""
        ...


class Windows:
    """Row w holds tokens w*T to w*T + T, so each token but the first is a target once."""

    padding = 0.0

    def __init__(self, tokens: TokenShards, seq_len: int, stages: list[int] | None = None):
        """`stages` are the numbers of tokens after each stage; by default, one has all."""
        self._tokens, self.seq_len, self.num_tokens = tokens, seq_len, tokens.num_tokens
        counts = stages or [tokens.num_tokens]
        self.sizes = [max(count - 1, 0) // seq_len for count in counts]

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """As in `RowReader`; no target is padding."""
        return self._tokens.windows(rows * self.seq_len, self.seq_len + 1), None

    def ranges(self, row: int) -> list[tuple[int, int]]:
        """As in `RowReader`."""
        return [(row * self.seq_len, (row + 1) * self.seq_len)]


class Plan(NamedTuple):
    """Which pieces of documents lie in which row."""

    first: np.ndarray
    """First piece of each row, and the number of pieces: int64 [R+1]."""
    start: np.ndarray
    """Position of each piece's first token: int64 [P]."""
    length: np.ndarray
    """Tokens of each piece: int64 [P]; negative if it continues a document of another row."""
    sizes: list[int]
    """Rows after each stage."""


class Packed:
    """Rows of whole documents, one after the other, then padding.

    A document of more than T + 1 tokens has full rows of its own, and its last piece is packed.
    Each token is a target once, except for the first of a document that begins a row.
    """

    def __init__(self, tokens: TokenShards, seq_len: int, plan: Plan, eos_id: int):
        self._tokens, self._plan, self._eos_id = tokens, plan, eos_id
        self.seq_len, self.num_tokens, self.sizes = seq_len, tokens.num_tokens, plan.sizes
        # No targets: the first token of a row, and that of a piece that continues a document.
        continues, num_rows = plan.length < 0, plan.sizes[-1]
        inside = continues.sum() - continues[plan.first[:-1]].sum()
        targets = int(np.abs(plan.length).sum() - num_rows - inside)
        self.padding = 1 - targets / (num_rows * seq_len)

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """As in `RowReader`."""
        first, start, length, _ = self._plan
        tokens_BT = np.full((len(rows), self.seq_len + 1), self._eos_id, np.int32)
        mask_BT = np.zeros((len(rows), self.seq_len + 1), np.float32)
        for row, tokens_T, mask_T in zip(rows.tolist(), tokens_BT, mask_BT, strict=True):
            at = 0
            for piece in range(int(first[row]), int(first[row + 1])):
                begin, size = int(start[piece]), abs(int(length[piece]))
                tokens_T[at : at + size] = self._tokens.read(begin, begin + size)
                mask_T[at + (length[piece] < 0) : at + size] = 1
                at += size
        return tokens_BT, mask_BT[:, 1:]

    def ranges(self, row: int) -> list[tuple[int, int]]:
        """As in `RowReader`."""
        pieces = slice(int(self._plan.first[row]), int(self._plan.first[row + 1]))
        starts, lengths = self._plan.start[pieces], np.abs(self._plan.length[pieces])
        return [(int(a), int(a + n)) for a, n in zip(starts, lengths, strict=True)]


def open_rows(dataset: Dataset, seq_len: int, packing: Packing) -> RowReader:
    """The rows of a dataset's training tokens; a plan of packing is kept beside the dataset."""
    if packing == "windows":
        return Windows(dataset.train, seq_len, dataset.stages)
    path = Path(f"{dataset.directory}.packed-{seq_len}")
    identity = int(digest([dataset.fingerprint, seq_len])[:15], 16)
    plan = _read_plan(path, identity)
    if plan is None:
        _log.info(f"Packing the documents of {dataset.source} into rows of {seq_len} tokens, once")
        plan = make_plan(dataset.train.ends(dataset.eos_id), dataset.stages, seq_len)
        with contextlib.suppress(OSError):  # a read-only cache or a full disk: made again each time
            write_file(path, _to_bytes(plan, identity))
    return Packed(dataset.train, seq_len, plan, dataset.eos_id)


def make_plan(ends: np.ndarray, stages: list[int], seq_len: int) -> Plan:
    """Packs documents, each stage by itself, in groups of some millions of tokens.

    A document that is cut between two stages is a document in each. Changing what this returns
    changes the batches of runs: bump `jaxlm.checkpoints.metadata.FORMAT`.

    Args:
      ends: position after the last token of each document, int64, ascending.
      stages: number of tokens after each stage.
      seq_len: targets of a row.
    """
    parts, sizes = list[Plan](), list[int]()
    num_rows, begin = 0, 0
    for end in stages:
        inside = ends[np.searchsorted(ends, begin, "right") : np.searchsorted(ends, end)]
        edges = np.concatenate([[begin], inside, [end]]).astype(np.int64)
        groups = (edges[:-1] - begin) // _GROUP_TOKENS
        borders = np.flatnonzero(np.diff(groups)) + 1
        for documents in np.split(np.arange(len(groups)), borders):
            start, length = _pieces(edges[documents], edges[documents + 1], seq_len)
            row = best_fit(np.abs(length), seq_len + 1)
            order = np.argsort(row, kind="stable")
            first = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 1))
            parts.append(Plan(first, start[order], length[order], []))
            num_rows += len(first)
        sizes.append(num_rows)
        begin = end
    counts = np.cumsum([0, *(len(part.start) for part in parts)])
    first = [part.first + count for part, count in zip(parts, counts[:-1], strict=True)]
    return Plan(
        np.concatenate([*first, counts[-1:]]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.length for part in parts]),
        sizes,
    )


def _pieces(begin: np.ndarray, end: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    # Start and length of the pieces of documents, one after the other. Piece k of a long document
    # begins with the last token of piece k - 1.
    counts = np.maximum(-(-(end - begin - 1) // seq_len), 1)
    of = np.repeat(np.arange(len(begin)), counts)
    number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = begin[of] + number * seq_len
    length = np.minimum(end[of] - start, seq_len + 1)
    return start, np.where(number > 0, -length, length)


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The row of each item: the longest first, each where the least room is left that holds it.

    Best-fit decreasing, as in Ding et al., "Fewer Truncations Improve Language Modeling" (2024).

    Args:
      lengths: of the items, 1 to `room`, [P].
      room: of a row.

    Returns:
      int64 [P]; rows are numbered from 0 without a gap.
    """
    rows_with: list[list[int]] = [[] for _ in range(room + 1)]
    rooms = list[int]()  # what is left in the rows, each number once, ascending
    row_of, num_rows = np.empty(len(lengths), np.int64), 0
    order = np.argsort(-lengths, kind="stable")
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, left, num_rows = num_rows, room - length, num_rows + 1
        else:
            row, left = rows_with[rooms[at]].pop(), rooms[at] - length
            if not rows_with[rooms[at]]:
                del rooms[at]
        row_of[item] = row
        if left and not rows_with[left]:
            bisect.insort(rooms, left)
        rows_with[left].append(row)
    return row_of


def _to_bytes(plan: Plan, identity: int) -> bytes:
    sizes = [identity, len(plan.sizes), len(plan.first), len(plan.start), *plan.sizes]
    data = np.concatenate([np.array(sizes), *plan[:3]]).astype("<i8").tobytes()
    return data + np.array(google_crc32c.value(data), "<i8").tobytes()


def _read_plan(path: Path, identity: int) -> Plan | None:
    # None if the plan is missing, damaged or of other data. In memory: a run may outlive the file.
    if not path.exists():
        return None
    content = path.read_bytes()
    data = np.frombuffer(content[: len(content) // 8 * 8], "<i8")
    sound = len(data) > 5 and google_crc32c.value(content[:-8]) == data[-1]
    if not sound or data[0] != identity:
        _log.warning(f"{path} is damaged; it is made again")
        return None
    stages, *counts = data[1:4].tolist()
    parts = np.split(data[4:-1], np.cumsum([stages, *counts]))
    return Plan(parts[1], parts[2], parts[3], parts[0].tolist())
