"""The real launch command, killed, stopped, and run by several processes at once."""

import json
import os
import pty
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import PATIENCE_S, finish, launch, wait_for_step, write_config

from jaxlm.checkpoints.folder import list_corrupt, list_steps, read_metadata
from jaxlm.proof.attempt import untimed_rows
from jaxlm.report.diff import diff_checkpoints


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.mark.slow
def test_killed_and_stopped_it_ends_with_the_bits_of_a_run_in_one_piece(
    config_file: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(launch(config_file, whole), 0)
    finish(launch(config_file, broken, at=(35, signal.SIGKILL)), -signal.SIGKILL)
    for batch, number in ((70, signal.SIGTERM), (110, signal.SIGINT), (140, signal.SIGHUP)):
        output = finish(launch(config_file, broken, at=(batch, number)), 75)
        assert "finishing this step, then saving" in output
    finish(launch(config_file, broken, at=(215, signal.SIGKILL)), -signal.SIGKILL)
    assert "Resuming from step" in finish(launch(config_file, broken), 0)
    assert diff_checkpoints(f"{broken}@300", f"{whole}@300") == []
    assert untimed_rows(broken) == untimed_rows(whole)
    assert "is complete at step 300" in finish(launch(config_file, broken), 0)


@pytest.mark.slow
def test_a_second_trainer_of_the_same_folder_is_refused(config_file: Path, tmp_path: Path) -> None:
    # Stopped in its work: a save waits for the one before, so step 10 is there by then.
    first = launch(config_file, tmp_path / "run", at=(35, signal.SIGSTOP))
    wait_for_step(tmp_path / "run", 10, first)
    checkpoints = ("--checkpoint_dir", str(tmp_path / "run" / "checkpoints"))
    second = launch(config_file, tmp_path / "other", *checkpoints)
    assert f"in use by another trainer (process {first.pid} on" in finish(second, 1)
    assert not (tmp_path / "other").exists()
    first.kill()
    finish(first, -signal.SIGKILL)
    third = launch(config_file, tmp_path / "run", "--num_steps", "120")
    finish(third, 0)  # a dead holder's lock is free at once


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _launch_all(
    config_file: Path,
    run_dir: Path,
    count: int,
    *flags: str,
    at: dict[int, tuple[int, int]] | None = None,
) -> list[subprocess.Popen]:
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}"}
    cluster["JAX_NUM_PROCESSES"] = str(count)
    return [
        launch(
            config_file,
            run_dir,
            *flags,
            at=(at or {}).get(index),
            **cluster,
            JAX_PROCESS_ID=str(index),
        )
        for index in range(count)
    ]


