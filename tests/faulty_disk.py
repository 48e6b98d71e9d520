"""What a run does on a disk that fails; test_faults.py runs this with the shim, in own mounts.

FAULT is what tests/shim.c says of it.
"""

import contextlib
import errno
import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_run import data, tiny_config

from jaxlm.checkpoints import checkpoint
from jaxlm.checkpoints.checkpoint import CheckpointError
from jaxlm.checkpoints.folder import list_corrupt, list_steps, select
from jaxlm.checkpoints.manifest import find_damage
from jaxlm.files.durable import DiskError
from jaxlm.proof.attempt import untimed_rows
from jaxlm.report.diff import diff_checkpoints
from jaxlm.training.train import Result, train

# Orbax drops the coroutines of the other arrays without having awaited them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_serial = itertools.count()


def set_fault(
    operation: str, number: int, pattern: str, *, after: int = 0, times: int = 10**9, delay_ms=0
) -> None:
    text = f"{operation} {number} {pattern} {after} {times} {delay_ms} {next(_serial)}"
    os.environ["FAULT"] = text


def clear_fault() -> None:
    os.environ["FAULT"] = "none"


@pytest.fixture(autouse=True)
def no_fault() -> Iterator[None]:
    clear_fault()
    yield
    clear_fault()


def run(run_dir: Path, *, callback: Callable[[int], None] | None = None, **changes: Any) -> Result:
    callbacks = [lambda step, row: callback(step)] if callback else []
    return train(tiny_config(run_dir, **changes), **data(), callbacks=callbacks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("whole")
    assert run(run_dir).complete
    return run_dir


def check_all_sound(folder: Path) -> None:
    assert {s: damage for s in list_steps(folder) if (damage := find_damage(folder / str(s)))} == {}
    assert list_corrupt(folder) == []
    assert not list(folder.glob("*tmp*"))


def check_nothing_is_lost(run_dir: Path, *steps: int) -> None:
    assert set(steps) <= set(list_steps(run_dir / "checkpoints"))
    check_all_sound(run_dir / "checkpoints")


def check_it_ends_as(whole: Path, run_dir: Path, **changes: Any) -> None:
    clear_fault()
    assert run(run_dir, **changes).complete
    check_nothing_is_lost(run_dir)
    assert diff_checkpoints(f"{run_dir}@12", f"{whole}@12") == []
    assert untimed_rows(run_dir) == untimed_rows(whole)


SAVES = [
    ("write", errno.EIO, "*/8.orbax*/params*"),
    ("write", errno.ENOSPC, "*/8.orbax*/meta*"),
    ("read", errno.EIO, "*/8.orbax*/opt_state*"),  # for the manifest
    ("fsync", errno.EIO, "*/checkpoints"),  # that of the commit
    ("rename", errno.EIO, "*/8.orbax-checkpoint-tmp*"),  # the commit
]


@pytest.mark.parametrize(("operation", "number", "pattern"), SAVES)
@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_save_that_the_disk_refuses(
    tmp_path: Path, whole: Path, capsys: Any, policy: str, operation: str, number: int, pattern: str
) -> None:
    keep = {"on_save_error": policy}

    def at(step: int) -> None:
        if step == 7:
            set_fault(operation, number, pattern)
        if step == 10:  # only under `warn`; the eval of step 9 has waited for the save
            clear_fault()

    if policy == "stop":
        with pytest.raises(CheckpointError, match=r"saving step [68] failed: .*untouched: 3, 4, 6"):
            run(tmp_path, callback=at, checkpoint=keep)
        check_nothing_is_lost(tmp_path, 3, 4, 6)
    else:
        assert run(tmp_path, callback=at, checkpoint=keep).complete
        said = capsys.readouterr().out
        assert re.search("saving step [68] failed", said)
        assert os.strerror(number).lower() in said.lower()
        check_nothing_is_lost(tmp_path, 9, 12)
    check_it_ends_as(whole, tmp_path, checkpoint=keep)


def test_a_save_that_fails_is_tried_again_before_the_next_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_RETRY_S", 0.0)
    set_fault("write", errno.ENOSPC, "*/6.orbax*")
    committed = []
    keep = {"on_save_error": "warn", "save_interval": 6}
    monkeypatch.setattr(
        "jaxlm.tracking.console.Console.saved",
        lambda console, step, path, best: committed.append(step),
    )
    assert run(tmp_path, eval_interval=12, checkpoint=keep).complete
    assert len(committed) == 2 and committed[0] in (7, 8, 9) and committed[1] == 12


@pytest.mark.parametrize("what", ["manifest.json", "meta/*", "params/*"])
def test_a_checkpoint_that_the_disk_does_not_give_back_stays_where_it_is(
    tmp_path: Path, whole: Path, what: str
) -> None:
    run_dir = cut_back(whole, tmp_path)
    for times in (1, 10**9):
        set_fault("read", errno.EIO, f"*/9/{what}", times=times)
        with pytest.raises(DiskError, match=r"9/.* cannot be read \(Input/output error\).*disk"):
            run(run_dir)
        clear_fault()
        check_nothing_is_lost(run_dir, 8, 9)
    check_it_ends_as(whole, run_dir)


def test_arrays_that_orbax_cannot_read(tmp_path: Path, whole: Path) -> None:
    run_dir = cut_back(whole, tmp_path)
    set_fault("read", errno.EIO, "*/9/params/*")
    # The files are sound when they are looked at, and cannot be read a moment later.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxlm.checkpoints.manifest.find_damage", lambda *_, **__: [])
        with pytest.raises(DiskError, match=r"9/params cannot be read .*disk"):
            run(run_dir)
    clear_fault()
    check_nothing_is_lost(run_dir, 8, 9)
    check_it_ends_as(whole, run_dir)


def cut_back(whole: Path, tmp_path: Path) -> Path:
    """The run as it was before its last save."""
    run_dir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / "12")
    return run_dir


