"""Pruning: what the rules drop goes, best and latest stay, at any instant and under any rule."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import text_run

from jaxlm import __main__ as cli
from jaxlm.checkpoints import manifest
from jaxlm.checkpoints import prune as pruning
from jaxlm.checkpoints.folder import list_steps, read_metadata, scan_folder
from jaxlm.checkpoints.prune import plan_pruning, prune
from jaxlm.files import lock

STEPS = [4, 8, 12, 16, 20, 24]


@pytest.fixture
def folder(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six checkpoints; the best is 8."""
    monkeypatch.chdir(own_home)
    folder = own_home / text_run.RUN / "checkpoints"
    for step in STEPS[3:]:
        path = Path(shutil.copytree(folder / "12", folder / str(step)))
        metadata = replace(read_metadata(folder, 12), step=step)
        (path / "meta" / "metadata").write_text(json.dumps(metadata.to_json()))
        commit = path / "commit_success.txt"
        commit.write_text(commit.read_text().replace("12", str(step)))
        manifest.write_manifest(path)
    assert list(scan_folder(folder).sound) == STEPS
    return folder


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, [8, 24]),
        ({"keep_latest": 3}, [8, 16, 20, 24]),
        ({"keep_every": 12}, [8, 12, 24]),
        ({"disk_budget_gb": 4}, [8, 16, 24]),
        ({"disk_budget_gb": 1e-9}, [8, 24]),
    ],
)
def test_the_rules(folder: Path, monkeypatch: pytest.MonkeyPatch, rules: dict, kept: list[int]):
    monkeypatch.setattr(pruning, "folder_bytes", lambda path: 10**9)
    found = plan_pruning(text_run.RUN, **rules)
    assert list(found.kept) == kept and list(found.dropped) == [s for s in STEPS if s not in kept]
    assert list_steps(folder) == STEPS, "a plan changes nothing"
    assert prune(text_run.RUN, **rules) == found
    assert list(scan_folder(folder).sound) == kept and not list((folder / "deleting").iterdir())
    assert not (folder / lock.HOLDER).exists()


def test_damaged_ones_stay_and_do_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifest, "_SMALL_BYTES", 1000)  # so a quick look does not see it
    text_run.damage(folder / "8")
    text_run.damage(folder / "24")
    kept = plan_pruning(text_run.RUN).kept
    assert (kept[8], kept[24], kept[20]) == ("damaged", "damaged", "latest")
    assert "best" in kept.values()


def test_a_trainer_at_work_is_left_alone(folder: Path, capsys: pytest.CaptureFixture):
    held = lock.lock(folder, required=True)
    try:
        with pytest.raises(RuntimeError, match=f"in use by another trainer .process {os.getpid()}"):
            prune(text_run.RUN)
        assert plan_pruning(text_run.RUN).dropped, "looking is free"
    finally:
        lock.unlock(held)
    assert list_steps(folder) == STEPS


@pytest.mark.parametrize("instant", range(4))
def test_stopped_at_any_instant(folder: Path, monkeypatch: pytest.MonkeyPatch, instant: int):
    rename, count = Path.rename, iter(range(99))

    def stop_at(self: Path, target: Path) -> Path:
        if next(count) == instant:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop_at)
        with pytest.raises(KeyboardInterrupt):
            prune(text_run.RUN)
    found = scan_folder(folder)
    assert not found.damaged and {8, 24} <= found.sound.keys()
    assert len(found.sound) == len(STEPS) - instant
    prune(text_run.RUN)
    assert list_steps(folder) == [8, 24]


def test_the_command(folder: Path, capsys: pytest.CaptureFixture):
    assert cli.command(["checkpoints", "prune", text_run.RUN]) == 0
    text = capsys.readouterr().out
    assert "8: kept (best)" in text and "4: would be deleted" in text
    assert "4 of 6 would be deleted" in text and text.endswith("add --delete to do it\n")
    assert list_steps(folder) == STEPS
    assert cli.command(["checkpoints", "prune", text_run.RUN, "--delete", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["dropped"]) == ["4", "12", "16", "20"]
    assert list_steps(folder) == [8, 24]
    with pytest.raises(ValueError, match="keep_latest"):
        cli.command(["checkpoints", "prune", text_run.RUN, "--keep_latest", "0"])
