"""A run whose loss goes bad goes back, passes over the bad batches, and survives kills in that."""

import itertools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_run import rewrite
from tiny_run import VOCAB, TinyBatches, TinyEvalSet, tiny_config, train_table

from jaxlm.checkpoints import checkpoint, quarantine, skips
from jaxlm.checkpoints.checkpoint import CheckpointError
from jaxlm.checkpoints.folder import list_steps, read_metadata, scan_folder, select
from jaxlm.checkpoints.skips import Skip, held_by, skipped
from jaxlm.config import Config, GuardConfig, OptimConfig
from jaxlm.device import guard
from jaxlm.files import durable
from jaxlm.proof.attempt import untimed_rows
from jaxlm.report.diff import diff_checkpoints
from jaxlm.report.table import describe_run, format_table
from jaxlm.training.train import Result

WINDOW = 4


@pytest.fixture(autouse=True)
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LOSS_WINDOW", WINDOW)


class SpoiltBatches(TinyBatches):
    """Some batches hold noise, whose loss is far above what the model has learned to expect."""

    def __init__(self, *spoilt: int) -> None:
        self.spoilt, self.asked = spoilt, []

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        self.asked.append(index)
        batch = super().__call__(index, rows)
        if index in self.spoilt:
            noise = np.random.default_rng(index).integers(0, VOCAB, batch["targets"].shape)
            batch["targets"] = noise.astype(np.int32)
        return batch


def _config(run_dir: Path, **changes: Any) -> Config:
    guarded = GuardConfig(spike_zscore=5.0, spike_steps=2)
    defaults: dict[str, Any] = {"num_steps": 24, "guard": guarded, "eval_interval": 6}
    defaults["checkpoint"] = {"save_interval": 2}
    return tiny_config(run_dir, **(defaults | changes))


def _train(config: Config, *spoilt: int) -> Result:
    return train_table(config, batches=SpoiltBatches(*spoilt))


@pytest.fixture(scope="module")
def spoilt_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "LOSS_WINDOW", WINDOW)
        run_dir = tmp_path_factory.mktemp("spoilt")
        assert _train(_config(run_dir), 13, 14).complete
    return run_dir


def test_a_spike_is_passed_over_and_written_down(spoilt_run: Path) -> None:
    folder = spoilt_run / "checkpoints"
    # Batches 13 and 14 make the spike, seen at step 15; 12 is the newest checkpoint before 13.
    (skip,) = skips.read_skips(folder) or []
    assert (skip.from_step, skip.num_batches) == (12, 3)
    assert skip.why == "the loss spiked in 2 steps up to 15"
    metadata = read_metadata(folder, 24)
    assert metadata.skips == [skip]
    assert read_metadata(folder, 20).skips == metadata.skips
    assert metadata.tokens_seen == 24 * 8 * 16
    table = format_table([describe_run(str(spoilt_run))])
    assert "went back to step 12, past 3 batches: the loss spiked in 2 steps up to 15" in table
    rows = untimed_rows(spoilt_run)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 25))
    assert max(row["train/loss"] for row in rows[13:] if "train/loss" in row) < 4.2


def test_the_batches_after_a_rollback_are_those_after_the_spike(tmp_path: Path) -> None:
    batches = SpoiltBatches(13, 14)
    config = _config(tmp_path, num_steps=18)
    train_table(config, batches=batches)
    asked = [index for index, _ in itertools.groupby(batches.asked)][1:]
    back = asked.index(15, asked.index(14))  # prefetched before the spike was seen
    after = asked[asked.index(15, back + 1) if 15 in asked[back + 1 :] else back :]
    assert after[-6:] == [15, 16, 17, 18, 19, 20]


def test_without_the_guard_the_spike_stays(tmp_path: Path, spoilt_run: Path) -> None:
    assert _train(_config(tmp_path, guard=GuardConfig()), 13, 14).complete
    assert not (tmp_path / "checkpoints" / skips.NAME).exists()
    assert max(row.get("train/loss", 0) for row in untimed_rows(tmp_path)[13:]) > 4.2
    assert diff_checkpoints(str(tmp_path), str(spoilt_run)) != []