def test_a_slow_disk_makes_the_run_wait_and_loses_nothing(
    tmp_path: Path, whole: Path, capsys: Any
) -> None:
    set_fault("write", 0, "*.orbax*/params*", delay_ms=40)  # a save now outlasts many steps
    assert run(tmp_path, checkpoint={"save_interval": 1}).complete
    said = capsys.readouterr().out
    assert [f"checkpoints/{step} |" in said for step in range(1, 13)] == [True] * 12
    check_nothing_is_lost(tmp_path, 10, 11, 12)
    check_it_ends_as(whole, tmp_path, checkpoint={"save_interval": 1})


def test_what_orbax_writes_late_is_in_the_manifest(tmp_path: Path) -> None:
    set_fault("write", 0, "*.orbax*/_CHECKPOINT_METADATA", delay_ms=1000)
    assert run(tmp_path, eval_interval=12, num_steps=4).complete
    check_nothing_is_lost(tmp_path, 4)


def test_a_disk_without_locks(tmp_path: Path, capsys: Any) -> None:
    set_fault("flock", errno.ENOLCK, "*/checkpoints")
    with pytest.raises(RuntimeError, match="without locks .*--checkpoint.lock if_possible"):
        run(tmp_path)
    assert run(tmp_path, checkpoint={"lock": "if_possible"}).complete
    assert "see to it that there is no second trainer" in capsys.readouterr().out


def mount(*arguments: Any) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A disk of 8 MB, about 20 checkpoints."""
    if not mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path):
        pytest.skip("needs mount")
    return tmp_path


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with open(ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return ballast


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_disk_that_is_full(small_disk: Path, whole: Path, capsys: Any, policy: str) -> None:
    run_dir, keep = small_disk / "run", {"on_save_error": policy}

    def at(step: int) -> None:  # metrics.jsonl is on that disk too
        if step in range(5, 9):  # again, since what is deleted makes room
            fill(small_disk)
        if step == 9:
            (small_disk / "ballast").unlink(missing_ok=True)

    if policy == "stop":
        with pytest.raises(CheckpointError, match=r"saving step [46] failed: .*untouched: 3"):
            run(run_dir, callback=at, checkpoint=keep)
        (small_disk / "ballast").unlink()
        check_nothing_is_lost(run_dir, 3)
    else:
        assert run(run_dir, callback=at, checkpoint=keep).complete
        assert "saving step 8 failed" in capsys.readouterr().out
        assert untimed_rows(run_dir) == untimed_rows(whole)  # those in between too, once
        check_nothing_is_lost(run_dir, 9, 12)
    check_it_ends_as(whole, run_dir, checkpoint=keep)


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_run_whose_last_save_fails_does_not_say_that_it_is_done(
    small_disk: Path, whole: Path, policy: str
) -> None:
    run_dir, keep = small_disk / "run", {"on_save_error": policy}
    with pytest.raises(CheckpointError, match=r"step (9|12) failed|newest .* on disk is [89]"):
        run(run_dir, callback=lambda step: step == 12 and fill(small_disk), checkpoint=keep)
    (small_disk / "ballast").unlink()
    check_nothing_is_lost(run_dir, 6, 8)
    check_it_ends_as(whole, run_dir, checkpoint=keep)


def test_a_disk_that_is_full_from_the_start(small_disk: Path, whole: Path) -> None:
    run_dir = cut_back(whole, small_disk)
    ballast = fill(small_disk)
    with pytest.raises(RuntimeError, match=r"cannot be written \(No space left on device\)"):
        run(run_dir)
    ballast.unlink()
    check_it_ends_as(whole, run_dir)


@pytest.fixture
def own_mount(tmp_path: Path) -> Path:
    """A folder that can be made read-only: root writes through permissions."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if not mount("--bind", folder, folder):
        pytest.skip("needs mount")
    return folder


