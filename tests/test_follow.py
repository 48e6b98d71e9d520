"""Checkpoints scored as they come, by another process: each once, and all that could be had."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import text_run

from jaxlm import __main__ as cli
from jaxlm.checkpoints.folder import read_metadata, scan_folder
from jaxlm.checkpoints.manifest import write_manifest
from jaxlm.evaluation import follow as follow_module
from jaxlm.evaluation.evals import EvalLog, checkpoint_id, read_evals
from jaxlm.evaluation.follow import follow
from jaxlm.terminal import log_to

EVALS = f"{text_run.RUN}/evals.jsonl"


@pytest.fixture
def home(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(own_home)
    return own_home


def followed(**options) -> list[tuple[int, float]]:
    with log_to(lambda line: None):
        follow(text_run.RUN, poll_s=0.05, **options)
    return [(row["step"], row["loss"]) for row in read_evals(Path(EVALS))]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.mark.slow
def test_a_complete_run_gets_the_recorded_losses_once(home: Path) -> None:
    folder = home / text_run.RUN / "checkpoints"
    before = snapshot(folder)
    expected = list(text_run.eval_losses(home / text_run.RUN).items())
    assert followed() == expected and len(expected) == 3
    assert followed() == expected  # nothing twice
    other = followed(source="text:texts/0*.txt")
    assert other[:3] == expected and [step for step, _ in other[3:]] == [4, 8, 12]
    assert followed() == other and snapshot(folder) == before


def test_a_row_cut_short_is_made_again(home: Path) -> None:
    expected = followed()
    content = Path(EVALS).read_bytes()
    for cut in (1, 30, len(content.splitlines()[-1]) + 1):
        Path(EVALS).write_bytes(content[:-cut])
        assert followed() == expected and Path(EVALS).read_bytes() == content
    Path(EVALS).write_bytes(b"x" + content)
    with pytest.raises(ValueError, match="evals.jsonl, line 1: found b'x.*mend or delete"):
        followed()


def test_a_file_of_something_else_is_left_alone(home: Path) -> None:
    Path("notes.json").write_text('{"precious": 1}')
    with pytest.raises(ValueError, match="notes.json: found other content than evals"):
        followed(out="notes.json")
    assert Path("notes.json").read_text() == '{"precious": 1}'


def test_a_row_is_of_the_bits_that_were_scored(home: Path, monkeypatch) -> None:
    folder, score = home / text_run.RUN / "checkpoints", follow_module.Scorer.__call__
    old = checkpoint_id(scan_folder(folder).sound[8])

    def replace(self, run: str):
        if run.endswith("@8") and not (home / "old").exists():  # by what a rollback would make
            (folder / "8").rename(home / "old")
            shutil.copytree(folder / "12", folder / "8")
            metadata = folder / "8" / "meta" / "metadata"
            metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"step": 8}))
            (folder / "8" / "commit_success.txt").write_text(
                (folder / "8" / "commit_success.txt").read_text().replace("/12", "/8")
            )
            write_manifest(folder / "8")
        return score(self, run)

    monkeypatch.setattr(follow_module.Scorer, "__call__", replace)
    followed()
    rows = {row["step"]: row for row in read_evals(Path(EVALS))}
    assert rows[8]["checkpoint"] == rows[12]["checkpoint"] != old
    assert rows[8]["loss"] == rows[12]["loss"]


def test_a_damaged_final_checkpoint_is_said_while_it_waits(home: Path) -> None:
    for step in ("8", "12"):  # both were the last of a plan
        files = (home / text_run.RUN / "checkpoints" / step / "params").rglob("*")
        largest = max(filter(Path.is_file, files), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])

    class Enough(Exception):
        pass

    def say(line: str) -> None:
        if "step 12 is damaged" in line:
            raise Enough

    with pytest.raises(Enough), log_to(say):
        follow(text_run.RUN, poll_s=0.05)


def test_one_writer(home: Path) -> None:
    with EvalLog(Path(EVALS)), pytest.raises(ValueError, match="another .* is writing this file"):
        followed()
    with pytest.raises(ValueError, match="--out: found no folder"):
        followed(out="nowhere/x.jsonl")


def test_a_checkpoint_that_vanishes_or_is_damaged_is_passed_over(
    home: Path, monkeypatch, lines: list[str]
) -> None:
    folder = home / text_run.RUN / "checkpoints"
    text_run.damage(folder / "8")
    score = follow_module.Scorer.__call__

    def vanish(self, run: str):
        if run.endswith("@4"):
            shutil.rmtree(folder / "4")
        return score(self, run)

    monkeypatch.setattr(follow_module.Scorer, "__call__", vanish)
    follow(text_run.RUN, poll_s=0.05)
    assert [row["step"] for row in read_evals(Path(EVALS))] == [12]
    assert "step 4 was deleted or replaced before it could be evaluated" in lines
    assert sum("step 8 is damaged, and was passed over" in line for line in lines) == 1


def test_the_table_shows_the_figures_of_the_same_bits_only(home: Path, capsys) -> None:
    expected = dict(followed())
    cli.command(["checkpoints", "list", text_run.RUN, "--json"])
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    name = "text:texts/*.txt"
    assert {row["step"]: row["followed"] for row in listed} == {
        step: {name: loss} for step, loss in expected.items()
    }
    cli.command(["checkpoints", "list", text_run.RUN])
    assert capsys.readouterr().out.splitlines()[0].split(" | ")[4] == name
    bits = checkpoint_id(read_metadata(home / text_run.RUN / "checkpoints", 8))
    Path(EVALS).write_text(Path(EVALS).read_text().replace(bits, "0" * 16))  # those of another 8
    cli.command(["checkpoints", "list", text_run.RUN, "--json"])
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [row["step"] for row in listed if row["followed"]] == [4, 12]


def start(*args: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *args], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_beside_a_real_trainer_through_kills(home: Path) -> None:
    shutil.rmtree(text_run.RUN)
    flags = "--num_steps 60 --eval_interval 4 --checkpoint.keep_latest 100".split()
    trainer = start("launch.py", "--config", "configs/tiny.py", *flags)
    command = ["-m", "jaxlm", "eval", text_run.RUN, "--follow", "--poll-s", "0.1"]
    try:
        while not (home / text_run.RUN / "checkpoints/4").exists():
            assert trainer.poll() is None
            time.sleep(0.1)
        follower = start(*command)
        while not read_evals(Path(EVALS)):
            assert follower.poll() is None
            time.sleep(0.05)
        follower.kill()
        follower.communicate()
        follower = start(*command)
        trainer.communicate(timeout=300)
        assert trainer.returncode == 0
        follower.communicate(timeout=300)
        assert follower.returncode == 0
    finally:
        trainer.kill()
        trainer.communicate()
    found = [(row["step"], row["loss"]) for row in read_evals(Path(EVALS))]
    assert sorted(found) == sorted(text_run.eval_losses(home / text_run.RUN).items())
    assert len(found) == 15


@pytest.mark.slow
def test_ctrl_c_ends_it_with_130(home: Path) -> None:
    shutil.rmtree(home / text_run.RUN / "checkpoints/12")
    shutil.rmtree(home / text_run.RUN / "checkpoints/8")  # not complete: it waits
    follower = start("-m", "jaxlm", "eval", text_run.RUN, "--follow", "--poll-s", "0.1")
    while not read_evals(Path(EVALS)):
        assert follower.poll() is None
        time.sleep(0.1)
    os.kill(follower.pid, signal.SIGINT)
    follower.communicate(timeout=60)
    assert follower.returncode == 130