@pytest.mark.slow
def test_two_processes_train_stop_and_resume_as_one(config_file: Path, tmp_path: Path) -> None:
    def launch_both(run_dir: Path, **at: Any) -> list[subprocess.Popen]:
        return _launch_all(config_file, run_dir, 2, "--num_steps", "60", **at)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for process in launch_both(whole):
        finish(process, 0)
    # To the one that is not in charge.
    for process in launch_both(stopped, at={1: (25, signal.SIGTERM)}):
        finish(process, 75)
    for process in launch_both(stopped):
        finish(process, 0)
    assert diff_checkpoints(f"{stopped}@60", f"{whole}@60") == []
    assert untimed_rows(stopped) == untimed_rows(whole)
    metadata = read_metadata(whole / "checkpoints", 60)
    assert metadata.environment["processes"] == 2

    # One process goes on from what two have saved, and two batches are the same as one.
    alone = tmp_path / "alone"
    finish(launch(config_file, alone, "--num_steps", "60"), 0)
    losses = [
        [row["eval/loss"] for row in untimed_rows(run) if "eval/loss" in row]
        for run in (whole, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    output = finish(launch(config_file, stopped, "--num_steps", "70"), 0)
    assert "bits may differ from an uninterrupted run: processes: was 2, is 1" in output
    assert json.loads((stopped / "config.json").read_text())["num_steps"] == 70


@pytest.mark.slow
def test_one_of_four_is_killed_and_all_go_on_to_the_same_bits(
    config_file: Path, tmp_path: Path
) -> None:
    def launch_four(run_dir: Path, **at: Any) -> list[subprocess.Popen]:
        return _launch_all(config_file, run_dir, 4, "--num_steps", "50", **at)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for process in launch_four(whole):
        finish(process, 0)
    processes = launch_four(killed, at={2: (35, signal.SIGKILL)})
    for index, process in enumerate(processes):
        output = finish(process, -signal.SIGKILL if index == 2 else 75)
        assert index == 2 or "restart all processes" in output.splitlines()[-1]
    outputs = [finish(process, 0) for process in launch_four(killed)]
    assert "Resuming from step" in outputs[0]
    assert diff_checkpoints(f"{killed}@50", f"{whole}@50") == []
    assert untimed_rows(killed) == untimed_rows(whole)


@pytest.mark.slow
def test_any_number_of_processes_goes_on_from_any_other(config_file: Path, tmp_path: Path) -> None:
    def run(name: str, count: int) -> Path:
        for process in _launch_all(config_file, tmp_path / name, count, *flags):
            finish(process, 0)
        return tmp_path / name

    def go_on(source: Path, step: int, name: str, count: int) -> Path:
        checkpoint = f"checkpoints/{step}"
        shutil.copytree(source / checkpoint, tmp_path / name / checkpoint)
        for folder in (source, source / "checkpoints"):  # both are marked as folders of ours
            shutil.copy(folder / "jaxlm.json", tmp_path / name / folder.relative_to(source))
        run(name, count)
        # The restored state has the fingerprints of the saved one, or this had been said.
        assert list_corrupt(tmp_path / name / "checkpoints") == []
        return tmp_path / name

    def losses(run_dir: Path, after: int) -> list[float]:
        names = ("train/loss", "eval/loss")
        rows = [row for row in untimed_rows(run_dir) if row["step"] > after]
        return [row[name] for row in rows for name in names if name in row]

    flags = ("--num_steps", "40", "--save_interval", "10", "--eval_interval", "20")
    flags += ("--checkpoint.keep_latest", "10")
    one, four = run("one", 1), run("four", 4)
    two = go_on(one, 10, "one-two", 2)
    assert len(losses(one, 10)) == 6 + 2
    assert losses(two, 10) == pytest.approx(losses(one, 10), rel=1e-4)
    assert losses(go_on(two, 20, "two-four", 4), 20) == pytest.approx(losses(one, 20), rel=1e-4)
    assert losses(go_on(four, 10, "four-one", 1), 10) == pytest.approx(losses(one, 10), rel=1e-4)
    assert losses(one, 10) != pytest.approx(losses(one, 0)[:8], rel=1e-4)


@pytest.mark.slow
def test_a_full_disk_behind_the_output_does_not_cost_the_save(
    config_file: Path, tmp_path: Path
) -> None:
    with open("/dev/full", "w") as full:
        process = launch(config_file, tmp_path, at=(15, signal.SIGTERM), stdout=full)
        assert process.wait(timeout=PATIENCE_S) == 75
    last = max(list_steps(tmp_path / "checkpoints"))
    assert untimed_rows(tmp_path)[-1]["step"] in range(last - 5, last + 1)


@pytest.mark.slow
def test_a_run_whose_terminal_goes_away_goes_on_to_its_end(
    config_file: Path, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    flags = ("--num_steps", "60", "--log_interval", "1")
    process = launch(config_file, tmp_path, *flags, stdout=theirs, TERM="xterm-256color")
    os.close(theirs)
    said = b""
    while b"Step    30/60" not in said:
        said += os.read(ours, 65536)
    os.close(ours)
    assert process.wait(timeout=PATIENCE_S) == 0
    assert untimed_rows(tmp_path)[-1]["step"] == max(list_steps(tmp_path / "checkpoints")) == 60
