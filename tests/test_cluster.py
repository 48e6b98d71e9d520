"""Several real processes: what becomes of the others when something happens to one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxlm.checkpoints.folder import list_corrupt, list_steps
from jaxlm.proof.attempt import untimed_rows
from jaxlm.report.diff import diff_checkpoints

MEMBER = Path(__file__).parent / "cluster_member.py"
# Without heartbeats of ours, processes end 90 s after another, and with them after 10 s or more.
AT_ONCE_S, SOON_S, PATIENCE_S = 8, 60, 900


class Ended(NamedTuple):
    code: int
    after_s: float
    output: str


class Members:
    """Processes of one run, and what they print."""

    def __init__(self, folder: Path, count: int, *args: object) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
        clean |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
        self.outputs = [folder / f"{index}.output" for index in range(count)]
        self.processes, self.writers = [], []
        for index, path in enumerate(self.outputs):
            with path.open("w") as output:
                # Of its own: a member whose disk is full would have no room for its words either.
                writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output)
            self.writers.append(writer)
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, str(MEMBER), *map(str, args)],
                    env={**clean, "JAX_PROCESS_ID": str(index)},
                    stdout=writer.stdin,
                    stderr=writer.stdin,
                )
            )
            writer.stdin.close()

    def wait_until_ready(self) -> None:
        """Until all are, or have ended, about which `ends` then tells."""
        deadline = time.monotonic() + PATIENCE_S
        while any(process.poll() is None for process in self.processes):
            told = [path.read_text() for path in self.outputs]
            if all("ready\n" in output for output in told):
                return
            assert time.monotonic() < deadline, told
            time.sleep(0.01)

    def ends(self, *, but: int | None = None) -> list[Ended]:
        """How each of them ends, but for the one that something was done to."""
        start = time.monotonic()
        after_s: dict[int, float] = {}
        others = [index for index in range(len(self.processes)) if index != but]
        while len(after_s) < len(others):
            for index in others:
                if self.processes[index].poll() is not None:
                    after_s.setdefault(index, time.monotonic() - start)
            assert time.monotonic() < start + PATIENCE_S, [
                path.read_text() for path in self.outputs
            ]
            time.sleep(0.01)
        for index in others:
            self.writers[index].wait()
        found = [
            Ended(self.processes[index].returncode, after_s[index], self.outputs[index].read_text())
            for index in others
        ]
        print([(end.code, round(end.after_s, 2)) for end in found])
        return found


@contextmanager
def running(folder: Path, count: int, *args: object) -> Iterator[Members]:
    members = Members(folder, count, *args)
    try:
        members.wait_until_ready()
        yield members
    finally:
        for process, writer in zip(members.processes, members.writers, strict=True):
            process.kill()
            process.wait()
            writer.wait()


def ends_after(folder: Path, what: str, number: signal.Signals, who: int) -> list[Ended]:
    with running(folder, 4, what, who) as members:
        members.processes[who].send_signal(number)
        ends = members.ends(but=who)
    assert len(ends) == 3
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_process_killed_in_a_collective_takes_the_others_along_at_once(
    tmp_path: Path, who: int
) -> None:
    for end in ends_after(tmp_path, "collectives", signal.SIGKILL, who):
        assert end.code == 75 and end.after_s < AT_ONCE_S, end
        assert "lost" in end.output.splitlines()[-1]
        assert end.output.endswith(
            "restart all processes: the run resumes from its latest checkpoint\n"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "number"),
    [("collectives", signal.SIGSTOP), ("wait", signal.SIGKILL), ("wait", signal.SIGSTOP)],
)
def test_a_process_that_is_missed_ends_the_others_in_seconds(
    tmp_path: Path, what: str, number: signal.Signals
) -> None:
    for end in ends_after(tmp_path, what, number, 1):
        assert end.code == 75 and end.after_s < SOON_S, end
        assert "another process was lost" in end.output.splitlines()[-1]


@pytest.mark.slow
def test_an_error_of_one_is_told_by_all(tmp_path: Path) -> None:
    with running(tmp_path, 3, "fail", 2) as members:
        ends = members.ends()
    for index, end in enumerate(ends):
        assert end.code == 1 and end.after_s < SOON_S
        assert end.output.splitlines()[-1] == "process 2 of 3: KeyError: 'a bug'"
        assert ("Traceback" in end.output) == (index == 2)


@pytest.mark.slow
def test_a_process_that_was_started_otherwise_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, 3, "differ", 1) as members:
        ends = members.ends()
    for end in ends:
        assert end.code == 1
        assert end.output.splitlines()[-1] == "  seed: 0 on process 0, 1 on process 1"
        assert "process 1 of 3: error: settings: every process of a run must be" in end.output


@pytest.mark.slow
def test_processes_that_end_well_wait_for_the_late_one(tmp_path: Path) -> None:
    with running(tmp_path, 3, "end", 1) as members:
        ends = members.ends()
    assert [(end.code, "lost" in end.output) for end in ends] == [(0, False)] * 3


@pytest.mark.slow
def test_a_step_is_saved_again_however_late_one_looks_for_it(tmp_path: Path) -> None:
    with running(tmp_path, 2, "late", 1, tmp_path / "saved") as members:
        ends = members.ends()
    assert [end.code for end in ends] == [0, 0], ends
    assert set(ends[0].output.split()) > {"Resuming", "New", "done:"}, ends[0].output
    assert max(list_steps(tmp_path / "saved" / "checkpoints")) == 12


@pytest.mark.slow
@pytest.mark.parametrize("what", ["stops_in_an_eval", "fails_in_an_eval"])
def test_an_eval_that_does_not_end_costs_no_step(tmp_path: Path, what: str) -> None:
    with running(tmp_path, 2, what, 1, tmp_path / "saved") as members:
        ends = members.ends()
    assert [end.code for end in ends] == [0, 0], ends
    assert diff_checkpoints(f"{tmp_path}/saved@12", f"{tmp_path}/saved-whole@12") == []
    assert untimed_rows(tmp_path / "saved") == untimed_rows(tmp_path / "saved-whole")


@pytest.mark.slow
def test_a_shared_disk_that_one_sees_late_changes_nothing(tmp_path: Path) -> None:
    with running(tmp_path, 2, "blind", 1, tmp_path / "saved") as members:
        ends = members.ends()
    checkpoints = tmp_path / "saved" / "checkpoints"
    assert [end.code for end in ends] == [0, 0], ends
    told = [end.output.splitlines()[-1] for end in ends]
    assert told[0] == told[1] and told[0].startswith("20 steps, Best(step="), told
    assert "Resuming from step 12" in ends[0].output and list_corrupt(checkpoints) == []
    assert 20 in list_steps(checkpoints) and (checkpoints / "16.superseded").exists()


@pytest.mark.slow
def test_what_is_on_disk_is_what_process_0_finds_there(tmp_path: Path) -> None:
    with running(tmp_path, 2, "follows", 1, tmp_path / "saved") as members:
        ends = members.ends()
    assert [end.code for end in ends] == [0, 0], ends


@pytest.mark.slow
def test_all_begin_with_the_checkpoint_that_process_0_has_chosen(tmp_path: Path) -> None:
    with running(tmp_path, 2, "begins", 0, tmp_path / "run") as members:
        ends = members.ends()
    assert [end.code for end in ends] == [0, 0], ends
    assert [end.output.splitlines()[-1] for end in ends] == ["began with 9"] * 2


@pytest.mark.slow
def test_who_waits_for_another_can_be_interrupted(tmp_path: Path) -> None:
    with running(tmp_path, 2, "waits", 1) as members:
        time.sleep(2)  # so that it waits
        members.processes[0].send_signal(signal.SIGINT)
        ends = members.ends()
    assert all(end.code == 130 for end in ends), ends


@pytest.mark.slow
def test_processes_share_in_the_check_of_a_step_and_all_know_what_is_damaged(
    tmp_path: Path,
) -> None:
    with running(tmp_path, 2, "share", 1, tmp_path / "saved") as members:
        ends = members.ends()
    assert [end.code for end in ends] == [0, 0], ends
    found = [json.loads(end.output.splitlines()[-1]) for end in ends]
    (damage,) = found[0]["damage"]
    assert found[1]["damage"] == [damage] and found[0]["largest"] in damage
    read = [set(each["read"]) for each in found]
    assert abs(len(read[0]) - len(read[1])) <= 2 and not read[0] & read[1]


@pytest.mark.slow
def test_processes_without_a_disk_in_common_are_refused(tmp_path: Path) -> None:
    with running(tmp_path, 2, "apart", 0, tmp_path / "run") as members:
        ends = members.ends()
    for end in ends:
        assert end.code == 1
        told = "process 1 of 2: error: .*run-1/checkpoints: this process does not see process 0's"
        assert re.search(told, end.output.splitlines()[-1]), end
    assert not (tmp_path / "run-1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "who", "told"),
    [("save", 1, "process 1 of 2: error: .*File too large"), ("hang", 0, "failed: Timed out")],
)
def test_a_save_that_fails_on_one_stops_all_and_all_tell_why(
    tmp_path: Path, what: str, who: int, told: str
) -> None:
    with running(tmp_path, 2, what, who, tmp_path / "saved") as members:
        ends = members.ends()
    for end in ends:
        assert end.code == 1 and end.after_s < SOON_S, end
        assert re.search(told, end.output.splitlines()[-1]), end
    assert list_steps(tmp_path / "saved" / "checkpoints") == [4]


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_refused_by_all_alike(tmp_path: Path) -> None:
    with running(tmp_path, 2, "spoil", 1, tmp_path / "saved") as members:
        ends = members.ends()
    for end in ends:
        assert end.code == 1
        told = end.output.splitlines()[-1]
        assert re.search("step 8 failed: params/.* not finite; on disk and untouched: 4$", told), (
            end
        )
    checkpoints = tmp_path / "saved" / "checkpoints"
    assert list_steps(checkpoints) == [4] and not list(checkpoints.glob("8*"))
    assert '"failed"' in (tmp_path / "saved" / "events.jsonl").read_text()
