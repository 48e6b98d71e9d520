"""metrics.jsonl, the record of a run's losses: one JSON object a line, cut back on resume.

Keys are `step` and the metric names. JSON has no NaN and no infinities, so these are the strings
"NaN", "Infinity" and "-Infinity", which `read_metrics` turns into floats again.
"""

import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from jaxlm.config import Config
from jaxlm.durable import read_file, write_file
from jaxlm.strict import conform, parse_json, read_json, spell
from jaxlm.trackers import Row, open_trackers, require

_HELD_NAME = "tracking.json"
_MAX_BYTES = 1 << 30


class _Step(TypedDict):
    step: int


class _Held(TypedDict):
    run_id: str | None
    last_step: int


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def read_metrics(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a metrics.jsonl, oldest first, without a last line that a kill cut short.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line before the last is not a row.
    """
    rows, lines = [], read_file(Path(path), _MAX_BYTES).rstrip(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(conform(parse_json(line, dict[str, float]), _Step))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}: found {line[:80]!r}, expected a JSON object with an "
                    f"integer step and numbers ({error}); mend or delete that line, then start "
                    "again"
                ) from error
    return rows


def _line(row: Row) -> bytes:
    row = {name: spell(value) for name, value in row.items()}
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _held_by_wandb(path: Path) -> _Held:
    # Outlives a kill between the cut and the next checkpoint: the W&B run in use, and the last
    # step that it may have, be it cut off here since.
    try:
        return read_json(path.with_name(_HELD_NAME), _Held)
    except (FileNotFoundError, ValueError):
        return {"run_id": None, "last_step": 0}


class Metrics:
    """Writes metrics.jsonl, and feeds the trackers from it.

    At the start, the rows after the restored step are cut off: the run makes them again. Where
    they will not be the same ones, W&B gets a new run, as it takes no row back.

    Attributes:
      run_id: the W&B run; goes into each checkpoint.
    """

    run_id: str

    def __init__(
        self,
        config: Config,
        *,
        run_id: str | None,
        restored_step: int,
        owed_eval: bool,
        new_future: bool,
        say: Callable[[str], None] = print,
    ):
        """Cuts the file back and opens the trackers.

        Args:
          config: the run's config.
          run_id: as found in the restored checkpoint, or None for a new run.
          restored_step: step of the checkpoint, or 0 for a start from scratch.
          owed_eval: the eval of the restored step will be made again.
          new_future: the rows to come may differ from those cut off.
          say: takes a line for the person who watches the run.

        Raises:
          ImportError: a tracker's package is missing. Nothing has been touched then.
          ValueError: metrics.jsonl is damaged before its last line.
        """
        require(config.tracking)
        path = Path(config.run_dir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else None
        rows = read_metrics(path) if content else []
        kept = [
            row
            for row in rows
            if run_id is not None  # else it is a new run, also where it branches from another
            and row["step"] <= restored_step
            and not (owed_eval and row["step"] == restored_step and "eval/loss" in row)
        ]
        held = _held_by_wandb(path)
        last_step = max([held["last_step"], *(row["step"] for row in rows)])
        taken_back = last_step > restored_step or len(kept) < len(rows)
        self.run_id = held["run_id"] or run_id or ""
        if run_id is None or (new_future and taken_back):
            self.run_id, last_step = secrets.token_hex(4), 0
        claim = {"run_id": self.run_id, "last_step": last_step}
        if claim != held:
            write_file(path.with_name(_HELD_NAME), json.dumps(claim).encode() + b"\n")
        lines = b"".join(_line(row) for row in kept)
        if lines != content:
            write_file(path, lines)
        self._file = path.open("ab", buffering=0)
        self._trackers = open_trackers(config, self.run_id, kept, say=say)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._trackers.close(failed=kind is not None)
        self.flush()
        self._file.close()

    def log(self, step: int, row: dict[str, float]) -> None:
        """Appends one row, then hands it to the trackers.

        Raises:
          OSError: the row could not be written (a full disk).
        """
        line = _line({"step": step, **row})
        while line:  # An unbuffered write may take in a part only.
            line = line[self._file.write(line) :]
        self._trackers.log(step, row)

    def flush(self) -> None:
        """Waits until every row so far is on the disk; called before a checkpoint is committed."""
        os.fsync(self._file.fileno())