class _KilledError(BaseException):
    """Ends a run as a kill would: nothing of ours catches it."""


def _kill_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, when: int) -> None:
    real: Callable[..., Any] = getattr(module, name)
    calls = itertools.count(1)

    def killed(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == when:
            raise _KilledError
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, killed)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (checkpoint, "write_skips"),  # before the entry is on disk
        (durable, "fsync"),  # after the replace of some file
        (checkpoint.Checkpoints, "_put_aside"),  # entry written, nothing renamed
        (checkpoint, "list_old_superseded"),  # renamed
        (checkpoint.Checkpoints, "restore_latest"),
    ],
)
def test_killed_in_a_rollback_it_ends_with_the_same_bits(
    spoilt_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    config = _config(tmp_path)
    num_killed = 0
    for when in (1, 2):
        with monkeypatch.context() as patch:
            if name == "fsync":
                patch.setattr(checkpoint, "write_skips", _cut_short(checkpoint.write_skips))
            else:
                _kill_at(patch, module, name, when)
            try:
                _train(config, 13, 14)
            except _KilledError:
                num_killed += 1
    assert num_killed
    assert _train(config, 13, 14).complete
    assert diff_checkpoints(f"{tmp_path}@24", f"{spoilt_run}@24") == []
    assert untimed_rows(tmp_path) == untimed_rows(spoilt_run)
    assert read_metadata(tmp_path / "checkpoints", 24).skips


def _cut_short(write: Callable[..., None]) -> Callable[..., None]:
    def written_and_killed(*args: Any) -> None:
        write(*args)
        raise _KilledError

    return written_and_killed


def test_superseded_checkpoints_are_no_ones_best_or_latest(tmp_path: Path) -> None:
    # A save at each step: 13 and 14 are on disk when the spike is seen at 15.
    config = _config(tmp_path, checkpoint={"save_interval": 1, "keep_latest": 6}, num_steps=15)
    checkpoint = {"save_interval": 1, "keep_latest": 6}
    guarded = GuardConfig(spike_zscore=5.0, spike_steps=2, max_rollbacks=0)
    with pytest.raises(CheckpointError, match="guard.max_rollbacks = 0"):
        _train(_config(tmp_path, guard=guarded, checkpoint=checkpoint), 13, 14)
    folder = tmp_path / "checkpoints"
    assert max(list_steps(folder)) == 14
    skips.write_skips(folder, [Skip(12, 3, "test")])  # killed before anything was renamed
    assert scan_folder(folder).superseded == [13, 14]
    assert select(f"{tmp_path}@latest").step == 12
    with pytest.raises(ValueError, match="no such checkpoint"):
        select(f"{tmp_path}@13")
    assert _train(config, 13, 14).complete
    assert (folder / "13.superseded").is_dir() and (folder / "14.superseded").is_dir()
    assert read_metadata(folder, 13).skips  # made again


def test_superseded_checkpoints_follow_retention(tmp_path: Path) -> None:
    config = _config(tmp_path, checkpoint={"save_interval": 1, "keep_latest": 2}, num_steps=16)
    assert _train(config, 13, 14).complete
    found = sorted(p.name for p in (tmp_path / "checkpoints").glob("*.superseded*"))
    assert found == ["13.superseded", "14.superseded"]


def test_the_superseded_that_stay_are_the_last_set_aside(tmp_path: Path) -> None:
    for step in (800, 900, 1000, 600):  # the second rollback was from another, shorter way
        (tmp_path / str(step)).mkdir()
        quarantine.put_aside(tmp_path, [step], ".superseded")
        time.sleep(0.02)
    old = quarantine.list_old_superseded(tmp_path, 3)
    assert [path.name for path in old] == ["800.superseded"]


def test_a_lost_or_damaged_list_of_skips_is_had_from_the_checkpoints(
    spoilt_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(spoilt_run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / skips.NAME
    whole = path.read_bytes()
    for damaged in (None, b"", whole[:-3], whole.replace(b'"num_batches": 3', b'"num_batches": 4')):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        assert damaged != whole
        found = scan_folder(path.parent)
        assert found.skips and found.skips[0].num_batches == 3
        assert 24 in found.sound and found.superseded == []


def test_rollbacks_are_limited(tmp_path: Path) -> None:
    guarded = GuardConfig(spike_zscore=5.0, spike_steps=2, max_rollbacks=1)
    with pytest.raises(CheckpointError, match="guard.max_rollbacks = 1"):
        _train(_config(tmp_path, guard=guarded), 13, 14, 19, 20, 21, 22, 23, 24)
    assert len(skips.read_skips(tmp_path / "checkpoints") or []) == 1


class BrokenBatches(TinyBatches):
    """From some batch on, nothing is a target, and a mean over nothing is not a number."""

    def __init__(self, *broken: int) -> None:
        self.broken = broken

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        batch = super().__call__(index, rows)
        weight = np.float32(index not in self.broken)
        return batch | {"loss_mask": np.full(batch["targets"].shape, weight)}


def test_nonfinite_steps_in_a_row_stop_the_run_or_roll_it_back(tmp_path: Path) -> None:
    def run(name: str, **guarded: Any) -> Result:
        config = _config(
            tmp_path / name, num_steps=14, guard=GuardConfig(max_nonfinite=3, **guarded)
        )
        return train_table(config, batches=BrokenBatches(9, 10, 11))

    with pytest.raises(RuntimeError, match="3 steps in a row up to 12 were not finite; lower"):
        run("stopped")
    assert max(list_steps(tmp_path / "stopped" / "checkpoints")) == 10  # 12 is not saved
    assert run("back", on_nonfinite="rollback").complete
    (skip,) = skips.read_skips(tmp_path / "back" / "checkpoints") or []
    assert (skip.from_step, skip.num_batches) == (8, 4)
    last = untimed_rows(tmp_path / "back")[-2]
    assert last["train/nonfinite_steps"] == 0  # they were taken back


def test_few_nonfinite_steps_are_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, num_steps=12, checkpoint={"save_interval": 12})
    assert train_table(config, batches=BrokenBatches(5)).complete
    assert "step 6 was not finite, and left params and optimizer alone" in capsys.readouterr().out
    assert untimed_rows(tmp_path)[-2]["train/nonfinite_steps"] == 1


def test_resume_best_goes_back_once(tmp_path: Path) -> None:
    def run(name: str, num_steps: int, learning_rate: float, **changes: Any) -> None:
        optim = OptimConfig(learning_rate=learning_rate, warmup_steps=2)
        plan = {"num_steps": num_steps, "optim": optim, "guard": GuardConfig()}
        plan["checkpoint"] = {"save_interval": 12}
        assert _train(_config(tmp_path / name, **plan, **changes)).complete

    folder = tmp_path / "ruined" / "checkpoints"
    run("ruined", 12, 1e-2)
    run("ruined", 24, 3.0)
    assert select(f"{tmp_path}/ruined@best").step == 12
    run("ruined", 24, 1e-2, resume="best")
    assert (folder / "24.superseded").is_dir()
    assert select(f"{tmp_path}/ruined@best").step == 24
    run("straight", 12, 1e-2)
    run("straight", 24, 1e-2)
    assert diff_checkpoints(f"{tmp_path}/ruined@24", f"{tmp_path}/straight@24") == []
    before = [path.name for path in folder.iterdir()]
    run("ruined", 24, 1e-2, resume="best")  # a scheduler that starts it again changes nothing
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)
    for _ in range(2):  # also where it has come to a worse end since
        run("ruined", 36, 3.0, resume="best")
        assert (select(f"{tmp_path}/ruined@best").step, max(list_steps(folder))) == (24, 36)
        assert not (folder / "36.superseded").exists()


def test_init_from_takes_the_weights_alone(tmp_path: Path) -> None:
    assert _train(_config(tmp_path / "a", num_steps=8, checkpoint={"save_interval": 8})).complete
    config = _config(tmp_path / "b", num_steps=4, init_from=f"{tmp_path}/a@8", seed=1)
    assert _train(config).complete
    metadata = read_metadata(tmp_path / "b" / "checkpoints", 4)
    assert metadata.tokens_seen == 4 * 8 * 16
    assert metadata.lineage[-1] == {
        "step": 0,
        "initialized_from": f"{tmp_path}/a/checkpoints/8",
    }
    first = {name: untimed_rows(tmp_path / name)[0]["train/loss"] for name in "ab"}
    assert first["b"] < first["a"] - 0.3
    with pytest.raises(ValueError, match="init_from: found"):
        _config(tmp_path / "c", init_from="x", branch_from="y")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != quarantine.DELETING)


