"""evals.jsonl in a run folder: the results of `jaxlm eval --follow`.

A row is one checkpoint on one held-out set. A row names the weights by hash, not by step alone: a
run that rolled back makes the same step again with other weights.
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
_LINE_START = b'{"step": '


class Eval(TypedDict):
    """A row of evals.jsonl."""

    step: int
    checkpoint: str
    """`checkpoint_id` of the checkpoint."""
    source: str
    """`data.source` of the held-out documents."""
    loss: float
    """Nats per token."""
    perplexity: float
    num_tokens: int


def checkpoint_id(metadata: Metadata) -> str:
    """16 hex digits, equal for checkpoints with equal weights."""
    item, found = metadata.weights_item, metadata.fingerprints
    weights = {k: v for k, v in found.items() if k.startswith(f"{item}/")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:16]


def read_evals(path: Path) -> list[Eval]:
    """The rows, oldest first, without a last line that a kill cut short; empty if no file exists.

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
                f"{path}, line {number}: found {line[:80]!r}, expected a row of `jaxlm eval "
                f"--follow` ({error}); mend or delete that line"
            ) from error
    return rows


class EvalLog:
    """evals.jsonl, open for writing by one process at a time.

    Attributes:
      rows: all rows, oldest first.
    """

    def __init__(self, path: Path):
        """Opens or creates the file, and cuts off a line that a kill left short.

        Raises:
          ValueError: another process has the file open, it has other content, or its folder is
            missing.
        """
        path = check_output_path(path)
        self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.rows = read_evals(path)
            content = read_file(path, _MAX_BYTES)
            kept = content.rfind(b"\n") + 1
            if not content[kept:].startswith(_LINE_START[: len(content) - kept]):
                raise InputError(f"{path}: found other content than evals; name another --out")
            self._file.truncate(kept)
        except BlockingIOError:
            self._file.close()
            raise InputError(
                f"{path}: another `jaxlm eval --follow` is writing this file; wait, stop it, or "
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
        """Appends a row and syncs it to disk."""
        line = json.dumps({name: jsonable(value) for name, value in row.items()}) + "\n"
        self._file.write(line.encode())
        os.fsync(self._file.fileno())
        self.rows.append(row)
