"""The real launch command, killed, stopped, and run by several processes at once."""

import json
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from launching import finish, launch, wait_for_step, write_config

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
    process = launch(config_file, broken)
    wait_for_step(broken, 20, process)
    process.kill()
    finish(process, -signal.SIGKILL)
    for step, number in ((60, signal.SIGTERM), (110, signal.SIGINT)):
        process = launch(config_file, broken)
        wait_for_step(broken, step, process)
        process.send_signal(number)
        assert "finishing this step, then saving" in finish(process, 75)
    process = launch(config_file, broken)
    wait_for_step(broken, 200, process)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert "Resuming from step" in finish(launch(config_file, broken), 0)
    assert diff_checkpoints(f"{broken}@300", f"{whole}@300") == []
    assert untimed_rows(broken) == untimed_rows(whole)
    assert "is complete at step 300" in finish(launch(config_file, broken), 0)


@pytest.mark.slow
def test_a_second_trainer_of_the_same_folder_is_refused(config_file: Path, tmp_path: Path) -> None:
    first = launch(config_file, tmp_path / "run")
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
    config_file: Path, run_dir: Path, count: int, *flags: str
) -> list[subprocess.Popen]:
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}"}
    cluster["JAX_NUM_PROCESSES"] = str(count)
    return [
        launch(config_file, run_dir, *flags, **cluster, JAX_PROCESS_ID=str(index))
        for index in range(count)
    ]


@pytest.mark.slow
def test_two_processes_train_stop_and_resume_as_one(config_file: Path, tmp_path: Path) -> None:
    def launch_both(run_dir: Path) -> list[subprocess.Popen]:
        return _launch_all(config_file, run_dir, 2, "--num_steps", "60")

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for process in launch_both(whole):
        finish(process, 0)
    processes = launch_both(stopped)
    wait_for_step(stopped, 20, processes[0])
    processes[1].send_signal(signal.SIGTERM)  # to the one that is not in charge
    for process in processes:
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
    assert "bits may differ from a run in one piece: processes: was 2, is 1" in output
    assert json.loads((stopped / "config.json").read_text())["num_steps"] == 70


@pytest.mark.slow
def test_one_of_four_is_killed_and_all_go_on_to_the_same_bits(
    config_file: Path, tmp_path: Path
) -> None:
    def launch_four(run_dir: Path) -> list[subprocess.Popen]:
        return _launch_all(config_file, run_dir, 4, "--num_steps", "50")

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for process in launch_four(whole):
        finish(process, 0)
    processes = launch_four(killed)
    wait_for_step(killed, 20, processes[0])
    processes[2].kill()
    for index, process in enumerate(processes):
        output = finish(process, -signal.SIGKILL if index == 2 else 75, timeout_s=60)
        assert index == 2 or "start all processes again" in output.splitlines()[-1]
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
def test_a_terminal_that_is_gone_does_not_cost_the_save(config_file: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        process = launch(config_file, tmp_path, "--num_steps", "3000", stdout=full)
        wait_for_step(tmp_path, 10, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75
    last = max(list_steps(tmp_path / "checkpoints"))
    assert untimed_rows(tmp_path)[-1]["step"] in range(last - 5, last + 1)