def test_a_second_rollback_past_the_first_passes_over_all_of_both(tmp_path: Path) -> None:
    config = _config(tmp_path, checkpoint={"save_interval": 4, "keep_latest": 9})
    assert _train(config, 13, 14, 15, 16).complete
    found = skips.read_skips(tmp_path / "checkpoints") or []
    assert [(skip.from_step, skip.num_batches) for skip in found] == [(12, 3), (8, 9)]
    assert [skipped(found, step) for step in (7, 8, 12, 20)] == [0, 9, 9, 9]  # 8 takes batch 17
    assert max(row.get("train/loss", 0) for row in untimed_rows(tmp_path)[10:]) < 4.2
    # A run that only went back passes over what it knows to be bad all the same.
    assert skipped([Skip(12, 3, ""), Skip(8, 0, "")], 12) == 3


def test_a_branch_passes_over_what_its_source_did(spoilt_run: Path, tmp_path: Path) -> None:
    config = _config(tmp_path, branch_from=f"{spoilt_run}@20")
    assert _train(config, 13, 14).complete
    assert diff_checkpoints(f"{tmp_path}@24", f"{spoilt_run}@24") == []


def test_a_branch_that_spikes_at_once_goes_back_to_where_it_began(
    spoilt_run: Path, tmp_path: Path
) -> None:
    config = _config(tmp_path, branch_from=f"{spoilt_run}@20", num_steps=30)
    config = replace(config, checkpoint=replace(config.checkpoint, save_interval=9))
    assert _train(config, 13, 14, 24, 25).complete
    last = (skips.read_skips(tmp_path / "checkpoints") or [])[-1]
    assert (last.from_step, last.num_batches) == (20, 3)


