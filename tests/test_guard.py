"""A step that is not finite, or an outlier, is not applied; too many in a row stop the run."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from test_train import _StopAtOnce
from tiny_run import VOCAB, TinyBatches, tiny_config, train_table

from jaxlm.checkpoints.folder import list_steps
from jaxlm.config import Config, GuardConfig
from jaxlm.device import guard
from jaxlm.proof.attempt import untimed_rows
from jaxlm.report.diff import diff_checkpoints

WINDOW = 4
GUARDED = GuardConfig(outlier_zscore=2.0)


@pytest.fixture(autouse=True)
def short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WINDOW", WINDOW)


def noise(index: int, shape: Any) -> np.ndarray:
    """Targets whose loss is far above what the model has learned to expect."""
    return np.random.default_rng(index).integers(0, VOCAB, shape).astype(np.int32)


class SpoiltBatches(TinyBatches):
    def __init__(self, *spoilt: int) -> None:
        self.spoilt = spoilt

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        batch = super().__call__(index, rows)
        if index in self.spoilt:
            batch["targets"] = noise(index, batch["targets"].shape)
        return batch


class BrokenBatches(SpoiltBatches):
    """In the spoilt ones nothing is a target, and a mean over nothing is not a number."""

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        batch = TinyBatches.__call__(self, index, rows)
        weight = np.float32(index not in self.spoilt)
        return batch | {"loss_mask": np.full(batch["targets"].shape, weight)}


def config_of(run_dir: Path, guarded: GuardConfig = GUARDED, **changes: Any) -> Config:
    checkpoint = {"save_interval": 1, "keep_latest": 12}
    plan: dict[str, Any] = {"num_steps": 12, "eval_interval": 6, "checkpoint": checkpoint}
    return tiny_config(run_dir, guard=guarded, **(plan | changes))


@pytest.fixture(scope="module")
def spoilt_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Batches 7 and 8, those of steps 8 and 9, are noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guard, "WINDOW", WINDOW)
        run_dir = tmp_path_factory.mktemp("spoilt")
        assert train_table(config_of(run_dir), batches=SpoiltBatches(7, 8)).complete
    return run_dir


def changed(run: Path, before: int, after: int) -> set[str]:
    """The items that differ between two steps."""
    found = diff_checkpoints(f"{run}@{before}", f"{run}@{after}")
    return {leaf.name.partition("/")[0] for leaf in found}


def test_an_outlier_is_not_applied_and_written_down(spoilt_run: Path) -> None:
    assert changed(spoilt_run, 7, 9) == {"state"}
    assert changed(spoilt_run, 9, 10) >= {"params", "opt_state"}
    rows = [row for row in untimed_rows(spoilt_run) if "train/loss" in row]
    assert [row["train/skipped_steps"] for row in rows] == [0] * 7 + [1] + [2] * 4
    assert min(row["train/loss"] for row in rows[7:9]) > max(row["train/loss"] for row in rows[9:])
    events = map(json.loads, (spoilt_run / "events.jsonl").read_text().splitlines())
    told = {event["step"]: event["why"] for event in events if event["event"] == "skipped"}
    assert told.keys() == {8, 9}
    assert told[8].startswith("its loss or gradient norm is an outlier (loss ")


@pytest.mark.slow
def test_without_a_limit_the_outlier_is_applied(tmp_path: Path) -> None:
    train_table(config_of(tmp_path, GuardConfig()), batches=SpoiltBatches(7, 8))
    assert changed(tmp_path, 7, 8) >= {"params", "opt_state"}


@pytest.mark.slow
def test_stopped_among_its_outliers_a_run_ends_with_the_same_bits(
    spoilt_run: Path, tmp_path: Path
) -> None:
    class StopAtOnce(_StopAtOnce, SpoiltBatches):
        spoilt = (7, 8)

    stops = [train_table(config_of(tmp_path), batches=StopAtOnce(6)).step]
    while stops[-1] < 11:
        stops.append(train_table(config_of(tmp_path), batches=StopAtOnce(stops[-1])).step)
    assert {7, 8, 9} < set(stops)
    assert train_table(config_of(tmp_path), batches=SpoiltBatches(7, 8)).complete
    assert diff_checkpoints(f"{tmp_path}@12", f"{spoilt_run}@12") == []
    assert untimed_rows(tmp_path) == untimed_rows(spoilt_run)


@pytest.mark.parametrize(
    ("batches", "guarded"),
    [
        (BrokenBatches(6, 7, 8), GuardConfig(max_skipped=3)),
        (SpoiltBatches(6, 7, 8), GuardConfig(outlier_zscore=2.0, max_skipped=3)),
    ],
    ids=["not finite", "outliers"],
)
def test_many_in_a_row_stop_the_run(
    tmp_path: Path, batches: TinyBatches, guarded: GuardConfig
) -> None:
    with pytest.raises(RuntimeError, match="3 steps in a row up to 9 were not applied; go back"):
        train_table(config_of(tmp_path, guarded), batches=batches)
    assert max(list_steps(tmp_path / "checkpoints")) == 8  # 9 is not saved
    assert changed(tmp_path, 6, 8) == {"state"}


def test_few_that_are_not_finite_are_counted_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, GuardConfig(), checkpoint={"save_interval": 12})
    assert train_table(config, batches=BrokenBatches(5)).complete
    said = capsys.readouterr().out
    assert "step 6 was not applied: its loss or gradient is not finite (loss nan, grad" in said
    assert untimed_rows(tmp_path)[-2]["train/skipped_steps"] == 1


# --- what an outlier is


def applied(losses: list[float], norms: list[float] | None = None, zscore: float | None = 5.0):
    """Whether each of these steps is."""
    state, found = guard.make_guard(), []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        values = jnp.float32(loss), jnp.float32(norm)
        finite = jnp.isfinite(values[0]) & jnp.isfinite(values[1])
        ok, state = guard.judge(state, *values, finite, zscore)
        found.append(bool(ok))
    return found, state


def test_an_outlier_differs_from_noise_and_from_the_start() -> None:
    calm, nan = [3.0, 3.1, 2.9, 3.0], float("nan")
    yes = [True] * 4
    assert applied([9.0, 3.0, 9.0, 3.0])[0] == yes  # the window is not full
    assert applied([*calm, 3.2, 2.8])[0] == yes + [True, True]
    assert applied([*calm, 5.0, 5.0, 3.0])[0] == yes + [False, False, True]
    assert applied([*calm, 5.0, 5.0], zscore=None)[0] == yes + [True, True]
    assert applied([*calm, nan, 3.0])[0] == yes + [False, True]
    assert applied([*calm, 0.1])[0] == yes + [True]  # none for being low
    assert applied([3.0] * 4 + [3.04])[0] == yes + [True]  # it hardly varies: 0.04 nats are noise
    assert applied([3.0] * 5, [*calm, 9.0])[0] == yes + [False]  # by the gradient alone


def test_what_is_not_finite_is_counted_and_leaves_the_window_alone() -> None:
    _, state = applied([3.0, 4.0, float("inf"), float("nan")])
    assert (int(state.skipped_steps), int(state.consecutive_skips)) == (2, 2)
    np.testing.assert_array_equal(state.losses[-2:], [3.0, 4.0])
    assert state.losses.shape == state.grad_norms.shape == (WINDOW,)