def make_read_only(folder: Path, *, but: str = "ro") -> None:
    # Busy while a file is being written.
    wait_for(lambda: mount("-o", f"remount,bind,{but}", folder))


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_disk_that_turns_read_only(
    own_mount: Path, tmp_path: Path, whole: Path, capsys: Any, policy: str
) -> None:
    keep = {"on_save_error": policy, "directory": str(own_mount / "checkpoints")}
    changes: dict[str, Any] = {"checkpoint": keep}

    def at(step: int) -> None:
        if step == 5:
            make_read_only(own_mount)
        if step == 9:
            make_read_only(own_mount, but="rw")

    if policy == "stop":
        with pytest.raises(CheckpointError, match=r"saving step [46] failed: .*untouched: 3"):
            run(tmp_path / "run", callback=at, **changes)
        with pytest.raises(RuntimeError, match=r"cannot be written \(Read-only file system\)"):
            run(tmp_path / "run", **changes)
        make_read_only(own_mount, but="rw")
    else:
        assert run(tmp_path / "run", callback=at, **changes).complete
        assert "saving step 8 failed" in capsys.readouterr().out
    assert run(tmp_path / "run", **changes).complete
    folder = own_mount / "checkpoints"
    check_all_sound(folder)
    assert diff_checkpoints(f"{folder}@12", f"{whole}@12") == []
    assert untimed_rows(tmp_path / "run") == untimed_rows(whole)


@pytest.mark.parametrize("how", ["deleted", "replaced", "deleted in a save"])
def test_the_folder_deleted_under_the_run(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "checkpoints"

    def at(step: int) -> None:
        if step == 5 and how == "deleted in a save":
            wait_for(lambda: any(folder.glob("4.orbax*/params*")))
            set_fault("write", 0, "*", times=0)  # the save goes on
            folder.rename(tmp_path / "gone")
        elif step == 7 and how != "deleted in a save":
            wait_for((folder / "4" / "commit_success.txt").exists)
            folder.rename(tmp_path / "gone")
            if how == "replaced":
                (folder / "8.orbax-checkpoint-tmp").mkdir(parents=True)

    if how == "deleted in a save":
        set_fault("write", 0, "*/4.orbax*", times=4, delay_ms=1000)
    with pytest.raises(CheckpointError, match="deleted or replaced during training"):
        run(tmp_path, callback=at, eval_interval=12)
    assert list_steps(folder) == []  # nor does TensorStore, which makes it again, commit there
    if how == "deleted":
        assert not folder.exists()
    if how == "replaced":
        assert [path.name for path in folder.rglob("*")] == ["8.orbax-checkpoint-tmp"]


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("which", ["best", "latest", "all but the newest", "all"])
def test_checkpoints_deleted_by_hand_under_the_run(tmp_path: Path, whole: Path, which: str) -> None:
    folder = tmp_path / "checkpoints"

    def at(step: int) -> None:
        if step in (7, 11):
            steps = list_steps(folder)
            doomed = {
                "best": [select(f"{tmp_path}@best").step],
                "latest": steps[-1:],
                "all but the newest": steps[:-1],
                "all": steps,
            }[which]
            for step in doomed:
                shutil.rmtree(folder / str(step), ignore_errors=True)  # retention may be at it too

    result = run(tmp_path, callback=at)
    assert result.complete and result.best
    assert result.best.step == select(f"{tmp_path}@best").step
    check_nothing_is_lost(tmp_path, 12)
    check_it_ends_as(whole, tmp_path)
