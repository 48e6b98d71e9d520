"""metrics.jsonl, the record of a run's losses: one JSON object a line, cut back on resume.

Keys are `step` and the metric names. JSON has no NaN and no infinities, so these are the strings
"NaN", "Infinity" and "-Infinity", which `read_metrics` turns into floats again.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TypedDict

from jaxlm.config import Config
from jaxlm.files.durable import read_file, write_file
from jaxlm.files.strict import conform, parse_json, spell
from jaxlm.tracking.trackers import Row, Trackers, require

_MAX_BYTES = 1 << 30


class _Step(TypedDict):
    step: int


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


class Metrics:
    """Writes metrics.jsonl, and feeds the trackers from it.

    At the start, the rows after the restored step are cut off: the run makes them again.

    Attributes:
      trackers: those that the config asks for.
      run_id: the W&B run; goes into each checkpoint.
    """

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
        rows = read_metrics(path) if path.exists() else []
        begins = run_id is None  # also where it branches from another run
        last = rows[-1]["step"] if rows else 0
        # Before that, it may have been killed in its first save.
        if begins and not new_future and last >= 2 * config.checkpoint.save_interval:
            aside = path.with_name(f"metrics-{datetime.now():%Y%m%d-%H%M%S-%f}.jsonl")
            path.rename(aside)
            say(
                f"Warning: {path} has rows up to step {last}, and {config.checkpoint_dir} has no "
                f"checkpoint, so the run begins anew; they are kept in {aside.name}. If the disk "
                "of the checkpoints is not mounted, stop, and bring it back"
            )
        kept = [
            row
            for row in rows
            if not begins
            and row["step"] <= restored_step
            and not (owed_eval and row["step"] == restored_step and "eval/loss" in row)
        ]
        write_file(path, b"".join(map(_line, kept)))
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""  # what the disk would not take so far
        self.trackers = Trackers(config, kept, run_id=run_id, new_future=new_future, say=say)
        self.run_id = self.trackers.run_id

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.trackers.close(failed=kind is not None)
        try:
            with self._file:
                self.flush()
        except OSError:
            if kind is None:  # else the error of the run itself goes first
                raise

    def log(self, step: int, row: dict[str, float]) -> None:
        """Appends one row, then hands it to the trackers; what a full disk refuses waits."""
        self._unwritten += _line({"step": step, **row})
        with contextlib.suppress(OSError):
            self._write()
        self.trackers.log(step, row)

    def flush(self) -> None:
        """Waits until every row so far is on the disk; called before a checkpoint is committed.

        Raises:
          OSError: the disk does not take them; the next call tries again.
        """
        self._write()
        os.fsync(self._file.fileno())

    def _write(self) -> None:
        while self._unwritten:  # an unbuffered write may take in a part only
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
