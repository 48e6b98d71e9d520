"""What disk tells of a run, as far as it can be read: rows, events, checkpoints, time, settings.

Reading only; the run may be training, stopped, damaged or not even begun.
"""

from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoints.folder import CORRUPT, SUPERSEDED, find_checkpoints, read_steps
from jaxlm.checkpoints.manifest import find_damage
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.files.durable import DiskError, folder_bytes
from jaxlm.files.strict import read_json
from jaxlm.report.compare import describe_run
from jaxlm.tracking.clock import KINDS
from jaxlm.tracking.metrics import read_metrics
from jaxlm.tracking.trackers import Row

EVENTS = (
    "start",
    "change",
    "best",
    "save",
    "not finite",
    "rollback",
    "superseded",
    "damaged",
    "set aside",
)
"""The kinds of events. `save` is a checkpoint that is on disk now; deletions are not recorded."""
_UNREADABLE = (OSError, ValueError, DiskError)


class Event(NamedTuple):
    """Something that happened to a run."""

    step: int
    kind: str
    """One of `EVENTS`."""
    why: str


class Process(NamedTuple):
    """A start of the run, as far as its rows are in metrics.jsonl."""

    first_step: int
    """Of its first row."""
    last_step: int
    seconds: dict[str, float]
    """Kind of `clock.KINDS` -> wall time (s) up to its last row."""

    @property
    def goodput(self) -> float:
        """The share of the wall time that was spent on steps."""
        return goodput(self.seconds)


class History(NamedTuple):
    """One run."""

    run: str
    """As it was asked for."""
    rows: list[Row]
    """metrics.jsonl."""
    processes: list[Process]
    events: list[Event]
    """By step."""
    checkpoints: list[dict[str, Any]]
    """As in `compare.describe_run`."""
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
    path = Path(run)
    if not path.is_dir():
        raise ValueError(f"{run}: found no folder, expected a run folder (such as runs/tiny)")
    missing: list[str] = []
    run_dir = path.parent if path.name == "checkpoints" else path
    rows = _rows(run_dir, missing)
    folder, found, latest = _checkpoints(run, missing)
    processes = split_by_start(rows)
    events = [*_events_of_rows(rows, processes), *_events_of_folder(folder, found, latest)]
    folders = {run_dir} if folder is None or run_dir in folder.parents else {run_dir, folder}
    return History(
        run=run,
        rows=rows,
        processes=processes,
        events=sorted(events, key=lambda event: (event.step, EVENTS.index(event.kind))),
        checkpoints=found["checkpoints"],
        num_bytes=sum(map(folder_bytes, folders)),
        config=_flat(_config(run_dir, latest, missing)),
        environment=_flat(latest.environment if latest else {}),
        missing=missing,
    )


def _rows(run_dir: Path, missing: list[str]) -> list[Row]:
    try:
        rows = read_metrics(run_dir / "metrics.jsonl")
    except FileNotFoundError:
        missing.append("metrics.jsonl is not there: no curves")
        return []
    except _UNREADABLE as error:
        missing.append(f"no curves: {error}")
        return []
    if not rows:
        missing.append("metrics.jsonl is empty so far: no curves")
    return rows


def _checkpoints(
    run: str, missing: list[str]
) -> tuple[Path | None, dict[str, Any], Metadata | None]:
    nothing: dict[str, Any] = {"checkpoints": [], "set_aside": [], "skips": [], "damaged": {}}
    try:
        try:
            folder = find_checkpoints(run)
        except ValueError:  # a damaged config.json; they are most likely in their usual place
            folder = Path(run) / "checkpoints"
            if not folder.is_dir():
                raise
        found, steps = describe_run(str(folder)), read_steps(folder).sound
    except _UNREADABLE as error:
        missing.append(f"no checkpoints: {error}")
        return None, nothing, None
    if not steps:
        missing.append("no sound checkpoint is on disk")
    return folder, found, steps[max(steps)] if steps else None


def _config(run_dir: Path, latest: Metadata | None, missing: list[str]) -> dict[str, Any]:
    try:
        return read_json(run_dir / "config.json", dict[str, Any])
    except _UNREADABLE as error:
        missing.append(f"config.json cannot be read: {error}")
        return latest.config if latest else {}


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


def _events_of_rows(rows: list[Row], processes: list[Process]) -> list[Event]:
    events = [
        Event(p.first_step, "start", "goes on in a new process" if number else "first row")
        for number, p in enumerate(processes)
    ]
    num_nonfinite = 0.0
    for row in rows:
        step = int(row["step"])
        if "eval/loss" in row and row["eval/loss"] == row.get("eval/best_loss"):
            events.append(Event(step, "best", f"eval/loss {row['eval/loss']:.4f}"))
        if (count := row.get("train/nonfinite_steps", 0.0)) > num_nonfinite:
            events.append(Event(step, "not finite", f"{count:g} steps so far"))
            num_nonfinite = count
    return events


def _events_of_folder(
    folder: Path | None, found: dict[str, Any], latest: Metadata | None
) -> list[Event]:
    if folder is None:
        return []
    events = [
        Event(row["step"], "save", ", ".join(row["is"]) or "on disk")
        for row in found["checkpoints"]
    ]
    for skip in found["skips"]:
        past = f", past {skip['num_batches']} batches" if skip["num_batches"] else ""
        events.append(Event(skip["from_step"], "rollback", f"to here{past}: {skip['why']}"))
    for step, why in found["damaged"].items():
        events.append(Event(int(step), "damaged", why))
    for kind, mark in (("set aside", CORRUPT), ("superseded", SUPERSEDED)):
        for path in sorted(folder.glob(f"*{mark}*")):
            step = path.name.partition(".")[0]
            if step.isdecimal() and step.isascii() and len(step) < 16:
                why = "the run went back to before it"
                if kind == "set aside":
                    damage = find_damage(path, contents=False)
                    why = (
                        damage[0] if damage else "damaged, which a look at its sizes does not show"
                    )
                events.append(Event(int(step), kind, f"{path.name}: {why}"))
    for entry in latest.lineage if latest else []:
        step = entry.get("step")
        what = {name: value for name, value in entry.items() if name != "step"}
        why = "; ".join(f"{name}: {value}" for name, value in what.items())
        events.append(Event(step if type(step) is int else 0, "change", why))
    return events


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
