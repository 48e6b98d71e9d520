"""A run that is stopped and started again is the run that never was."""

import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import BATCH, TinyBatches, TinyEvalSet, tiny_config, train_table

from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.checkpoint import CheckpointError
from jaxlm.checkpoints.folder import list_steps, read_metadata, select
from jaxlm.checkpoints.restore import find_changed_arrays
from jaxlm.checkpoints.verify import verify_rows
from jaxlm.config import Config, MeshConfig, TrackingConfig
from jaxlm.device.loss import Batch, next_token_loss
from jaxlm.device.sharding import make_mesh
from jaxlm.inference.load import load_model
from jaxlm.proof.attempt import untimed_rows
from jaxlm.report.diff import diff_checkpoints
from jaxlm.tracking.events import read_events
from jaxlm.tracking.rows import find_row_damage
from jaxlm.training.signals import StopRequest, stop_requests
from jaxlm.training.start import hold_run_folder
from jaxlm.training.train import _alone_in_process


class _StopAtOnce(TinyBatches):
    """Sends SIGTERM as soon as the loop asks for its first batch."""

    def __init__(self, start: int) -> None:
        self.start, self.sent = start, False

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        if index == self.start and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            if not self.sent:
                self.sent = True
                os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(index, rows)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    result = train_table(tiny_config(run_dir))
    assert result.complete and result.step == 12
    return run_dir


def test_a_run_makes_its_evals_and_saves(straight: Path) -> None:
    rows = untimed_rows(straight)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "eval/loss" in row] == [3, 6, 9, 12]
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert losses[0] < math.log(64) + 0.1 and losses[-1] < losses[0] - 0.5
    # Each eval improved, so 3, 6, 9 and 12 were saved off the interval too; three are kept.
    assert list_steps(straight / "checkpoints") == [8, 9, 12]


def test_a_checkpoint_holds_what_the_note_asks_for(straight: Path) -> None:
    metadata = read_metadata(straight / "checkpoints", 12)
    assert (metadata.step, metadata.tokens_seen, metadata.final) == (12, 12 * 8 * 16, True)
    assert metadata.best_eval_loss == metadata.eval_loss and metadata.best_step == 12
    assert metadata.run_config() == tiny_config(straight)
    assert metadata.data["main"]["fingerprint"] == "tiny"
    assert metadata.environment["versions"]["jax"] == jax.__version__
    assert read_metadata(straight / "checkpoints", 8).eval_loss is None


@pytest.mark.parametrize("wandb", ["off", pytest.param("offline", marks=pytest.mark.slow)])
def test_stopped_after_every_single_step_it_ends_with_the_same_bits(
    straight: Path, tmp_path: Path, wandb: Any
) -> None:
    tracking = TrackingConfig(wandb=wandb)
    for step in range(12):
        batches = _StopAtOnce(step)
        config = tiny_config(tmp_path, tracking=tracking)
        result = train_table(config, batches=batches)
        assert (result.step, result.complete) == (step + 1, False)
    result = train_table(tiny_config(tmp_path, tracking=tracking))  # the eval of the end
    assert (result.step, result.complete) == (12, True)
    assert diff_checkpoints(f"{tmp_path}@12", f"{straight}@12") == []
    assert untimed_rows(tmp_path) == untimed_rows(straight)
    assert select(f"{tmp_path}@best").step == select(f"{straight}@best").step


