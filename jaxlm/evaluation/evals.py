"""evals.jsonl in a run folder: what `jaxlm eval --follow` found of each checkpoint.

A row is a checkpoint on a held-out set. It names the bits of the checkpoint, since a run that went
back makes the same step again with others.
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import TypedDict

from jaxlm.checkpoints.metadata import Metadata
from jaxlm.errors import InputError
from jaxlm.files.durable import check_output_path, read_file
from jaxlm.files.strict import jsonable, parse_json

NAME = "evals.jsonl"
_MAX_BYTES = 1 << 28
_BEGINNING = b'{"step": '  # of each line


class Eval(TypedDict):
    """A row."""

    step: int
    checkpoint: str
    """`checkpoint_id` of it."""
    source: str
    """Whose held-out documents these are."""
    loss: float
    """Nats per token."""
    perplexity: float
    num_tokens: int


def checkpoint_id(metadata: Metadata) -> str:
    """16 hex digits, the same for checkpoints with the same weights."""
    item, found = metadata.weights_item, metadata.fingerprints
    weights = {k: v for k, v in found.items() if k.startswith(f"{item}/")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:16]


def read_evals(path: Path) -> list[Eval]:
    """The rows, oldest first, without a last line that a kill cut short; none without a file.

    Raises:
      ValueError: a line is not a row.
    """
    try:
        lines = read_file(path, _MAX_BYTES).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_json(line, Eval))
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}: found {line[:80]!r}, expected what `jaxlm eval --follow` "
                f"writes ({error}); mend or delete that line"
            ) from error
    return rows


class EvalLog:
    """The file open for writing, by one process at a time.

    Attributes:
      rows: all rows, oldest first.
    """

    def __init__(self, path: Path):
        """Opens the file, made if missing, and cuts off a line that a kill left short.

        Raises:
          ValueError: another process has it open, it has other rows, or there is no such folder.
        """
        path = check_output_path(path)
        self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.rows = read_evals(path)
            content = read_file(path, _MAX_BYTES)
            kept = content.rfind(b"\n") + 1
            if not content[kept:].startswith(_BEGINNING[: len(content) - kept]):
                raise InputError(f"{path}: found other content than evals; name another --out")
            self._file.truncate(kept)
        except BlockingIOError:
            self._file.close()
            raise InputError(
                f"{path}: another `jaxlm eval --follow` writes to it; wait for it, stop it, or "
                "name another file with --out"
            ) from None
        except ValueError:
            self._file.close()
            raise

    def __enter__(self) -> "EvalLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, row: Eval) -> None:
        """Adds a row, on the disk when this returns."""
        line = json.dumps({name: jsonable(value) for name, value in row.items()}) + "\n"
        self._file.write(line.encode())
        os.fsync(self._file.fileno())
        self.rows.append(row)
