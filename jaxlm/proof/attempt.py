"""Starts, watches and kills a run from outside; compares two runs bit by bit.

Used by `jaxlm prove-resume`, and by tests that kill runs.
"""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from jaxlm.checkpoints.folder import scan_folder
from jaxlm.report.diff import diff_checkpoints
from jaxlm.tracking.metrics import read_metrics

_POLL_INTERVAL_S = 0.001
_TIMED = ("train/tokens_per_s", "train/mfu", "time/")
_COMPARED = ("tokens_seen", "eval_loss", "best_eval_loss", "best_step", "num_worse_evals", "final")
_COMPARED += ("data", "phases", "eval_set")


class Process(Protocol):
    """The interface of a started command, as `subprocess.Popen`."""

    def poll(self) -> int | None:
        """The exit code (minus the signal that killed the process), or None while it runs."""

    def send_signal(self, sig: int, /) -> None:
        """Sends a signal."""

    def wait(self) -> int:
        """Waits for the process; returns its exit code."""
        ...


class Kill(NamedTuple):
    """The signals sent to a run, and the run's state afterwards."""

    signals: str
    after_s: float
    """Time since the start (s)."""
    phase: str
    """Phase in which the run ended, from its folders."""
    step: int
    """Last step in metrics.jsonl."""
    code: int
    """Exit code; minus the signal that killed the run."""


class Attempt:
    """One start of a run, observed through its folders."""

    def __init__(self, run_dir: Path, start: Callable[[], Process]):
        self.run_dir, self.checkpoints = run_dir, run_dir / "checkpoints"
        self._started_ns = time.time_ns()
        self.process = start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kills the run if it is still running."""
        if self.process.poll() is None:
            self.kill(signal.SIGKILL)

    def wait_for(self, condition: Callable[[Self], bool]) -> bool:
        """Waits until `condition` holds; returns False if the run ended before."""
        while self.process.poll() is None:
            if condition(self):
                return True
            time.sleep(_POLL_INTERVAL_S)
        return False

    def kill(self, *numbers: int, gap_s: float = 0.0) -> Kill:
        """Sends signals, `gap_s` seconds apart, and waits for the end of the run."""
        after_s = self.age_s()
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(gap_s)
        code = self.process.wait()
        names = "+".join(signal.Signals(number).name for number in numbers)
        return Kill(names, round(after_s, 4), self.phase(), self.last_step(), code)

    def age_s(self) -> float:
        """Time since the start (s)."""
        return (time.time_ns() - self._started_ns) / 1e9

    def phase(self) -> str:
        """The phase of the run, now or at its end."""
        if not self.is_new(self.run_dir / "config.json"):
            return "starting"
        partial = self.checkpoints.glob("*.orbax-checkpoint-tmp*")
        return "saving" if any(map(self.is_new, partial)) else "training"

    def last_step(self) -> int:
        """The last step in the metrics, or 0."""
        rows = untimed_rows(self.run_dir)
        return int(rows[-1]["step"]) if rows else 0

    def is_new(self, path: Path) -> bool:
        """Whether this start made or changed a file or folder."""
        try:
            return path.stat().st_ctime_ns >= self._started_ns
        except FileNotFoundError:
            return False


def untimed_rows(run_dir: Path | str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without metrics that measure time."""
    path = Path(run_dir) / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return [{name: row[name] for name in row if not name.startswith(_TIMED)} for row in rows]


def compare_runs(uninterrupted: Path, resumed: Path) -> list[str]:
    """The differences of two runs that should be equal to the bit: a line each, by step."""
    a, b = facts_of(uninterrupted), facts_of(resumed)
    found = [
        f"step {step}: {name}: {' '.join(in_a)} uninterrupted, {' '.join(in_b)} resumed"
        for step, name in sorted(a.keys() | b.keys())
        if (in_a := a.get((step, name), ["nothing"])) != (in_b := b.get((step, name), ["nothing"]))
    ]
    steps = [[row["step"] for row in untimed_rows(run)] for run in (uninterrupted, resumed)]
    if not found and steps[0] != steps[1]:
        found.append("metrics.jsonl: the rows are in another order")
    folders = [run / "checkpoints" for run in (uninterrupted, resumed)]
    kept = [scan_folder(folder).sound for folder in folders]
    needed = {step for found in kept for step in (max(found), found[max(found)].best_step)}
    for step in sorted(kept[0].keys() | kept[1].keys()):
        if not all(step in found for found in kept):
            # A stop leaves an extra checkpoint, so retention drops another one.
            found += [f"checkpoint {step}: only in one of the two"] if step in needed else []
            continue
        facts = [{name: getattr(metadata[step], name) for name in _COMPARED} for metadata in kept]
        found += [f"checkpoint {step}: {facts[0]} and {facts[1]}"] if facts[0] != facts[1] else []
        differences = diff_checkpoints(*(f"{folder}@{step}" for folder in folders))
        found += [f"checkpoint {step}: {name}: {what}" for name, what in differences]
    return found


def facts_of(run_dir: Path) -> dict[tuple[int, str], list[str]]:
    """(step, name) -> values of a metric, one for each row of the step, or hashes of a batch.

    Floats are hexadecimal, thus exact. Hashes are read from `RUN_DIR.batches`, the path that
    the run needs in $JAXLM_RECORD_BATCHES.
    """
    facts: dict[tuple[int, str], list[str]] = {}
    for row in untimed_rows(run_dir):
        for name in row.keys() - {"step"}:
            facts.setdefault((row["step"], name), []).append(float(row[name]).hex())
    for line in Path(f"{run_dir}.batches").read_text().splitlines():
        batch = json.loads(line)
        name = "batch, rows {}:{}".format(*batch["rows"])
        hashes = facts.setdefault((batch["batch"] + 1, name), [])
        if batch["sha256"] not in hashes:  # a later start may repeat a batch
            hashes.append(batch["sha256"])
    return facts
