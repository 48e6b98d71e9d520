"""Readers beside a trainer, which deletes the very step that they read: they choose again."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import text_run

from jaxlm.checkpoints import folder as folders
from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.folder import MAX_CHOICES, Selected, select
from jaxlm.checkpoints.reading import read
from jaxlm.checkpoints.verify import verify_step
from jaxlm.evaluation.score import score
from jaxlm.inference import load
from jaxlm.inference.load import load_model
from jaxlm.inference.reader import ScoringModel
from jaxlm.inference.sample import Sampling, sample_run
from jaxlm.interchange.export import export
from jaxlm.report import diff
from jaxlm.report.diff import diff_checkpoints

BEST, NEXT = text_run.BEST, 4


@pytest.fixture
def folder(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(own_home)
    return own_home / text_run.RUN / "checkpoints"


def deleting(path: Path, real: Callable) -> Callable:
    """As a trainer does it: at the first call, the step goes while it is read."""

    def called(*args, **kwargs):
        if path.exists():
            shutil.rmtree(path)
        return real(*args, **kwargs)

    return called


READERS = {
    "load_model": lambda run: load_model(run)[1].step,
    "sample": lambda run: len(sample_run(run, ["a"], Sampling(1, temperature=0))) and NEXT,
    "eval": lambda run: score([run])[0].step,
    "ScoringModel": lambda run: ScoringModel.of_run(run).step,
    "export": lambda run: export(run, "out").step,
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_by_name_takes_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    gone = deleting(folder / str(BEST), load.restore_weights)
    monkeypatch.setattr(load, "restore_weights", gone)
    assert READERS[name](f"{text_run.RUN}@best") == NEXT and not (folder / str(BEST)).exists()


def test_a_reader_by_number_says_in_a_line_that_it_is_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "restore_weights", deleting(folder / str(BEST), load.restore_weights))
    with pytest.raises(ValueError, match=rf"@{BEST}: there is no such checkpoint; .* 4, 12$"):
        load_model(f"{text_run.RUN}@{BEST}")


def test_a_difference_is_that_of_what_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "restore_numpy", deleting(folder / "12", diff.restore_numpy))
    assert diff_checkpoints(f"{text_run.RUN}@latest", f"{text_run.RUN}@{BEST}") == []


@pytest.mark.parametrize("owner", [manifest, folders])
def test_what_goes_while_it_is_chosen_is_not_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: object
) -> None:
    name = "find_damage" if owner is manifest else "read_metadata"
    real, calls = getattr(owner, name), iter(range(99))

    def called(*args, **kwargs):
        if next(calls) == 3:  # after the quick look at all three
            shutil.rmtree(folder / str(BEST))
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)
    selected = select(f"{text_run.RUN}@best")
    assert (selected.step, selected.passed_over) == (NEXT, {})


def test_the_choices_are_bounded_and_an_error_of_the_reader_is_its_own(folder: Path) -> None:
    seen = []

    def late(selected: Selected) -> None:
        seen.append(selected.step)
        selected.path.touch()  # as if another had been put there
        raise FileNotFoundError

    with pytest.raises(ValueError, match=rf"chosen {MAX_CHOICES} times, and deleted"):
        read(text_run.RUN, late)
    assert seen == [BEST] * MAX_CHOICES

    def fails(selected: Selected) -> None:
        raise ValueError("of another model")

    with pytest.raises(ValueError, match="of another model"):
        read(text_run.RUN, fails)


def test_a_step_that_goes_while_it_is_verified_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path, **_: object) -> None:
        shutil.rmtree(path)
        raise FileNotFoundError(path)

    monkeypatch.setattr("jaxlm.checkpoints.verify.find_damage", gone)
    assert verify_step(folder, 4) is None
