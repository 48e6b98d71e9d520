"""A copy is whole, verified and a run like its source, whatever a trainer does meanwhile."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import text_run

from jaxlm import __main__ as cli
from jaxlm.checkpoints import copying, manifest
from jaxlm.checkpoints.copying import copy_run
from jaxlm.checkpoints.folder import list_steps, recorded_directory, scan_folder
from jaxlm.checkpoints.verify import verify_rows
from jaxlm.files.ours import MARKER, check_ours
from jaxlm.report.diff import diff_checkpoints
from jaxlm.report.table import describe_run

DEST = "backup/tiny"


@pytest.fixture
def run(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(own_home)
    return Path(text_run.RUN)


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def left_over() -> list[str]:
    return os.listdir("backup") if Path("backup").exists() else []


def test_a_copy_is_its_source_and_resumes_alike(run: Path) -> None:
    before = files(run)
    found = copy_run(str(run), DEST)
    assert found == (Path(DEST), [4, 8, 12], [], {})
    steps = {name: data for name, data in before.items() if "/" in name}
    copied = files(Path(DEST))
    assert len(steps) > 30 and {n: d for n, d in copied.items() if "/" in n} == steps
    assert files(run) == before and left_over() == ["tiny"]
    assert copied["metrics.jsonl"] == before["metrics.jsonl"]
    flags = "--optim.learning_rate 3 --num_steps 14"
    for folder in (run, DEST):
        assert text_run.launched(Path.cwd(), f"{flags} --run_dir {folder}")[0] == 0
    assert diff_checkpoints(f"{run}@14", f"{DEST}@14") == []
    assert diff_checkpoints(f"{run}@14", f"{DEST}@12") != []


def test_one_step(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.command(["checkpoints", "copy", f"{run}@best", DEST, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == [8]
    assert [row["is"] for row in describe_run(DEST)["checkpoints"]] == [["best", "latest", "final"]]


def test_checkpoints_elsewhere_come_along(run: Path) -> None:
    (run / "checkpoints").rename("elsewhere")
    values = json.loads((run / "config.json").read_text())
    values["checkpoint"]["directory"] = "elsewhere"
    (run / "config.json").write_text(json.dumps(values))
    copy_run(str(run), DEST)
    shutil.rmtree("elsewhere")
    assert recorded_directory(Path(DEST)) is None and len(describe_run(DEST)["checkpoints"]) == 3


def test_damage_is_left_out_and_said(run: Path, capsys: pytest.CaptureFixture) -> None:
    text_run.damage(run / "checkpoints" / "8")
    os.mkfifo(run / "checkpoints" / "4" / "pipe")
    assert cli.command(["checkpoints", "copy", str(run), DEST]) == 1
    said = capsys.readouterr().out
    assert "8: damaged, left out: params/" in said and "4: damaged, left out: pipe" in said
    assert list_steps(Path(DEST) / "checkpoints") == [12]
    with pytest.raises(ValueError, match="damaged"):
        copy_run(f"{run}@8", "backup/other")
    assert left_over() == ["tiny"]


def test_bits_that_flip_on_the_way_are_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copytree = shutil.copytree

    def flip(source: Path, target: Path, *nested: Any, **options: Any) -> None:
        copytree(source, target, *nested, **options)
        if source.name == "8":
            text_run.damage(target)

    monkeypatch.setattr(manifest, "_SMALL_BYTES", 1000)  # so a quick look does not see it
    monkeypatch.setattr(shutil, "copytree", flip)
    found = copy_run(str(run), DEST)
    assert found.steps == [4, 12] and list(found.damaged) == [8]
    assert scan_folder(Path(DEST) / "checkpoints").damaged == {}


def test_a_trainer_deletes_and_replaces_meanwhile(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree, count = shutil.copytree, []

    def meanwhile(source: Path, target: Path, *nested: Any, **options: Any) -> None:
        if nested:  # it calls itself for the folders below
            return copytree(source, target, *nested)
        count.append(int(source.name))
        if source.name == "4":
            source.rename("gone")
        copytree(source, target)
        if count == [12]:  # half of the old one, and then the new one is there
            text_run.damage(target)
            source.rename("old")
            copytree(Path("old"), source)

    monkeypatch.setattr(shutil, "copytree", meanwhile)
    found = copy_run(str(run), DEST)
    assert found == (Path(DEST), [8, 12], [4], {}) and count == [12, 12, 8, 4]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_copy_that_fails_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(path: Path, target: Path) -> None:
        (seen,) = left_over()
        assert seen == ".tiny.partial"
        raise error

    monkeypatch.setattr(copying, "_copy_config", fail)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        copy_run(str(run), DEST)
    assert left_over() == []


def test_a_name_that_is_too_long_is_refused_before_anything_is_made(run: Path) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(ValueError, match=r"found a name of 259 bytes .*expected 255 at most"):
        copy_run(text_run.RUN, "x" * 250)  # a name of .NAME.partial is needed for a while
    assert sorted(Path().rglob("*")) == before


def test_after_a_kill_the_next_copy_is_whole(run: Path) -> None:
    stale = Path("backup/.tiny.partial/tiny/checkpoints/3")
    stale.mkdir(parents=True)
    (stale.parents[2] / MARKER).write_text('{"format": 1}')
    assert copy_run(str(run), DEST).steps == [4, 8, 12]
    assert left_over() == ["tiny"] and not (Path(DEST) / "checkpoints/3").exists()


def test_a_partial_folder_of_somebody_else_is_left_alone(run: Path) -> None:
    theirs = Path("backup/.tiny.partial/photos")
    theirs.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"tiny\.partial: found photos and no jaxlm\.json"):
        copy_run(str(run), DEST)
    assert theirs.is_dir()


def test_a_copy_is_one_that_a_trainer_goes_on_from(run: Path) -> None:
    copy_run(str(run), DEST)
    for folder in (Path(DEST), Path(DEST) / "checkpoints"):
        check_ours(folder)
    assert verify_rows(DEST, Path(DEST) / "checkpoints") == ([], "")


def test_a_checkpoint_folder_brings_all_that_belongs_to_its_run(run: Path) -> None:
    copy_run(str(run), DEST)
    copy_run(str(run / "checkpoints"), "backup/by its folder")
    by_run, by_folder = (
        {path.relative_to(at): path.read_bytes() for path in at.rglob("*") if path.is_file()}
        for at in (Path(DEST), Path("backup/by its folder"))
    )
    assert by_folder == by_run and Path("checkpoints/tokenizer.json") in by_run


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("runs/none", DEST), "found no checkpoints"),
        ((text_run.RUN, "texts"), "texts: found something there"),
        ((text_run.RUN, f"{text_run.RUN}/copy"), "lies within"),
        ((text_run.RUN, "gs://bucket/tiny"), "expected a local path"),
        ((f"{text_run.RUN}@5", DEST), "no such checkpoint"),
    ],
)
def test_refusals(run: Path, args: Any, message: str) -> None:
    before = files(Path())
    with pytest.raises(ValueError, match=message):
        copy_run(*args)
    assert files(Path()) == before and left_over() == []
