"""Tasks of lm-eval during a run: rows of its evals, exact however the run is stopped."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_benchmark
import text_run
from test_benchmark import model, reader, task_home  # noqa: F401  (fixtures)

from jaxlm.checkpoints.folder import read_metadata
from jaxlm.config import Config, DataConfig, TasksConfig
from jaxlm.evaluation.tasks import open_tasks
from jaxlm.proof.attempt import untimed_rows
from jaxlm.training import setup
from jaxlm.training.evaluate import Stopped

FLAGS = "--num_steps 12 --tasks.names mine --tasks.interval 8 --run_dir"
stop_at: set[int] = set()
"""Steps whose tasks are interrupted, once each."""


def open_own(*_: Any) -> setup.Tasks:
    """Tasks that look at the weights, as those of lm-eval do, without its half a minute."""

    def run(step: int, weights: Any, stops: Callable[[], bool]) -> dict[str, float]:
        if step in stop_at:
            stop_at.remove(step)
            signal.raise_signal(signal.SIGTERM)
        if stops():
            raise Stopped
        return {"eval/mine/acc": float(np.abs(weights["embedding_VD"]).sum())}

    return run


@pytest.mark.slow
def test_a_stop_in_the_tasks_costs_them_alone(own_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(setup, "_OPEN_TASKS", "test_tasks:open_own")
    code, said = text_run.launched(own_home, f"{FLAGS} runs/whole")
    assert code == 0 and said.count("Acc of mine: ") == 2
    stop_at.update({8, 12})
    for last in (8, 12):
        assert text_run.launched(own_home, f"{FLAGS} runs/cut")[0] == 75
        assert read_metadata(own_home / "runs/cut/checkpoints", last).eval_loss is None
    assert text_run.launched(own_home, f"{FLAGS} runs/cut")[0] == 0
    rows = [untimed_rows(own_home / "runs" / name) for name in ("whole", "cut")]
    assert [row["step"] for row in rows[0] if "eval/mine/acc" in row] == [8, 12]
    assert rows[0] == rows[1]


def test_the_interval_is_one_of_evals() -> None:
    with pytest.raises(ValueError, match="tasks.include_path: .* None without tasks.names"):
        Config(tasks=TasksConfig(include_path="x"))
    with pytest.raises(
        ValueError,
        match="found 5000, expected a multiple of eval_interval; set --tasks.interval 3000",
    ):
        Config(tasks=TasksConfig("x"), eval_interval=300)


@pytest.mark.slow
def test_the_generators_of_the_caller_go_on() -> None:
    own_random_state = pytest.importorskip("jaxlm.evaluation.harness").own_random_state
    random.seed(1), np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1), np.random.seed(1)
    with own_random_state():
        random.seed(2), np.random.seed(2)
    assert (random.random(), np.random.rand()) == expected


@pytest.mark.slow
def test_the_rows_are_what_benchmark_says_of_the_checkpoints(task_home: Path) -> None:  # noqa: F811
    tasks = ["--tasks.names", "choice,rolling", "--tasks.include_path", "tasks"]
    done = subprocess.run(
        [sys.executable, "launch.py", "--config", "configs/tiny.py", *tasks]
        + ["--tasks.interval", "4", "--run_dir", "runs/with"],
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(task_home / "hf")}
        | {"PYTHONPATH": str(text_run.REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["step"]: row for row in untimed_rows(task_home / "runs/with") if "eval/loss" in row}
    found = test_benchmark.benchmark(task_home, "choice,rolling", run="runs/with@4")["tasks"]
    assert rows.keys() == {4, 8}
    assert rows[4]["eval/choice/acc"] == found["choice"]["acc,none"]
    assert rows[4]["eval/rolling/word_perplexity"] == found["rolling"]["word_perplexity,none"]
    assert rows[8]["eval/rolling/word_perplexity"] != rows[4]["eval/rolling/word_perplexity"]
    assert "Word_perplexity of rolling" in done.stdout


@pytest.mark.slow
def test_what_cannot_be_run_is_refused_before_the_first_step(task_home: Path) -> None:  # noqa: F811
    harness = pytest.importorskip("jaxlm.evaluation.harness")
    (task_home / "tasks/gone.yaml").write_text(
        "task: gone\ndataset_path: json\ndataset_kwargs: {data_files: {test: nofile.jsonl}}\n"
    )
    for names, folder, message in (
        ("words", "nothere", "include_path: found nothere, expected a folder"),
        ("choise", "tasks", "did you mean choice"),
        ("gone", "tasks", "gone cannot be loaded .FileNotFoundError: .*nofile.jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            harness.load_tasks(names, folder)
    config = Config(
        data=DataConfig(held_out={"choice": "text:x"}),
        tasks=TasksConfig("choice", interval=500, include_path="tasks"),
    )
    parts: Any = None
    with pytest.raises(ValueError, match="found choice, the name of a held-out set too"):
        open_tasks(config, parts, parts, parts, 0)