def test_nothing_is_set_aside_for_a_best_that_cannot_be_had(tmp_path: Path) -> None:
    _train(_config(tmp_path, num_steps=12, guard=GuardConfig()))
    ruined = _config(
        tmp_path, guard=GuardConfig(), optim=OptimConfig(learning_rate=3.0, warmup_steps=2)
    )
    _train(ruined)
    folder = tmp_path / "checkpoints"
    before = _names(folder)
    other = SpoiltBatches()
    other.fingerprint = "other"
    with pytest.raises(ValueError, match="data: found fingerprint other"):
        train_table(replace(ruined, resume="best"), batches=other)
    assert _names(folder) == before
    best = select(f"{tmp_path}@best").path
    largest = max((best / "params").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    steps = list_steps(folder)
    _train(replace(ruined, resume="best", num_steps=26))
    assert f"{best.name}.corrupt" in _names(folder)  # and the next best is gone on from
    assert len(steps) == 4


def test_a_run_does_not_begin_again_among_damaged_checkpoints(tmp_path: Path) -> None:
    config = _config(tmp_path, checkpoint={"save_interval": 12}, eval_interval=24)

    def plant(step: int, row: dict[str, float]) -> None:
        (tmp_path / "checkpoints" / "6.corrupt").mkdir(exist_ok=True)

    sets = {"batches": SpoiltBatches(10, 11), "eval_batches": TinyEvalSet()}
    with pytest.raises(CheckpointError, match="no older checkpoint is sound, there is only 6"):
        train_table(config, **sets, callbacks=[plant])
    assert not (tmp_path / "checkpoints" / skips.NAME).exists()


def test_a_rollback_sets_aside_what_is_damaged_and_never_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"

    def damage(step: int, row: dict[str, float]) -> None:
        for path in folder.glob("[0-9]*/manifest.json"):
            path.write_bytes(b"")

    sets = {"batches": SpoiltBatches(10, 11), "eval_batches": TinyEvalSet()}
    with pytest.raises(
        CheckpointError, match=r"is sound, there is only \d+\.corrupt, \d+\.corrupt"
    ):
        train_table(_config(tmp_path), **sets, callbacks=[damage])
    assert "is damaged: manifest.json cannot be read" in capsys.readouterr().out
    assert not (folder / skips.NAME).exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"of_the_future": 1}, "written by another version"),
        ({"format": 1}, "found format 1, expected 2; use the jaxlm that wrote it"),
    ],
)
def test_a_checkpoint_of_another_version_is_no_reason_to_begin_anew(
    spoilt_run: Path, tmp_path: Path, change: dict[str, int], told: str
) -> None:
    run = shutil.copytree(spoilt_run, tmp_path / "run")
    for step in list_steps(run / "checkpoints"):
        rewrite(run / "checkpoints" / str(step), **change)
    before = _names(run / "checkpoints")
    with pytest.raises(ValueError, match=told):
        _train(_config(run, num_steps=26), 13, 14)
    assert _names(run / "checkpoints") == before


