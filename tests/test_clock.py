"""Where the time goes, and that the host is always a step ahead of the device."""

import gzip
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import tiny_config, train_table

from jaxlm.config import OptimConfig
from jaxlm.proof.attempt import untimed_rows
from jaxlm.report.diff import diff_checkpoints
from jaxlm.tracking.clock import KINDS, Clock
from jaxlm.tracking.metrics import read_metrics
from jaxlm.tracking.trace import traced
from jaxlm.training import setup
from jaxlm.training.loop import Loop
from jaxlm.training.setup import TrainSetup


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_each_second_counts_once_for_the_innermost_kind(now: list[float]) -> None:
    clock = Clock()
    now[0] += 1
    with clock.spent("steps"):
        now[0] += 2
        with clock.spent("eval"):
            now[0] += 4
            with pytest.raises(KeyError), clock.spent("save"):
                now[0] += 8
                raise KeyError
            now[0] += 16
        now[0] += 32
    now[0] += 64
    expected = {"start": 1 + 64, "steps": 2 + 32, "eval": 4 + 16, "save": 8}
    assert clock.seconds() == dict.fromkeys(KINDS, 0.0) | expected


def test_waiting_for_a_batch_counts_for_data(now: list[float]) -> None:
    def slow() -> Any:
        for item in "ab":
            now[0] += 3
            yield item
        now[0] += 1  # and to find that there is no more

    clock = Clock()
    for _ in clock.waiting(slow()):
        now[0] += 10
    assert clock.seconds() == dict.fromkeys(KINDS, 0.0) | {"data": 7, "start": 20}


def test_the_rate_leaves_out_evals_and_saves(now: list[float]) -> None:
    clock = Clock()
    now[0] += 1000
    with clock.spent("steps"):
        clock.rate(step=5)
        now[0] += 2
        with clock.spent("eval"):
            now[0] += 50
        assert math.isclose(clock.rate(step=9), 2.0)
        now[0] += 3
        with clock.spent("data"):
            now[0] += 1
        assert math.isclose(clock.rate(step=11), 0.5)  # since the last call


def test_a_run_says_and_logs_where_its_time_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started_s, wall_s = time.perf_counter(), 0.0

    def logged(step: int, row: dict[str, float]) -> None:
        nonlocal wall_s
        if "train/loss" in row:  # the last save, of whatever length, is in no row
            wall_s = time.perf_counter() - started_s

    optim = OptimConfig(
        learning_rate=1e-2, warmup_steps=2, beta1=0.8
    )  # so that it is compiled here
    train_table(tiny_config(tmp_path, optim=optim), callbacks=[logged])
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row]
    last = {kind: rows[-1][f"time/{kind}"] for kind in KINDS}
    assert [kind for kind in KINDS if not last[kind]] == ["restore"]
    assert 0.3 * wall_s < sum(last.values()) < wall_s + 0.01  # each is rounded
    sums = [sum(row[f"time/{kind}"] for kind in KINDS) for row in rows]
    assert sums == sorted(sums)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("time: ")]
    assert all(kind in line for kind in ("steps", "compile", "start")), line
    train_table(tiny_config(tmp_path, optim=optim, num_steps=13))
    assert read_metrics(tmp_path / "metrics.jsonl")[-2]["time/restore"] > 0
    assert not [name for row in untimed_rows(tmp_path) for name in row if name.startswith("time/")]


# --- the host is ahead


class Watched:
    """A metric that tells when it is read, in whatever way."""

    def __init__(self, value: jax.Array, tell: Callable[[], None]) -> None:
        self._value, self._tell = value, tell

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self._tell()
        return np.asarray(self._value, *args, **kwargs)

    def __float__(self) -> float:
        return float(self.__array__())


def read_too_soon(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of a run whose metrics were read before the next step was dispatched."""
    dispatched, soon, lower_step = [0], set(), setup.lower_step

    def watched(*args: Any) -> Any:
        compiled = lower_step(*args).compile()

        def call(state: Any, *rest: Any) -> Any:
            state, metrics = compiled(state, *rest)
            dispatched[0] += 1
            step = dispatched[0]

            def tell() -> None:
                if dispatched[0] == step:
                    soon.add(step)

            return state, {name: Watched(value, tell) for name, value in metrics.items()}

        call.memory_analysis = compiled.memory_analysis
        return SimpleNamespace(compile=lambda: call)

    with monkeypatch.context() as patch:
        patch.setattr(setup, "lower_step", watched)
        train_table(tiny_config(run_dir, eval_interval=4, checkpoint={"save_interval": 6}))
    assert dispatched == [12]
    return sorted(soon)


def test_the_host_waits_for_a_step_only_at_an_eval_or_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_too_soon(tmp_path / "ours", monkeypatch) == [4, 6, 8, 12]


def test_a_loop_that_waits_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eval_due, init = TrainSetup.eval_due, Loop.__init__
    loops: list[Loop] = []

    def keep(loop: Loop, *args: Any, **named: Any) -> None:
        loops.append(loop)
        init(loop, *args, **named)

    def reads_every_step(parts: TrainSetup, step: int) -> bool:
        assert loops[0].unread is not None
        float(loops[0].unread[1]["loss"])
        return eval_due(parts, step)

    monkeypatch.setattr(Loop, "__init__", keep)
    monkeypatch.setattr(TrainSetup, "eval_due", reads_every_step)
    assert read_too_soon(tmp_path, monkeypatch) == list(range(1, 13))


# --- the trace


def traced_steps(folder: Path) -> tuple[set[int], list[dict[str, Any]]]:
    """The steps in a trace, and all of its events."""
    (path,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return {int(e["args"]["step_num"]) for e in events if e.get("name") == "train"}, events


def test_a_trace_opens_and_holds_the_steps_that_were_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, run_dir = tmp_path / "plain", tmp_path / "traced"
    few = {"num_steps": 8, "eval_interval": 8, "checkpoint": {"save_interval": 8}}
    train_table(tiny_config(plain, **few))
    train_table(tiny_config(run_dir, profile=2, **few))
    assert f"trace: {run_dir}/profile; open" in capsys.readouterr().out
    steps, events = traced_steps(run_dir / "profile")
    assert steps == {5, 6}
    assert any("train_step" in str(e.get("args")) for e in events), "nothing of the device"
    assert not (plain / "profile").exists()
    assert untimed_rows(plain) == untimed_rows(run_dir)
    assert diff_checkpoints(str(plain), str(run_dir)) == []


def test_a_trace_of_a_run_that_ends_sooner_ends_with_it(tmp_path: Path, lines: list[str]) -> None:
    given = list(traced(enumerate("abcdefg"), tmp_path / "profile", 100))
    assert given == list(enumerate("abcdefg")) and len(lines) == 1
    assert traced_steps(tmp_path / "profile")[0] == {5, 6}
