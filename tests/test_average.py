"""An average is the mean of its parts, verified like any checkpoint, and no step of the run."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_run
import tiny_model

from jaxlm import __main__ as cli
from jaxlm import launch, load_model
from jaxlm.checkpoints.folder import find_checkpoints, select
from jaxlm.checkpoints.restore import restore_numpy
from jaxlm.checkpoints.verify import verify_step
from jaxlm.evaluation import average as averaging
from jaxlm.evaluation.average import average
from jaxlm.evaluation.score import score
from jaxlm.launch import run_main

STEPS = [4, 8, 12]


@pytest.fixture
def run(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(own_home)
    return Path(text_run.RUN)


def arrays(run: str) -> dict[str, np.ndarray]:
    return tiny_model.names_and_leaves(restore_numpy(select(run).path, ["params"]))


def listing(folder: Path) -> set[tuple[str, bytes]]:
    return {(str(p), p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_the_mean_of_the_weights_and_what_opens_it(run: Path, capsys: pytest.CaptureFixture):
    before = listing(run)
    found = average(str(run))
    assert found.folder.name == "tiny-average-4-12" and found.folder.parent == run.parent.resolve()
    assert listing(run) == before, "the run is left as it is"
    own, parts = arrays(str(found.folder)), [arrays(f"{run}@{step}") for step in STEPS]
    assert len(own) > 10
    for name, leaf in own.items():
        mean = np.mean([part[name] for part in parts], axis=0, dtype=np.float64)
        np.testing.assert_array_equal(leaf, mean.astype(np.float32), err_msg=name)
        assert any(not np.array_equal(leaf, part[name]) for part in parts) or not leaf.any()
    assert found.parts == pytest.approx(text_run.eval_losses(run))
    # As for any checkpoint: loaded, evaluated to the bit, every file and array proven.
    model, metadata = load_model(str(found.folder))
    assert metadata.lineage[-1]["averaged"] == STEPS and metadata.eval_loss == found.loss
    assert model is not None
    (one,) = score([str(found.folder)])
    assert one.loss == found.loss and one.as_recorded and not one.differences
    folder = find_checkpoints(str(found.folder))
    assert verify_step(folder, 12) == []
    assert cli.command(["checkpoints", "diff", str(found.folder), f"{run}@12"]) == 1
    assert "opt_state/" in capsys.readouterr().out
    text_run.damage(folder / "12")
    assert verify_step(folder, 12) != []


@pytest.mark.slow
def test_the_command(run: Path, capsys: pytest.CaptureFixture):
    args = ["checkpoints", "average", str(run), "--steps", "8", "4", "--out", "mean", "--json"]
    assert cli.command(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == "mean" and list(found["parts"]) == ["4", "8"] and found["step"] == 8
    assert cli.command(["checkpoints", "average", str(run), "--last", "2", "--out", "two"]) == 0
    text = capsys.readouterr().out
    assert "step 12: loss" in text and "step 4" not in text and "average: loss" in text
    with pytest.raises(ValueError, match="--steps: found none"):
        cli.command(["checkpoints", "average", str(run), "--steps"])


@pytest.mark.slow
def test_training_goes_on_from_a_whole_state_only(run: Path, capsys: pytest.CaptureFixture):
    average(str(run), out="mean")
    for beginning, num_steps, code in (("--branch_from", 16, 1), ("--init_from", 4, 0)):
        flags = f"--config configs/tiny.py {beginning} mean@12 --num_steps {num_steps}"
        flags += " --run_dir runs/new"
        assert run_main(partial(launch.main, flags.split())) == code, beginning
    assert "holds weights only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"steps": [8]}, "found 1 checkpoint"),
        ({"last": 1}, "--last: found 1, expected at least 2"),
        ({"steps": [8, 9]}, "no such checkpoint"),
        ({"out": "texts"}, "texts: found something there"),
        ({"out": f"{text_run.RUN}/mean"}, "lies within"),
    ],
)
def test_refusals_leave_nothing(run: Path, rules: dict[str, Any], message: str):
    before = listing(Path())
    with pytest.raises(ValueError, match=message):
        average(str(run), **rules)
    assert listing(Path()) == before


def test_a_part_that_is_damaged_is_never_averaged(run: Path, monkeypatch: pytest.MonkeyPatch):
    restore = averaging.restore_numpy

    def flip(path: Path, items: list[str]) -> Any:
        found = restore(path, items)
        if path.name == "8":
            leaf = next(iter(tiny_model.names_and_leaves(found).values()))
            leaf.reshape(-1).view(np.uint32)[0] ^= 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(averaging, "restore_numpy", flip)
        with pytest.raises(ValueError, match="8: params/.* differs from what was saved"):
            average(str(run), out="mean")
    text_run.damage(find_checkpoints(str(run)) / "8")
    with pytest.raises(ValueError, match="damaged"):
        average(str(run), steps=[4, 8], out="mean")
    assert not Path("mean").exists() and not Path(".mean.partial").exists()
