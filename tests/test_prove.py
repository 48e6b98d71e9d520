"""`jaxlm prove-resume`, and the comparison of two runs that it and tests/chaos.py rest on."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import text_run

from jaxlm import __main__ as cli
from jaxlm.checkpoints import manifest
from jaxlm.data.batches import TrainBatches
from jaxlm.launch import run_main
from jaxlm.proof.attempt import compare_runs

# What a user's file might do by mistake: batches that no one can make again.
UNREPEATABLE = """
import os
from jaxlm.data.batches import TrainBatches

right = TrainBatches.__call__


def wrong(self, index, rows):
    batch = right(self, index, rows)
    if index == 4:
        batch["inputs"] = batch["inputs"] ^ int.from_bytes(os.urandom(4)) % 2**9
    return batch


TrainBatches.__call__ = wrong
"""


@pytest.fixture
def pair(shared_home: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run and its copy, with hashes for their batches."""
    for name in ("whole", "broken"):
        shutil.copytree(shared_home / text_run.RUN, tmp_path / name)
        rows = [{"batch": n, "rows": [0, 8], "sha256": f"hash {n}"} for n in range(12)]
        write_batches(tmp_path / name, rows)
    # A resumed run makes some batches again.
    write_batches(tmp_path / "broken", [*rows[:7], *rows[4:]])
    return tmp_path / "whole", tmp_path / "broken"


def write_batches(run: Path, rows: list[dict]) -> None:
    Path(f"{run}.batches").write_text("".join(json.dumps(row) + "\n" for row in rows))


def edit_rows(run: Path, edit: Callable[[list[dict]], None]) -> None:
    rows = text_run.rows(run)
    edit(rows)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_equal_runs(pair: tuple[Path, Path]):
    assert compare_runs(*pair) == []
    # Only the newest and the best have to be in both.
    shutil.rmtree(pair[1] / "checkpoints" / "4")
    assert compare_runs(*pair) == []
    shutil.rmtree(pair[0] / "checkpoints" / "8")
    assert compare_runs(*pair) == ["checkpoint 8: only in one of the two"]


@pytest.mark.slow
def test_every_kind_of_difference_is_found(pair: tuple[Path, Path]):
    whole, broken = pair

    def last_bit(rows: list[dict]) -> None:
        row = next(row for row in rows if "eval/loss" in row and row["step"] == 8)
        row["eval/loss"] *= 1 + 2**-52

    edit_rows(broken, last_bit)
    (found,) = compare_runs(whole, broken)
    assert re.fullmatch(
        r"step 8: eval/loss: 0x1\.\w+p\+\d uninterrupted, 0x1\.\w+p\+\d resumed", found
    )

    shutil.copy(whole / "metrics.jsonl", broken)
    edit_rows(broken, lambda rows: rows.append(rows[-1]))  # not cut back
    found = compare_runs(whole, broken)
    assert found and all(text.startswith("step 12: ") for text in found)

    shutil.copy(whole / "metrics.jsonl", broken)
    edit_rows(broken, lambda rows: rows.insert(0, rows.pop()))
    assert compare_runs(whole, broken) == ["metrics.jsonl: the rows are in another order"]

    shutil.copy(whole / "metrics.jsonl", broken)
    rows = [json.loads(line) for line in Path(f"{broken}.batches").read_text().splitlines()]
    write_batches(broken, [*rows, rows[5] | {"sha256": "another"}])
    (found,) = compare_runs(whole, broken)
    assert found.startswith("step 6: batch, rows 0:8: hash 5 uninterrupted, hash 5 another resumed")

    write_batches(broken, rows)
    shutil.rmtree(broken / "checkpoints" / "12")
    shutil.copytree(broken / "checkpoints" / "8", broken / "checkpoints" / "12")
    metadata = broken / "checkpoints/12/meta/metadata"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"step": 12}))
    manifest.write_manifest(broken / "checkpoints/12")
    text = Path(broken / "checkpoints/12/commit_success.txt")
    text.write_text(text.read_text().replace("/8", "/12"))
    found = compare_runs(whole, broken)
    assert any("checkpoint 12: {'tokens_seen': 3072" in line for line in found)
    assert any("checkpoint 12: params/embedding_VD: " in line for line in found)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--prove_steps", "3"], "prove_steps: found 3, expected at least 4"),
        (["--prove_kills", "-1"], "prove_kills: found -1, expected at least 0"),
        (["--out", "none/x.json"], "out: found no folder none, expected one"),
        (["--config", "configs/none.py"], "--config: found no file configs/none.py"),
    ],
)
def test_bad_input(
    shared_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    flags: list[str],
    told: str,
):
    monkeypatch.chdir(shared_home)
    config = [] if "--config" in flags else ["--config", "configs/tiny.py"]
    with pytest.raises(SystemExit):
        sys.exit(run_main(lambda: cli.command(["prove-resume", *config, *flags])))
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = text_run.make_home(tmp_path / "home")
    monkeypatch.chdir(home)
    monkeypatch.setenv("PYTHONPATH", str(text_run.REPO))
    # One device for the children; what they compile once, they find again.
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    return home


@pytest.mark.slow
def test_a_config_is_proven(home: Path, capsys: pytest.CaptureFixture):
    flags = ["--config", "configs/tiny.py", "--prove_kills", "1", "--out", "certificate.json"]
    code = cli.command(["prove-resume", *flags, "--checkpoint.keep_every", "5"])
    said = capsys.readouterr().out
    assert code == 0, said
    certificate = json.loads((home / "certificate.json").read_text())
    assert certificate["proven"] and certificate["wrong"] == []
    signals = [(kill["signals"], kill["code"]) for kill in certificate["kills"]]
    assert ("SIGTERM", 75) in signals and signals.count(("SIGKILL", -9)) >= 2
    assert any(kill["phase"] == "saving" for kill in certificate["kills"])
    assert len(certificate["steps"]) == 12
    for step, (here, resumed) in enumerate(
        zip(certificate["steps"], certificate["steps_resumed"], strict=True), 1
    ):
        assert here == resumed and ("eval/loss" in here) == (step % 4 == 0)
        assert len(here["batch, rows 0:8"][0]) == 64 and "train/loss" in here
    assert certificate["environment"]["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert said.endswith("PROVEN: every array, loss, eval loss and batch is equal to the bit\n")
    assert set(os.listdir(home)) == {"configs", "texts", "launch.py", "certificate.json"}


@pytest.mark.slow
def test_batches_that_no_one_can_make_again_are_found(
    home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    # This process reads the config too; later tests need the right batches back.
    monkeypatch.setattr(TrainBatches, "__call__", TrainBatches.__call__)
    config = home / "configs" / "tiny.py"
    config.write_text(config.read_text() + UNREPEATABLE)
    flags = ["--config", "configs/tiny.py", "--prove_kills", "0"]
    assert cli.command(["prove-resume", *flags]) == 1
    said = capsys.readouterr().out
    (first, *_) = re.findall("^WRONG: .*", said, re.M)
    assert first.startswith("WRONG: step 5: batch, rows 0:8: ")
    assert "hint: batch n may depend on n and the seed alone" in said
    assert said.splitlines()[-1].startswith("NOT PROVEN")
