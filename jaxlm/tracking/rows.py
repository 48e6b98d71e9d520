"""Length and checksum of metrics.jsonl, kept in each checkpoint to detect lost or changed rows."""

import dataclasses
from pathlib import Path

import google_crc32c

from jaxlm.errors import InputError
from jaxlm.files.durable import read_file

NAME = "metrics.jsonl"
CORRUPT = ".corrupt"
"""Suffix of a damaged metrics.jsonl."""
MAX_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Rows:
    """Length and checksum of the rows before a checkpoint, and the gaps in them."""

    num_bytes: int = 0
    crc32c: int = 0
    gaps: list[list[int]] = dataclasses.field(default_factory=list)
    """[a, b]: the rows after step a, up to step b, were lost."""

    def __post_init__(self) -> None:
        if self.num_bytes < 0 or any(len(gap) != 2 for gap in self.gaps):
            raise InputError(f"rows: found {self}, expected 0 bytes or more, and gaps of two steps")

    def then(self, data: bytes) -> "Rows":
        """Length and checksum of these rows with `data` appended."""
        return dataclasses.replace(
            self,
            num_bytes=self.num_bytes + len(data),
            crc32c=google_crc32c.extend(self.crc32c, data),
        )

    def begin(self, content: bytes) -> bool:
        """Whether the content begins with exactly these rows."""
        start = content[: self.num_bytes]
        return len(start) == self.num_bytes and google_crc32c.value(start) == self.crc32c

    @property
    def lacking(self) -> str:
        """The lost rows as text; empty if none were lost."""
        return ", ".join(f"the rows after step {a} up to step {b}" for a, b in self.gaps)


def longest_proven(content: bytes, proofs: dict[int, Rows]) -> tuple[int, Rows]:
    """The checkpoint with the longest rows that `content` still begins with: its step and rows.

    Step 0 and no rows, if `content` begins with those of no checkpoint.
    """
    held = {step: rows for step, rows in proofs.items() if rows.begin(content)}
    return max(held.items(), key=lambda item: (item[1].num_bytes, item[0]), default=(0, Rows()))


def find_row_damage(path: Path, rows: Rows) -> list[str]:
    """What is wrong with a file that should begin with these rows: one line, or none.

    Raises:
      ValueError: no regular file, or too large.
      DiskError: the disk does not respond.
    """
    try:
        content = read_file(path, MAX_BYTES)
    except FileNotFoundError:
        content = b""
        if rows.num_bytes:
            return [f"missing, expected {rows.num_bytes:,} bytes of rows"]
    if len(content) < rows.num_bytes:
        return [f"{len(content):,} bytes, expected {rows.num_bytes:,} or more: rows were cut off"]
    return [] if rows.begin(content) else ["content differs (checksum): rows were changed"]


def find_lost_rows(path: Path, rows: Rows) -> list[str]:
    """The damage of the file, as `find_row_damage`, and a line for rows lost earlier."""
    return find_row_damage(path, rows) + ([f"it lacks {rows.lacking}"] if rows.lacking else [])
