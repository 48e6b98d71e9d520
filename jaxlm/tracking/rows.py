"""What proves the rows of metrics.jsonl: each checkpoint holds their length and their checksum."""

import dataclasses
from pathlib import Path

import google_crc32c

from jaxlm.errors import InputError
from jaxlm.files.durable import read_file

NAME = "metrics.jsonl"
CORRUPT = ".corrupt"
"""Ends the name of a file of rows that is not as the run wrote it."""
MAX_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows from the beginning of the file to the last one before a checkpoint."""

    num_bytes: int = 0
    crc32c: int = 0
    gaps: list[list[int]] = dataclasses.field(default_factory=list)
    """[a, b]: the rows after step a, up to step b, were lost."""

    def __post_init__(self) -> None:
        if self.num_bytes < 0 or any(len(gap) != 2 for gap in self.gaps):
            raise InputError(f"rows: found {self}, expected 0 bytes or more, and gaps of two steps")

    def then(self, data: bytes) -> "Rows":
        """These, and more after them."""
        return dataclasses.replace(
            self,
            num_bytes=self.num_bytes + len(data),
            crc32c=google_crc32c.extend(self.crc32c, data),
        )

    def begin(self, content: bytes) -> bool:
        """Whether the content begins with these rows, each bit as it was written."""
        start = content[: self.num_bytes]
        return len(start) == self.num_bytes and google_crc32c.value(start) == self.crc32c

    @property
    def lacking(self) -> str:
        """What was lost, for people; empty if nothing was."""
        return ", ".join(f"the rows after step {a} up to step {b}" for a, b in self.gaps)


def longest_proven(content: bytes, proofs: dict[int, Rows]) -> tuple[int, Rows]:
    """The last step whose rows the content begins with, and these rows; step 0 has none."""
    held = {step: rows for step, rows in proofs.items() if rows.begin(content)}
    return max(held.items(), key=lambda item: (item[1].num_bytes, item[0]), default=(0, Rows()))


def find_row_damage(path: Path, rows: Rows) -> list[str]:
    """What differs between a file and the rows that it should begin with; empty if nothing does.

    Raises:
      ValueError: it is no regular file, or too large.
      DiskError: the disk gives no answer.
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


def find_losses(path: Path, rows: Rows) -> list[str]:
    """As `find_row_damage`, and what the run has lost of its rows before."""
    return find_row_damage(path, rows) + ([f"it lacks {rows.lacking}"] if rows.lacking else [])
