"""The history of a run on disk, as far as it can be read: rows, events, checkpoints, settings.

Reading only; the run may be training, stopped, damaged or not even begun.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxlm.checkpoints.folder import find_checkpoints, scan_folder
from jaxlm.checkpoints.metadata import Metadata, flat
from jaxlm.errors import InputError
from jaxlm.evaluation.evals import NAME as EVALS
from jaxlm.evaluation.evals import Eval, read_evals
from jaxlm.files.durable import DiskError, expand, folder_bytes
from jaxlm.files.strict import read_json
from jaxlm.report.table import describe_steps
from jaxlm.tracking.clock import KINDS
from jaxlm.tracking.events import NAME as EVENTS
from jaxlm.tracking.events import Event, read_events
from jaxlm.tracking.metrics import read_metrics
from jaxlm.tracking.trackers import Row

T = TypeVar("T")
_UNREADABLE = (OSError, ValueError, DiskError)
_read_config = partial(read_json, kind=dict[str, Any])


class Process(NamedTuple):
    """A start of the run, as far as its rows are in metrics.jsonl."""

    first_step: int
    """Of its first row."""
    last_step: int
    seconds: dict[str, float]
    """Kind of `clock.KINDS` -> wall time (s) up to its last row."""


class History(NamedTuple):
    """One run."""

    run: str
    """As it was asked for."""
    rows: list[Row]
    """metrics.jsonl."""
    processes: list[Process]
    events: list[Event]
    """events.jsonl."""
    evals: list[Eval]
    """evals.jsonl."""
    checkpoints: list[dict[str, Any]]
    """As in `table.describe_steps`."""
    num_bytes: int
    """Of the run folder and of its checkpoints, those set aside included."""
    config: dict[str, Any]
    """Dotted name -> value."""
    environment: dict[str, Any]
    """Dotted name -> value, of the latest checkpoint."""
    missing: list[str]
    """What is not there or cannot be read."""


def read_history(run: str) -> History:
    """Reads all there is.

    Args:
      run: a run folder, or its checkpoint folder.

    Raises:
      ValueError: there is no such folder.
    """
    path = Path(expand(run, "RUN"))
    if not path.is_dir():
        raise InputError(f"{run}: found no folder, expected a run folder (such as runs/tiny)")
    missing: list[str] = []
    run_dir = path.parent if path.name == "checkpoints" else path
    rows = _tried(read_metrics, run_dir / "metrics.jsonl", "curves", missing)
    events, unreadable = _tried(read_events, run_dir / EVENTS, "events", missing) or ([], [])
    evals = _tried(read_evals, run_dir / EVALS, "losses of `jaxlm eval --follow`", missing) or []
    if rows == []:
        missing.append("metrics.jsonl is empty so far: no curves")
    missing += unreadable
    config = _tried(_read_config, run_dir / "config.json", "config", missing)
    folder, checkpoints, latest = _checkpoints(run, evals, missing)
    folders = {run_dir} if folder is None or run_dir in folder.parents else {run_dir, folder}
    return History(
        run=run,
        rows=rows or [],
        processes=split_by_start(rows or []),
        events=events,
        evals=evals,
        checkpoints=checkpoints,
        num_bytes=sum(map(folder_bytes, folders)),
        config=flat(config or (latest.config if latest else {})),
        environment=flat(latest.environment if latest else {}),
        missing=missing,
    )


def _tried(read: Callable[[Path], T], path: Path, what: str, missing: list[str]) -> T | None:
    try:
        return read(path)
    except FileNotFoundError:
        missing.append(f"{path.name} is not there: no {what}")
    except _UNREADABLE as error:
        missing.append(f"no {what} from {path.name}: {error}")
    return None


def _checkpoints(
    run: str, evals: list[Eval], missing: list[str]
) -> tuple[Path | None, list[dict[str, Any]], Metadata | None]:
    try:
        try:
            folder = find_checkpoints(run)
        except ValueError:  # a damaged config.json; they are most likely in their usual place
            folder = Path(run) / "checkpoints"
            if not folder.is_dir():
                raise
        steps = scan_folder(folder)
    except _UNREADABLE as error:
        missing.append(f"no checkpoints: {error}")
        return None, [], None
    missing += [f"checkpoint {step} is damaged: {why[0]}" for step, why in steps.damaged.items()]
    latest = steps.sound[max(steps.sound)] if steps.sound else None
    if latest is None:
        missing.append("no sound checkpoint is on disk")
    return folder, describe_steps(folder, steps.sound, evals), latest


def goodput(seconds: dict[str, float]) -> float:
    """The share of `steps` in the wall time; 0 where none has passed."""
    total = sum(seconds.values())
    return seconds["steps"] / total if total > 0 else 0.0


def times(row: Row) -> dict[str, float] | None:
    """The seconds that a row has for each kind, or None if it has none."""
    found = {kind: row[f"time/{kind}"] for kind in KINDS if f"time/{kind}" in row}
    return found if len(found) == len(KINDS) else None


def split_by_start(rows: list[Row]) -> list[Process]:
    """The starts of a run: each has its own clock, on which `start` stands still in the loop."""
    found: list[Process] = []
    for row in rows:
        if (seconds := times(row)) is None:
            continue
        before = found[-1].seconds if found else {}
        first_step = int(row["step"])
        if before and before["start"] == seconds["start"]:
            if all(seconds[kind] >= before[kind] for kind in KINDS):
                first_step = found.pop().first_step
        found.append(Process(first_step, int(row["step"]), seconds))
    return found
