"""The history of a run on disk, as far as it is readable: rows, events, checkpoints, settings.

Changes nothing on disk; the run may be training, stopped, damaged or not yet started.
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
from jaxlm.report.table import describe_steps, tokenizer_id
from jaxlm.tracking.clock import KINDS
from jaxlm.tracking.events import NAME as EVENTS
from jaxlm.tracking.events import Event, read_events
from jaxlm.tracking.metrics import read_metrics
from jaxlm.tracking.trackers import Row

T = TypeVar("T")
_READ_ERRORS = (OSError, ValueError, DiskError)
_read_config = partial(read_json, kind=dict[str, Any])


class Process(NamedTuple):
    """One start of the run, as recorded in metrics.jsonl."""

    first_step: int
    """Step of the first row."""
    last_step: int
    seconds: dict[str, float]
    """Kind of `clock.KINDS` -> wall time up to the last row (s)."""


class History(NamedTuple):
    """Everything readable of one run."""

    run: str
    """The run as the caller named it."""
    rows: list[Row]
    """Rows of metrics.jsonl."""
    processes: list[Process]
    events: list[Event]
    """Rows of events.jsonl."""
    evals: list[Eval]
    """Rows of evals.jsonl."""
    tokenizer: str | None
    """An identity of its tokenizer."""
    checkpoints: list[dict[str, Any]]
    """The result of `table.describe_steps`."""
    num_bytes: int
    """Size of the run folder and its checkpoints, including those set aside."""
    config: dict[str, Any]
    """Dotted name -> value."""
    environment: dict[str, Any]
    """Dotted name -> value, of the latest checkpoint."""
    missing: list[str]
    """Messages on files that are missing or unreadable."""


def read_history(run: str) -> History:
    """The history of a run, read from its folder.

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
    rows = _try_read(read_metrics, run_dir / "metrics.jsonl", "curves", missing)
    events, unreadable = _try_read(read_events, run_dir / EVENTS, "events", missing) or ([], [])
    evals = _try_read(read_evals, run_dir / EVALS, "losses of `jaxlm eval --follow`", missing) or []
    if rows == []:
        missing.append("metrics.jsonl is empty so far: no curves")
    missing += unreadable
    config = _try_read(_read_config, run_dir / "config.json", "config", missing)
    folder, checkpoints, latest = _checkpoints(run, evals, missing)
    folders = {run_dir} if folder is None or run_dir in folder.parents else {run_dir, folder}
    return History(
        run=run,
        rows=rows or [],
        processes=split_by_start(rows or []),
        events=events,
        evals=evals,
        tokenizer=tokenizer_id(folder) if folder else None,
        checkpoints=checkpoints,
        num_bytes=sum(map(folder_bytes, folders)),
        config=flat(config or (latest.config if latest else {})),
        environment=flat(latest.environment if latest else {}),
        missing=missing,
    )


def _try_read(read: Callable[[Path], T], path: Path, what: str, missing: list[str]) -> T | None:
    try:
        return read(path)
    except FileNotFoundError:
        missing.append(f"{path.name} is not there: no {what}")
    except _READ_ERRORS as error:
        missing.append(f"no {what} from {path.name}: {error}")
    return None


def _checkpoints(
    run: str, evals: list[Eval], missing: list[str]
) -> tuple[Path | None, list[dict[str, Any]], Metadata | None]:
    try:
        try:
            folder = find_checkpoints(run)
        except ValueError:  # damaged config.json: try the default folder
            folder = Path(run) / "checkpoints"
            if not folder.is_dir():
                raise
        steps = scan_folder(folder)
    except _READ_ERRORS as error:
        missing.append(f"no checkpoints: {error}")
        return None, [], None
    missing += [f"checkpoint {step} is damaged: {why[0]}" for step, why in steps.damaged.items()]
    latest = steps.sound[max(steps.sound)] if steps.sound else None
    if latest is None:
        missing.append("no sound checkpoint is on disk")
    return folder, describe_steps(folder, steps.sound, evals), latest


def goodput(seconds: dict[str, float]) -> float:
    """The share of `steps` in the wall time, 0 to 1; 0 if no time has passed."""
    total = sum(seconds.values())
    return seconds["steps"] / total if total > 0 else 0.0


def times(row: Row) -> dict[str, float] | None:
    """The wall time of each kind in a row (s), or None if one is missing."""
    found = {kind: row[f"time/{kind}"] for kind in KINDS if f"time/{kind}" in row}
    return found if len(found) == len(KINDS) else None


def split_by_start(rows: list[Row]) -> list[Process]:
    """The starts of a run, distinguished by clock.

    Each start has a new clock, on which `start` is constant during the loop.
    """
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