def test_an_error_in_the_loop_ends_the_prefetch_thread(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as caught:
        train_table(tiny_config(tmp_path), callbacks=[fail])
    # The traceback holds the frames of the loop, and so whatever they left open.
    assert caught.tb is not None
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


class _InEval(TinyEvalSet):
    """Does something in each of these evals of a start, counted from 1."""

    def __init__(self, act: Callable[[], object], *evals: int) -> None:
        self.act, self.evals, self.count = act, evals, 0

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        if index == 1 and not rows.start:
            self.count += 1
            if self.count in self.evals:
                self.act()
        return super().__call__(index, rows)


def _send(*numbers: signal.Signals) -> Callable[[], object]:
    return lambda: [signal.raise_signal(number) for number in numbers]


def test_a_signal_in_an_eval_costs_that_eval_alone(straight: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, checkpoint={"save_interval": 100})
    sets = {"eval_batches": _InEval(_send(signal.SIGTERM), 2)}
    assert train_table(config, **sets)[:2] == (6, False)
    assert read_metadata(tmp_path / "checkpoints", 6).eval_loss is None
    assert "eval/loss" not in untimed_rows(tmp_path)[-1]
    # The eval that is owed can be stopped as well, and that of the end.
    sets["eval_batches"] = _InEval(_send(signal.SIGHUP, signal.SIGHUP), 1)
    assert train_table(config, **sets)[:2] == (6, False)
    sets["eval_batches"] = _InEval(_send(signal.SIGTERM, signal.SIGHUP), 3)
    assert train_table(config, **sets)[:2] == (12, False)
    assert not read_metadata(tmp_path / "checkpoints", 12).final
    assert train_table(config)[:2] == (12, True)
    assert diff_checkpoints(f"{tmp_path}@12", f"{straight}@12") == []
    assert untimed_rows(tmp_path) == untimed_rows(straight)
    assert select(f"{tmp_path}@best").step == select(f"{straight}@best").step


def test_a_branch_whose_first_eval_is_stopped_has_begun(straight: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, branch_from=f"{straight}@9")
    sets = {"eval_batches": _InEval(_send(signal.SIGTERM), 1)}
    assert train_table(config, **sets)[:2] == (9, False)
    assert list_steps(tmp_path / "checkpoints") == [9]
    assert train_table(config)[:2] == (12, True)
    assert diff_checkpoints(f"{tmp_path}@12", f"{straight}@12") == []
    assert [row["step"] for row in untimed_rows(tmp_path) if "eval/loss" in row] == [9, 12]


def test_an_eval_that_raises_costs_no_save(straight: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("the held-out set is gone")

    def fails_in(number: int) -> None:
        with pytest.raises(OSError, match="the held-out set is gone"):
            train_table(tiny_config(tmp_path), eval_batches=_InEval(fail, number))

    for number, saved in ((1, [3]), (1, [3]), (4, [8, 9, 12])):  # the second is of what is owed
        fails_in(number)
        assert list_steps(tmp_path / "checkpoints") == saved
    metadata = read_metadata(tmp_path / "checkpoints", 12)
    assert metadata.eval_loss is None and not metadata.final
    assert train_table(tiny_config(tmp_path)).complete
    assert diff_checkpoints(f"{tmp_path}@12", f"{straight}@12") == []
    assert untimed_rows(tmp_path) == untimed_rows(straight)


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_was_ignored_stays_so(number: int, handlers: None) -> None:
    """nohup starts a run so, and a shell without job control what it starts with `&`."""
    signal.signal(number, signal.SIG_IGN)
    with stop_requests(make_mesh(MeshConfig())) as request:
        signal.raise_signal(number)
        assert not request.received
    assert signal.getsignal(number) is signal.SIG_IGN


def test_a_second_signal_ends_a_run_at_once_but_no_hangup_does(handlers: None) -> None:
    def end(number: int, frame: Any) -> None:
        raise SystemExit(number)

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, end)
    with stop_requests(make_mesh(MeshConfig())) as request:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
        assert request.received == "SIGHUP" and request.stops()
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_the_comparison_sees_a_batch_that_was_skipped(straight: Path, tmp_path: Path) -> None:
    # The negative control of the test above.
    class SkipsOne(TinyBatches):
        def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
            return super().__call__(index + (index >= 5), rows)

    train_table(tiny_config(tmp_path), batches=SkipsOne())
    names = [difference.name for difference in diff_checkpoints(f"{tmp_path}", f"{straight}")]
    assert "params/table_VV" in names
    assert untimed_rows(tmp_path) != untimed_rows(straight)


def _times(run_dir: Path) -> dict[str, int]:
    # Of the files: a trainer that looks at a folder makes itself known in it for that time.
    return {str(path): path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}


def test_a_complete_run_says_so_and_changes_nothing(
    straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _times(straight)
    result = train_table(tiny_config(straight, log_interval=5))
    assert result.complete and result.step == 12 and result.best is not None
    told = capsys.readouterr().out
    assert "is complete at step 12" in told and "--num_steps" in told and "--run_dir" in told
    assert "log_interval: was 1, is 5" in told
    assert _times(straight) == before


def test_a_longer_plan_goes_on_and_keeps_the_lineage(tmp_path: Path) -> None:
    train_table(tiny_config(tmp_path, num_steps=4))
    assert select(f"{tmp_path}@final").step == 4
    result = train_table(tiny_config(tmp_path, num_steps=8))
    assert result.step == 8
    metadata = read_metadata(tmp_path / "checkpoints", 8)
    assert metadata.lineage == [{"step": 4, "changed": ["num_steps: was 4, is 8"]}]
    assert select(f"{tmp_path}@final").step == 8


def test_a_fixed_field_is_refused_by_name_and_nothing_is_touched(straight: Path) -> None:
    before = _times(straight)
    with pytest.raises(ValueError, match=r"seed: was 0, is 1\nadd --run_dir"):
        train_table(tiny_config(straight, seed=1, num_steps=20))
    assert _times(straight) == before


def test_resume_never_refuses_a_folder_with_checkpoints(straight: Path) -> None:
    with pytest.raises(ValueError, match="resume: found never"):
        train_table(tiny_config(straight, resume="never"))


def test_other_data_is_refused(straight: Path) -> None:
    class Other(TinyBatches):
        fingerprint = "other"

    with pytest.raises(ValueError, match="found fingerprint other for main, but step 12"):
        train_table(tiny_config(straight, num_steps=13), batches=Other())


def test_a_run_branches_from_another_with_full_state(straight: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    train_table(tiny_config(source, num_steps=8, checkpoint={"keep_latest": 9}))
    branch = tmp_path / "branch"
    config = tiny_config(branch, branch_from=f"{source}@4", num_steps=8)
    train_table(config)
    assert diff_checkpoints(f"{branch}@8", f"{source}@8") == []
    metadata = read_metadata(branch / "checkpoints", 8)
    assert metadata.lineage[0]["branched_from"].endswith("checkpoints/4")
    # From a step whose eval is due, the branch makes it before it goes on.
    other = tmp_path / "other"
    train_table(tiny_config(other, branch_from=f"{source}@6", num_steps=8))
    assert [row["step"] for row in untimed_rows(other)] == [6, 7, 8, 8]


def test_a_run_that_overfits_is_ended_and_best_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, stop_after_worse_evals=2, num_steps=40)
    losses = [3.0, 2.0, 2.5, 2.25, 1.0]
    result = _train_scripted(config, losses)
    assert result.complete and result.step == 12
    assert select(f"{tmp_path}@final").step == 12 and select(f"{tmp_path}@best").step == 6
    assert "best was 2 eval(s) ago, at step 6" in capsys.readouterr().out
    again = _train_scripted(config, losses)
    assert again.step == 12
    assert "2 evals without a new best" in capsys.readouterr().out


class _Scripted(TinyEvalSet):
    """An eval set whose losses are given beforehand."""

    def __init__(self, losses: list[float]) -> None:
        self.losses = iter(losses)

    def __len__(self) -> int:
        return 1

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        if rows.start == 0:
            self.current = next(self.losses)
        return {"loss": np.full(BATCH, self.current, np.float32)[rows]}


def _scripted_loss(model: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    if "loss" in batch:
        return batch["loss"].sum(), jnp.float32(batch["loss"].size)
    return next_token_loss()(model, batch)


def _train_scripted(config: Config, losses: list[float], **kwargs: Any) -> Any:
    return train_table(
        config, loss=_scripted_loss, batches=TinyBatches(), eval_batches=_Scripted(losses), **kwargs
    )


def test_the_note_s_run_always_has_its_best_and_its_latest_on_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 4.32 after 4.79 is better, whatever the note says of it.
    losses = [4.79, 4.32, 4.05, 3.89, 3.78, 3.82, 3.71, 3.50, 2.67, 2.95, 2.89]
    folder = tmp_path / "checkpoints"
    config = tiny_config(
        tmp_path,
        num_steps=22,
        eval_interval=2,
        checkpoint={"save_interval": 2, "keep_latest": 1},
        mesh=MeshConfig(),
    )
    on_disk = []

    def look(step: int, row: dict[str, float]) -> None:
        # An eval waits for the save before it: what is on disk now is what a kill would leave.
        if "eval/loss" in row and step > 2:
            on_disk.append((list_steps(folder), select(f"{folder}@best").step))

    result = _train_scripted(config, losses, callbacks=[look])
    expected_best = [2, 4, 6, 8, 10, 10, 14, 16, 18, 18]
    assert [best for _, best in on_disk] == expected_best
    latest = range(2, 22, 2)
    assert [s for s, _ in on_disk] == [
        sorted({best, step}) for best, step in zip(expected_best, latest, strict=True)
    ]
    assert list_steps(folder) == [18, 22]
    assert result.best is not None and result.best.step == 18
    assert result.best.loss == pytest.approx(2.67)
    told = capsys.readouterr().out
    assert told.count("New best eval loss!") == 8
    assert "Best eval loss: 3.7800" in told and "Best eval loss: 2.6700" in told
    assert "best was 2 eval(s) ago, at step 18" in told


def test_an_eval_that_is_not_finite_is_no_best(tmp_path: Path) -> None:
    _train_scripted(tiny_config(tmp_path), [3.0, math.nan, 2.0, math.inf])
    assert select(f"{tmp_path}@best").step == 9
    assert read_metadata(tmp_path / "checkpoints", 12).best_eval_loss == 2.0


def test_an_improved_eval_between_saves_is_saved(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, num_steps=7, checkpoint={"save_interval": 100})
    _train_scripted(config, [3.0, 4.0, 5.0])
    assert list_steps(tmp_path / "checkpoints") == [3, 7]


def test_a_due_save_needs_no_eval(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, num_steps=5, eval_interval=100)
    train_table(config, eval_batches=None)  # no held-out set at all
    assert list_steps(tmp_path / "checkpoints") == [4, 5]
    assert not any("eval/loss" in row for row in untimed_rows(tmp_path))


class _Narrow(nnx.Module):
    """A bigram in narrow dtypes, with a param of no elements."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(jax.random.normal(rngs.params(), (64, 64), jnp.bfloat16))
        self.bias = nnx.Param(jnp.zeros((64,), jnp.float16))
        self.empty = nnx.Param(jnp.zeros((0, 4), jnp.bfloat16))

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        return self.table[...][tokens] + self.bias[...][None, None]


def _train_narrow(run_dir: Path) -> None:
    config = tiny_config(run_dir, num_steps=4, checkpoint={"save_interval": 2}, z_loss=0.1)
    config = replace(config, optim=replace(config.optim, ema_decay=0.99), mesh=MeshConfig())
    assert train_table(config, model=_Narrow).complete


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("narrow")
    _train_narrow(run_dir)
    return run_dir


@pytest.mark.slow
def test_narrow_and_empty_params_resume_with_the_same_bits(narrow: Path, tmp_path: Path) -> None:
    expected = read_metadata(narrow / "checkpoints", 4)
    dtypes = {name: entry[0] for name, entry in expected.fingerprints.items()}
    assert (dtypes["params/table"], dtypes["params/bias"]) == ("bfloat16", "float16")
    assert expected.fingerprints["params/empty"] == ["bfloat16", [0, 4], 0, 0]
    others = {dtypes[n] for n in dtypes if n.startswith(("ema_params/", "opt_state/"))}
    assert others == {"float32", "int32"}

    folder = tmp_path / "checkpoints"
    shutil.copytree(narrow, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(folder / "4")
    _train_narrow(tmp_path)
    again = read_metadata(folder, 4)
    assert again.fingerprints == expected.fingerprints
    assert again.eval_loss == expected.eval_loss
    assert untimed_rows(tmp_path) == untimed_rows(narrow)


@pytest.mark.slow
def test_narrow_and_empty_weights_are_read_and_proven(narrow: Path) -> None:
    selected = select(f"{narrow}@4")
    assert find_changed_arrays(selected.path, selected.metadata) == []
    model, _ = load_model(f"{narrow}@4", model=_Narrow)
    dtypes = model.table[...].dtype, model.bias[...].dtype
    assert dtypes == ("bfloat16", "float16") and model.empty[...].shape == (0, 4)


def test_the_loss_of_a_row_is_without_the_z_term(narrow: Path, straight: Path) -> None:
    rows = [row for row in untimed_rows(narrow) if "train/loss" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["train/perplexity"] == pytest.approx(math.exp(row["train/loss"]))
        assert row["train/z_loss"] > 0.1
    assert "train/z_loss" not in untimed_rows(straight)[0]


def test_time_alone_brings_a_save(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        num_steps=3,
        eval_interval=100,
        checkpoint={"save_interval": 100, "save_interval_min": 1e-9, "keep_latest": 9},
    )
    train_table(config, eval_batches=None)
    assert list_steps(tmp_path / "checkpoints") == [1, 2, 3]


def test_an_end_that_could_not_be_saved_again_is_not_told_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {"batches": _StopAtOnce(8), "eval_batches": TinyEvalSet()}
    stopped = train_table(tiny_config(tmp_path, num_steps=24), **sets)
    assert not stopped.complete
    monkeypatch.setattr(manifest, "write_manifest", Mock(side_effect=OSError(28, "no space")))
    config = tiny_config(tmp_path, num_steps=stopped.step, checkpoint={"on_save_error": "warn"})
    with pytest.raises(CheckpointError, match="its last save failed"):
        train_table(config)
    assert not read_metadata(tmp_path / "checkpoints", stopped.step).final


def test_of_several_processes_one_wish_is_one_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """They learn of it a step late, in which the clock still asks for it."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    request = StopRequest(make_mesh(MeshConfig()))
    wishes = [False, True, True, False, False, True, True, True, True]
    saves = [request.wanted(save=wish)[1] for wish in wishes]
    assert saves == [False, False, True, False, False, False, True, False, True]


@pytest.mark.slow
def test_overfitting_one_batch_does(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, overfit_one_batch=True, num_steps=60, log_interval=60)
    train_table(config, eval_batches=None)
    assert untimed_rows(tmp_path)[-1]["train/loss"] < 1.5 < math.log(64)


def test_it_trains_off_the_main_thread(tmp_path: Path) -> None:
    import threading

    results = []
    config = tiny_config(tmp_path, num_steps=3)
    thread = threading.Thread(target=lambda: results.append(train_table(config)))
    thread.start()
    thread.join()
    assert results[0].complete


def test_the_run_folder_says_what_it_is(straight: Path) -> None:
    config = json.loads((straight / "config.json").read_text())
    assert config["num_steps"] == 12 and config["checkpoint"]["save_interval"] == 4


@pytest.mark.slow
def test_a_run_that_overfits_ends_where_it_would_have_however_often_it_is_stopped(
    tmp_path: Path,
) -> None:
    # The eval that ends it is owed by a stop: it is made at the next start, and ends it then.
    losses = {3: 2.0, 6: 2.5, 9: 3.0}
    step, complete = 0, False
    while not complete:
        config = tiny_config(tmp_path, stop_after_worse_evals=2, num_steps=40)
        due = [losses[at] for at in losses if at >= max(step, 3)]
        step, complete, _ = train_table(
            config,
            loss=_scripted_loss,
            batches=_StopAtOnce(step),
            eval_batches=_Scripted(due),
        )
    assert step == 9
    assert select(f"{tmp_path}@final").step == 9 and select(f"{tmp_path}@best").step == 3
    assert [row["step"] for row in untimed_rows(tmp_path) if "eval/loss" in row] == [3, 6, 9]


def test_a_branch_past_the_end_of_its_plan_is_refused(straight: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, branch_from=f"{straight}@12")
    with pytest.raises(ValueError, match="found step 12, expected one before num_steps"):
        train_table(config)


def test_a_run_folder_goes_with_one_checkpoint_folder(straight: Path, tmp_path: Path) -> None:
    elsewhere = {"directory": str(tmp_path / "elsewhere")}
    before = untimed_rows(straight)
    with pytest.raises(ValueError, match="run_dir .* belongs to its own checkpoints"):
        train_table(tiny_config(straight, checkpoint=elsewhere))
    assert untimed_rows(straight) == before and not (tmp_path / "elsewhere").exists()
    other = {"directory": str(straight / "checkpoints")}
    with pytest.raises(ValueError, match="which holds the run .*another --checkpoint_dir"):
        train_table(tiny_config(tmp_path / "other", checkpoint=other))


def test_a_plan_that_is_cut_short_ends_with_an_eval_and_a_final(tmp_path: Path) -> None:
    train_table(tiny_config(tmp_path), batches=_StopAtOnce(0))
    result = train_table(tiny_config(tmp_path, num_steps=3))
    assert result.step == 3 and result.complete
    train_table(tiny_config(tmp_path, num_steps=12), batches=_StopAtOnce(3))
    result = train_table(tiny_config(tmp_path, num_steps=4))
    assert result == (4, True, result.best)
    selected = select(f"{tmp_path}@final")
    assert selected.step == 4 and selected.metadata.eval_loss is not None


def test_a_complete_run_whose_end_is_damaged_is_made_again(tmp_path: Path) -> None:
    train_table(tiny_config(tmp_path))
    before = untimed_rows(tmp_path)
    last = tmp_path / "checkpoints" / "12"
    largest = max(last.rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"x" * largest.stat().st_size)
    assert train_table(tiny_config(tmp_path)).complete
    assert untimed_rows(tmp_path) == before
    assert select(f"{tmp_path}@final").step == 12 and last.with_name("12.corrupt").exists()


@pytest.mark.slow
def test_a_run_whose_checkpoints_are_gone_keeps_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_table(tiny_config(tmp_path))
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")  # or its disk is not mounted
    capsys.readouterr()
    train_table(tiny_config(tmp_path))
    (kept,) = tmp_path.glob("metrics-*.jsonl")
    assert kept.read_bytes() == rows
    told = f"has rows up to step 12, and {tmp_path}/checkpoints has no checkpoint"
    out = capsys.readouterr().out.replace("\n", " ")
    assert told in out and f"they are kept in {kept.name}" in out


def test_held_out_batches_of_ones_own_have_a_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_batches: found no length, expected `__len__`"):
        train_table(tiny_config(tmp_path), eval_batches=lambda index, rows: {})
    assert not (tmp_path / "checkpoints").exists()


def test_a_model_of_ones_own_is_not_told_as_that_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_table(tiny_config(tmp_path))
    out = capsys.readouterr().out
    assert "a model of your own; 12 steps of" in out and "d_model" not in out


def test_a_run_folder_has_one_trainer(tmp_path: Path) -> None:
    first = tiny_config(tmp_path / "run", checkpoint={"directory": str(tmp_path / "a")})
    second = tiny_config(tmp_path / "run", checkpoint={"directory": str(tmp_path / "b")})
    with hold_run_folder(first):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(
            RuntimeError, match=rf"run is in use .*process {os.getpid()} on .* since"
        ):
            train_table(second)
        assert sorted(tmp_path.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_one_part_to_play(straight: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    before = sorted(tmp_path.rglob("*"))
    for config, message in (
        (tiny_config(tmp_path / "b", checkpoint={"directory": str(run)}), "the run folder of"),
        (tiny_config(run / "checkpoints"), "the checkpoint folder of"),
    ):
        with pytest.raises(ValueError, match=message):
            train_table(config)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "events.jsonl", "holder.json"])
def test_a_file_of_another_program_in_the_run_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("theirs")
    with pytest.raises(ValueError, match=rf"found {name} and no jaxlm\.json"):
        train_table(tiny_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "theirs"


def test_files_that_no_run_writes_are_nobody_s_business(tmp_path: Path) -> None:
    (tmp_path / "slurm-1.out").write_text("theirs")
    with hold_run_folder(tiny_config(tmp_path)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["slurm-1.out"]


def test_two_trainings_in_one_process_are_refused(tmp_path: Path) -> None:
    with _alone_in_process():
        with pytest.raises(RuntimeError, match="another training runs in this process"):
            train_table(tiny_config(tmp_path / "b"))
    assert list(tmp_path.iterdir()) == []


def test_rows_that_were_changed_between_two_starts_are_told_and_never_taken_for_whole(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    path, changed = run / "metrics.jsonl", bytearray((run / "metrics.jsonl").read_bytes())
    lines = path.read_text().splitlines()
    until_8 = len("\n".join(row for row in lines if json.loads(row)["step"] <= 8)) + 1
    changed[until_8 + 30] ^= 1
    path.write_bytes(changed)
    assert train_table(tiny_config(run)).complete
    assert "metrics.jsonl: content differs" in capsys.readouterr().out.replace("\n", " ")
    lost = "the rows after step 8 up to step 12"
    for num_steps in (13, 14):
        assert train_table(tiny_config(run, num_steps=num_steps)).complete
        assert f"not complete: it lacks {lost}" in capsys.readouterr().out.replace("\n", " ")
    assert [row["step"] for row in untimed_rows(run) if "train/loss" in row] == [
        *range(1, 9),
        13,
        14,
    ]
    assert (run / "metrics.jsonl.corrupt").read_bytes() == bytes(changed)
    assert read_metadata(run / "checkpoints", 14).rows.gaps == [[8, 12]]
    lacking = "the rows after step 8 up to step 12"
    assert verify_rows(str(run), run / "checkpoints") == ([], lacking)
    events, _ = read_events(run / "events.jsonl")
    assert sum(event["event"] == "rows" for event in events) == 1


def test_every_flipped_bit_of_the_rows_is_found_by_verify(straight: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    path, newest = run / "metrics.jsonl", read_metadata(run / "checkpoints", 12)
    content = path.read_bytes()
    assert verify_rows(str(run), run / "checkpoints") == ([], "")
    assert newest.rows.num_bytes == len(content)
    for bit in range(0, 8 * len(content), 97):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert find_row_damage(path, newest.rows)
    assert verify_rows(str(run), run / "checkpoints")[0]
    path.unlink()
    assert "missing" in verify_rows(str(run), run / "checkpoints")[0][0]


def test_init_from_takes_the_weights_alone(tmp_path: Path) -> None:
    short: dict[str, Any] = {"num_steps": 4, "checkpoint": {"save_interval": 4}}
    assert train_table(tiny_config(tmp_path / "a", **short)).complete
    config = tiny_config(tmp_path / "b", init_from=f"{tmp_path}/a@4", seed=1, **short)
    assert train_table(config).complete
    metadata = read_metadata(tmp_path / "b" / "checkpoints", 4)
    assert metadata.tokens_seen == 4 * 8 * 16
    assert metadata.lineage[-1] == {"step": 0, "initialized_from": f"{tmp_path}/a/checkpoints/4"}
    first = {name: untimed_rows(tmp_path / name)[0]["train/loss"] for name in "ab"}
    assert first["b"] < first["a"] - 0.3
    with pytest.raises(ValueError, match="init_from: found"):
        tiny_config(tmp_path / "c", init_from="x", branch_from="y")
