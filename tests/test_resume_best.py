"""`--resume best` goes back to the best, sets the rest aside, and survives kills in that."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_events import KilledError, kill_at, tells_the_disk
from text_run import damage, rewrite
from tiny_run import TinyBatches, tiny_config, train_table

from jaxlm.checkpoints import checkpoint, held, quarantine
from jaxlm.checkpoints.folder import list_steps, select
from jaxlm.checkpoints.metadata import FORMAT
from jaxlm.config import Config, OptimConfig
from jaxlm.proof.attempt import untimed_rows
from jaxlm.report.diff import diff_checkpoints
from jaxlm.tracking.events import Events

GENTLE = OptimConfig(learning_rate=1e-2, warmup_steps=2)
RUINOUS = replace(GENTLE, learning_rate=3.0)


def config_of(run_dir: Path, **changes: Any) -> Config:
    defaults: dict[str, Any] = {"num_steps": 12, "eval_interval": 6, "optim": GENTLE}
    defaults["checkpoint"] = {"save_interval": 2, "keep_latest": 6}
    return tiny_config(run_dir, **(defaults | changes))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != quarantine.DELETING)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, and six more: what going back to step 6 must come to."""
    run_dir = tmp_path_factory.mktemp("straight")
    for num_steps in (6, 12):
        assert train_table(config_of(run_dir, num_steps=num_steps)).complete
    return run_dir


@pytest.fixture(scope="module")
def ruined_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, then six that ruin it; only to be read."""
    run_dir = tmp_path_factory.mktemp("ruined")
    train_table(config_of(run_dir, num_steps=6))
    train_table(config_of(run_dir, optim=RUINOUS))
    assert select(f"{run_dir}@best").step == 6
    return run_dir


@pytest.fixture
def ruined(ruined_once: Path, tmp_path: Path) -> Path:
    """A copy, to go back in."""
    return shutil.copytree(ruined_once, tmp_path / "ruined")


def go_back(run: Path, **changes: Any) -> None:
    assert train_table(config_of(run, resume="best", **changes)).complete


def test_it_goes_back_once(straight: Path, ruined: Path) -> None:
    folder = ruined / "checkpoints"
    go_back(ruined)
    assert [f"{step}.superseded" for step in (10, 12, 8)] == [
        path.name for path in sorted(folder.glob("*.superseded"))
    ]
    assert select(f"{ruined}@best").step == 12
    assert diff_checkpoints(f"{ruined}@12", f"{straight}@12") == []
    assert untimed_rows(ruined) == untimed_rows(straight)
    before = names_in(folder)
    go_back(ruined)  # a scheduler that starts it again changes nothing
    assert names_in(folder) == before
    for _ in range(2):  # also where it has come to a worse end since
        go_back(ruined, num_steps=18, optim=RUINOUS)
        assert (select(f"{ruined}@best").step, max(list_steps(folder))) == (12, 18)
        assert not (folder / "18.superseded").exists()


@pytest.mark.parametrize(
    ("module", "name", "when"),
    [
        (checkpoint.Checkpoints, "_put_aside", 1),  # nothing is renamed
        (Path, "rename", 1),
        (Path, "rename", 2),  # some are
        (held, "list_old_superseded", 1),  # all are
        (Events, "compare", 1),
        (checkpoint.Checkpoints, "retain", 1),  # it has gone back
    ],
)
def test_killed_on_the_way_back_it_ends_with_the_same_bits(
    straight: Path,
    ruined: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    when: int,
) -> None:
    real = checkpoint.Checkpoints.go_back

    def killed(self: checkpoint.Checkpoints, *args: Any) -> None:
        kill_at(monkeypatch, module, name, when)
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "go_back", killed)
        with pytest.raises(KilledError):
            go_back(ruined)
    monkeypatch.undo()
    go_back(ruined)
    assert diff_checkpoints(f"{ruined}@12", f"{straight}@12") == []
    assert untimed_rows(ruined) == untimed_rows(straight)
    assert tells_the_disk(ruined)
    names = names_in(ruined / "checkpoints")
    assert {"8.superseded", "10.superseded", "12.superseded"} < set(names)


def test_the_superseded_follow_retention(ruined: Path) -> None:
    go_back(ruined, checkpoint={"save_interval": 2, "keep_latest": 2})
    found = sorted(path.name for path in (ruined / "checkpoints").glob("*.superseded"))
    assert found == ["10.superseded", "12.superseded"]


def test_the_superseded_that_stay_are_the_last_set_aside(tmp_path: Path) -> None:
    for step in (800, 900, 1000, 600):  # 600: the run has gone back again, from another future
        (tmp_path / str(step)).mkdir()
        quarantine.put_aside(tmp_path, [step], ".superseded")
        time.sleep(0.02)
    old = quarantine.list_old_superseded(tmp_path, 3)
    assert [path.name for path in old] == ["800.superseded"]


def test_nothing_is_set_aside_for_a_best_that_cannot_be_had(ruined: Path) -> None:
    folder = ruined / "checkpoints"
    before = names_in(folder)
    other = TinyBatches()
    other.fingerprint = "other"
    with pytest.raises(ValueError, match="data: found fingerprint other"):
        train_table(config_of(ruined, resume="best"), batches=other)
    assert names_in(folder) == before


def test_a_damaged_best_is_reported_and_the_next_one_taken(
    ruined: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = select(f"{ruined}@best").path
    damage(best)
    go_back(ruined, num_steps=14)
    assert "checkpoint 6 is damaged" in capsys.readouterr().out
    assert f"{best.name}.corrupt" in names_in(ruined / "checkpoints")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"of_the_future": 1}, "written by another version"),
        ({"format": 1}, f"found format 1, expected {FORMAT}; use the jaxlm that wrote it"),
    ],
)
def test_a_checkpoint_of_another_version_is_no_reason_to_begin_anew(
    ruined: Path, change: dict[str, int], told: str
) -> None:
    for step in list_steps(ruined / "checkpoints"):
        rewrite(ruined / "checkpoints" / str(step), **change)
    before = names_in(ruined / "checkpoints")
    with pytest.raises(ValueError, match=told):
        train_table(config_of(ruined, num_steps=14))
    assert names_in(ruined / "checkpoints") == before


@pytest.mark.slow
def test_weights_of_a_future_that_was_given_up_are_not_taken_for_the_step(tmp_path: Path) -> None:
    # Milestones of steps 4, 8 and 10 are kept as weights alone.
    checkpoint = {"save_interval": 2, "keep_latest": 1, "keep_weights_every": 2}
    train_table(config_of(tmp_path, num_steps=6, checkpoint=checkpoint))
    train_table(config_of(tmp_path, optim=RUINOUS, checkpoint=checkpoint))
    assert select(f"{tmp_path}@8").path.parent.name == "weights"
    go_back(tmp_path, num_steps=7, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="no such checkpoint"):
        select(f"{tmp_path}@8")
    assert select(f"{tmp_path}@4").step == 4
