"""Of checkpoints that go, the weights stay: the same bits, at any instant; nobody resumes there."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from text_run import rewrite
from tiny_run import Table, tiny_config, train_table

from jaxlm.checkpoints import kept_weights, metadata, quarantine
from jaxlm.checkpoints.copying import copy_run
from jaxlm.checkpoints.entries import DELETING
from jaxlm.checkpoints.folder import WEIGHTS, list_steps, read_metadata, select
from jaxlm.checkpoints.kept_weights import keep_weights
from jaxlm.checkpoints.manifest import find_damage
from jaxlm.checkpoints.prune import prune
from jaxlm.checkpoints.quarantine import Purger
from jaxlm.checkpoints.restore import restore_numpy
from jaxlm.checkpoints.verify import verify_step
from jaxlm.files.durable import DiskError, folder_bytes
from jaxlm.inference.load import load_model
from jaxlm.report.table import describe_run, format_table

EVERY = {"save_interval": 1, "keep_latest": 1, "keep_weights_every": 2}
KEPT = [2, 4, 6, 8, 10]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps all of its checkpoints."""
    run = tmp_path_factory.mktemp("whole")
    train_table(tiny_config(run, checkpoint={"save_interval": 1, "keep_latest": 20}))
    return run


@pytest.fixture(scope="module")
def thinned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, which keeps one checkpoint, and the weights of every second."""
    run = tmp_path_factory.mktemp("thinned")
    train_table(tiny_config(run, checkpoint=EVERY))
    return run


def same_params(a: Path, b: Path) -> bool:
    trees = [restore_numpy(path, ["params"]) for path in (a, b)]
    return jax.tree.all(jax.tree.map(np.array_equal, *trees))


def test_a_run_keeps_the_weights_of_what_goes(tmp_path: Path, whole: Path, thinned: Path) -> None:
    folder = thinned / "checkpoints"
    assert list_steps(folder) == [12] and list_steps(folder / WEIGHTS) == KEPT
    for step in KEPT:
        path = folder / WEIGHTS / str(step)
        assert same_params(path, whole / "checkpoints" / str(step))
        assert verify_step(folder / WEIGHTS, step) == []
        assert not (path / "opt_state").exists()
        assert folder_bytes(path / "params") > 0.5 * folder_bytes(path)
        load_model(f"{thinned}@{step}", model=Table)
    assert not same_params(folder / WEIGHTS / "2", whole / "checkpoints" / "4")
    told = describe_run(str(thinned))
    assert told["weights_only"] == KEPT
    assert "weights alone of step 2, 4, 6, 8, 10" in format_table([told])
    whole_copy, one = (str(tmp_path / name) for name in ("copy", "one"))
    copy_run(str(thinned), whole_copy)
    assert describe_run(whole_copy)["weights_only"] == KEPT
    assert copy_run(f"{thinned}@4", one).steps == [4]
    for copy in (whole_copy, one):
        assert same_params(select(f"{copy}@4").path, whole / "checkpoints" / "4")
    with pytest.raises(ValueError, match="no such checkpoint"):
        select(f"{thinned}@3")


def test_nobody_goes_on_from_weights_alone(tmp_path: Path, thinned: Path) -> None:
    shutil.copytree(thinned, tmp_path / "run")
    with pytest.raises(ValueError, match=r"weights/4 holds weights only.*--init_from"):
        train_table(tiny_config(tmp_path / "new", branch_from=f"{tmp_path / 'run'}@4"))
    assert train_table(tiny_config(tmp_path / "run", num_steps=13, checkpoint=EVERY)).complete
    assert list_steps(tmp_path / "run" / "checkpoints" / WEIGHTS) == [*KEPT, 12]


@pytest.fixture
def doomed(tmp_path: Path, whole: Path) -> Path:
    """Step 4 of a folder, on its way out."""
    folder = Path(shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints"))
    (folder / DELETING).mkdir(exist_ok=True)
    return (folder / "4").rename(folder / DELETING / "4")


def promise(folder: Path) -> None:
    """As if the run had been told to keep the weights of every fourth step."""
    config = read_metadata(folder, 12).config
    config["checkpoint"]["keep_weights_every"] = 4
    rewrite(folder / "12", config=config)


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (kept_weights, "link"),
        (metadata, "write_file"),
        (kept_weights, "fsync"),
        (kept_weights.Path, "rename"),
    ],
)
def test_a_kill_at_any_instant_costs_nothing(
    doomed: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    folder = doomed.parent.parent
    real, num_kills = getattr(owner, name), 0
    while True:
        calls = iter(range(num_kills))

        def killed(*args, calls=calls):
            if next(calls, None) is None:
                raise Killed
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            try:
                keep_weights(doomed, folder)
                break
            except Killed:
                num_kills += 1
        assert find_damage(doomed) == []
        there = list_steps(folder / WEIGHTS)
        assert all(find_damage(folder / WEIGHTS / str(step)) == [] for step in there)
    assert num_kills >= 1
    assert same_params(folder / WEIGHTS / "4", whole / "checkpoints" / "4")
    (doomed / "manifest.json").unlink()  # a kill in its deletion
    before = (folder / WEIGHTS / "4").stat().st_ino
    keep_weights(doomed, folder)
    assert (folder / WEIGHTS / "4").stat().st_ino == before


def test_what_a_full_disk_refuses_is_kept_for_the_next_time(
    doomed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = doomed.parent.parent
    purger = Purger(folder, keep_weights_every=4)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(metadata, "write_file", refuse)
        purger.purge()
        purger.join()
    assert find_damage(doomed) == [] and list_steps(folder / WEIGHTS) == []
    purger.purge(folder / "5")
    purger.join()
    assert list_steps(folder / WEIGHTS) == [4] and not any(doomed.parent.iterdir())


@pytest.mark.parametrize("error", [DiskError("no answer"), ValueError("of another version")])
def test_what_cannot_be_kept_holds_up_no_other_deletion(
    doomed: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = doomed.parent.parent
    monkeypatch.setattr(quarantine, "keep_weights", Mock(side_effect=error))
    purger = Purger(folder, keep_weights_every=4)
    purger.purge(*(folder / str(step) for step in (3, 5, 6)))
    purger.join()
    assert list_steps(doomed.parent) == [4]


def test_pruning_keeps_the_weights_that_a_killed_run_was_to_keep(doomed: Path, whole: Path) -> None:
    folder = doomed.parent.parent
    promise(folder)
    prune(str(folder))
    assert same_params(folder / WEIGHTS / "4", whole / "checkpoints" / "4")
    assert not any((folder / DELETING).iterdir())


def test_pruning_stops_before_it_would_delete_what_cannot_be_kept(
    doomed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = doomed.parent.parent
    promise(folder)
    before = list_steps(folder)
    monkeypatch.setattr(quarantine, "keep_weights", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(RuntimeError, match=r"\['4'\] cannot be deleted; look at its disk"):
        prune(str(folder))
    assert find_damage(doomed) == [] and list_steps(folder) == before


def test_pruning_keeps_the_weights_that_the_run_would_keep(tmp_path: Path, whole: Path) -> None:
    folder = Path(shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints"))
    promise(folder)
    prune(str(folder))
    assert list_steps(folder) == [12] and list_steps(folder / WEIGHTS) == [4, 8]
    assert same_params(folder / WEIGHTS / "8", whole / "checkpoints" / "8")


def test_a_run_killed_right_after_its_last_commit_ends_as_one_in_one_piece(
    tmp_path: Path, whole: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    assert train_table(tiny_config(tmp_path, checkpoint=EVERY)).complete
    folder = tmp_path / "checkpoints"
    assert list_steps(folder) == [12] and list_steps(folder / WEIGHTS) == KEPT
