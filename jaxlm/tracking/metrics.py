"""metrics.jsonl, the record of a run's losses: one JSON object a line, cut back on resume.

Each checkpoint proves the rows before it. A file with changed rows is kept as
`metrics.jsonl.corrupt`, and the run continues with the proven rows.

Keys are `step` and the metric names. JSON has no NaN and no infinities, so these are the strings
"NaN", "Infinity" and "-Infinity", which `read_metrics` turns into floats again.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypedDict

from jaxlm.config import Config
from jaxlm.errors import InputError
from jaxlm.files.durable import free_path, read_file, write_file
from jaxlm.files.ours import mark
from jaxlm.files.strict import jsonable, parse_json, validate
from jaxlm.tracking.events import Events
from jaxlm.tracking.rows import CORRUPT, MAX_BYTES, NAME, Rows, longest_proven
from jaxlm.tracking.trackers import OpenTracker, Row, Trackers, require

_log = logging.getLogger(__name__)

_CHEAP_BYTES = 1 << 26  # Up to this size, each flush verifies the content of the file.

Proofs = Callable[[], dict[int, Rows]]


class _Step(TypedDict):
    step: int


def perplexity(loss: float) -> float:
    """exp(loss), or infinity on overflow."""
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
    rows, lines = [], read_file(Path(path), MAX_BYTES).rstrip(b"\n").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(validate(parse_json(line, dict[str, float]), _Step))
        except ValueError as error:
            if number < len(lines):
                raise InputError(
                    f"{path}, line {number}: found {line[:80]!r}, expected a JSON object with an "
                    f"integer step and numbers ({error}); mend or delete that line, then start "
                    "again"
                ) from error
    return rows


def _line(row: Row) -> bytes:
    row = {name: jsonable(value) for name, value in row.items()}
    return json.dumps(row, allow_nan=False).encode() + b"\n"


class Metrics:
    """Writes metrics.jsonl, and feeds the trackers from it.

    At the start, the rows after the restored step are cut off: training repeats these steps.

    Attributes:
      rows: length and checksum of the rows so far, those that a full disk refused included.
      trackers: those of the run.
      run_id: the W&B run; goes into each checkpoint.
    """

    def __init__(
        self,
        config: Config,
        *,
        run_id: str | None,
        restored: tuple[int, Rows],
        settings_changed: bool,
        proofs: Proofs = dict,
        events: Events | None = None,
        trackers: Sequence[OpenTracker] = (),
    ):
        """Cuts the file back and opens the trackers.

        Args:
          config: the run's config.
          run_id: as found in the restored checkpoint, or None for a new run.
          restored: step and rows of the checkpoint; step 0 without rows for a start from scratch.
          settings_changed: the rows to come may differ from those cut off.
          proofs: step -> rows of the checkpoints on disk, called if rows have changed.
          events: records losses of rows; by default nothing is recorded.
          trackers: the caller's own, beside those that the config asks for.

        Raises:
          ImportError: a tracker's package is missing; raised before any file is changed.
          ValueError: the run starts from scratch, and metrics.jsonl is damaged before its last
            line.
        """
        require(config.tracking)
        self._path = path = Path(config.run_dir) / NAME
        self._proofs, self._events = proofs, events or Events(None)
        path.parent.mkdir(parents=True, exist_ok=True)
        if run_id is None:  # also where it branches from another run
            self._make_room(config, settings_changed)
        content = read_file(path, MAX_BYTES) if path.exists() else b""
        self._step, self.rows = restored
        self._flushed, self._since = restored, b""  # what the last flush proved, and what came then
        self._unwritten = b""  # what the disk would not take so far
        if self.rows.begin(content):
            write_file(path, content[: self.rows.num_bytes])
        else:
            self._recover(content, "the rows are not as they were written")
        self._file = path.open("a+b", buffering=0)
        kept = read_metrics(path) if self.rows.num_bytes else []
        self.trackers = Trackers(
            config, kept, run_id=run_id, settings_changed=settings_changed, own=trackers
        )
        self.run_id = self.trackers.run_id

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.trackers.close(failed=kind is not None)
        try:
            self.flush()
        except OSError:
            if kind is None:  # An error of the run takes precedence.
                raise
        finally:
            self._file.close()
        if self.rows.lacking:
            _log.warning(f"{self._path} is not complete: it lacks {self.rows.lacking}")

    def log(self, step: int, row: dict[str, float]) -> None:
        """Appends one row, and sends the row to the trackers; if the disk is full, keeps it."""
        line = _line({"step": step, **row})
        self._step, self.rows = step, self.rows.then(line)
        self._since += line
        self._unwritten += line
        with contextlib.suppress(OSError):
            self._write()
        self.trackers.log(step, row)

    def flush(self) -> Rows:
        """Waits until every row so far is on the disk; called before a checkpoint is committed.

        Returns:
          Length and checksum of the rows; rows lost since the last flush are reported as gaps.

        Raises:
          OSError: the disk refuses the rows; the next call tries again.
        """
        self._write()
        os.fsync(self._file.fileno())
        self._check()
        self._flushed, self._since = (self._step, self.rows), b""
        return self.rows

    def _write(self) -> None:
        while self._unwritten:  # An unbuffered write may be partial.
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _check(self) -> None:
        # Whether the file is unchanged: by inode and size; a small file by its content too.
        opened, there = os.fstat(self._file.fileno()), None
        with contextlib.suppress(OSError):
            there = self._path.stat()
        moved = there is None or not os.path.samestat(opened, there)
        cheap = self.rows.num_bytes <= _CHEAP_BYTES
        same = opened.st_size == self.rows.num_bytes and (
            not (moved or cheap) or self.rows.begin(self._read())
        )
        if moved or not same:
            why = "the file was deleted or replaced" if moved else "the file was changed"
            self._recover(self._read(), why)
            self._file.close()
            self._file = self._path.open("a+b", buffering=0)

    def _read(self) -> bytes:
        # Reads by the descriptor, which still works after the file was deleted.
        return os.pread(self._file.fileno(), self.rows.num_bytes, 0)

    def _recover(self, content: bytes, why: str) -> None:
        # Rewrites the file with the proven rows and those of this process.
        until, flushed = self._flushed
        proofs = {step: rows for step, rows in self._proofs().items() if step < until}
        step, rows = longest_proven(content, {**proofs, until: flushed})
        if step < until:
            rows = dataclasses.replace(rows, gaps=[*rows.gaps, [step, until]])
        aside = _put_aside(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        mark(self._path.parent)
        write_file(self._path, content[: rows.num_bytes] + self._since)
        self.rows = rows.then(self._since)
        lost = f"the rows after step {step} up to step {until} are lost" if step < until else ""
        found = f"{why} ({lost or 'no row is lost'})" + (
            f"; what was there is in {aside}" * bool(aside)
        )
        self._events.add("rows", self._step, found)
        _log.warning(f"{self._path}: {found}")

    def _make_room(self, config: Config, settings_changed: bool) -> None:
        # Rows without a checkpoint belong to an earlier run, and would precede those of a new one.
        rows = read_metrics(self._path) if self._path.exists() else []
        last = rows[-1]["step"] if rows else 0
        # With rows of less than two save intervals, a run may have died before a checkpoint.
        if not settings_changed and last >= 2 * config.checkpoint.save_interval:
            aside = self._path.with_name(f"metrics-{datetime.now():%Y%m%d-%H%M%S-%f}.jsonl")
            self._path.rename(aside)
            _log.warning(
                f"{self._path} has rows up to step {last}, and {config.checkpoint_dir} "
                f"has no checkpoint, so the run begins anew; they are kept in {aside.name}. If the "
                "disk of the checkpoints is not mounted, stop, and bring it back"
            )


def _put_aside(path: Path) -> str:
    # Renames the file out of the way; returns its new name, or "" if there was nothing to keep.
    try:
        if not path.lstat().st_size:
            return ""
    except FileNotFoundError:
        return ""
    aside = free_path(path.with_name(f"{path.name}{CORRUPT}"))
    path.rename(aside)
    return aside.name