def test_a_damaged_list_of_skips_is_told(
    spoilt_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(spoilt_run, tmp_path / "run")
    (run / "checkpoints" / skips.NAME).write_bytes(b"{")
    _train(_config(run), 13, 14)
    assert "Warning: skips.json is damaged" in capsys.readouterr().out


# --- what a spike is


def _spike_runs(losses: list[float], zscore: float | None = 5.0) -> list[int]:
    state, found = guard.make_guard(), []
    for loss in losses:
        value = jnp.float32(loss)
        state = guard.observe(state, value, jnp.isfinite(value), zscore)
        found.append(int(state.spike_run))
    return found


def test_a_spike_is_told_from_noise_and_from_the_start() -> None:
    calm = [3.0, 3.1, 2.9, 3.0]
    assert _spike_runs([9.0, 3.0, 9.0, 3.0]) == [0, 0, 0, 0]  # the window is not full
    assert _spike_runs([*calm, 3.2, 2.8]) == [0] * 6
    assert _spike_runs([*calm, 5.0, 5.0, 3.0]) == [0] * 4 + [1, 2, 0]
    assert _spike_runs([*calm, 5.0, 5.0], zscore=None) == [0] * 6
    assert _spike_runs([*calm, 5.0, float("nan"), 5.0]) == [0] * 4 + [1, 2, 3]
    assert _spike_runs([*calm, float("nan"), 3.0]) == [0] * 6
    assert _spike_runs([3.0] * 4 + [3.04]) == [0] * 5  # it hardly varies: 0.04 nats are no spike


def test_what_a_step_skips_and_holds() -> None:
    entries = [Skip(4, 2, ""), Skip(4, 1, ""), Skip(9, 5, "")]
    assert [skipped(entries, step) for step in (3, 4, 8, 9)] == [0, 3, 3, 8]
    assert held_by(entries, 4) == [] and held_by(entries, 5) == entries[:2]
    assert json.loads(json.dumps(skips.to_json(entries)))[2]["num_batches"] == 5
    assert jax.tree.leaves(guard.make_guard())[3].shape == (WINDOW,)
