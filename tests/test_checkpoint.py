"""Best and latest are always on disk, and only what is sound is restored."""

import contextlib
import dataclasses
import errno
import math
import os
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import nnx
from text_run import damage
from tiny_model import metadata_of

from jaxlm.checkpoints import checkpoint, manager
from jaxlm.checkpoints.checkpoint import CheckpointError, Checkpoints
from jaxlm.checkpoints.folder import list_steps, select
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.quarantine import Purger
from jaxlm.checkpoints.restore import items_of
from jaxlm.checkpoints.retention import choose_kept
from jaxlm.config import CheckpointConfig, MeshConfig
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import TrainState, make_blueprint, num_bytes
from jaxlm.files import lock


class _Matrix(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (64, 64)))


BLUEPRINT = make_blueprint(
    _Matrix, lambda _: optax.adam(1e-3), make_mesh(MeshConfig(1, 2), jax.devices()[:2])
)


def _state(step: int) -> TrainState:
    state = BLUEPRINT.make(step)
    return state._replace(step=state.step + step)


class _Told:
    def __init__(self) -> None:
        self.commits: list[tuple[int, bool]] = []


def _open(folder: Path, told: _Told | None = None, **config: Any) -> Checkpoints:
    told = told or _Told()
    return Checkpoints(
        folder,
        CheckpointConfig(**config),
        on_commit=lambda step, path, best: told.commits.append((step, best)),
    )


def _save_all(folder: Path, losses: dict[int, float | None], **config: Any) -> _Told:
    told = _Told()
    with _open(folder, told, **config) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(_state(step), metadata_of(step, loss))
    return told


def test_small_arrays_are_written_whole_however_many_devices_hold_them(tmp_path, monkeypatch):
    def chunks(folder: Path) -> list[list[int]]:
        blueprint = make_blueprint(
            _Matrix, lambda _: optax.sgd(1e-3), make_mesh(MeshConfig(data=8))
        )
        with _open(folder) as checkpoints:
            checkpoints.save(blueprint.make(0), metadata_of(1))
        params = ocp.PyTreeCheckpointHandler().metadata(folder / "1" / "params")
        return [list(leaf.storage.chunk_shape) for leaf in jax.tree.leaves(params.tree)]

    assert chunks(tmp_path / "whole") == [[64, 64]]
    monkeypatch.setattr(manager, "LEAST_PART", 64 * 64 * 4 // 8)
    assert chunks(tmp_path / "in parts") == [[8, 64]]


def test_what_is_restored_is_what_was_saved(tmp_path: Path) -> None:
    saved = jax.tree.map(np.asarray, _state(7))
    _save_all(tmp_path, {7: 1.5})
    with _open(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
    assert restored is not None
    state, metadata = restored
    jax.tree.map(np.testing.assert_array_equal, state, saved)
    assert (metadata.step, metadata.eval_loss) == (7, 1.5)
    shardings = jax.tree.map(lambda x: x.sharding, (state, BLUEPRINT.abstract))
    assert jax.tree.leaves(shardings[0]) == jax.tree.leaves(shardings[1])


def test_no_save_asks_tensorstore_for_lists_that_it_never_frees(tmp_path: Path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(
        tensorstore, "experimental_collect_matching_metrics", lambda of: asked.append(of) or []
    )
    test_what_is_restored_is_what_was_saved(tmp_path)
    assert not asked


def test_an_array_larger_than_a_file_is_the_same_again(tmp_path: Path, monkeypatch) -> None:
    blueprint = make_blueprint(_Matrix, lambda _: optax.adam(1e-3), make_mesh(MeshConfig(data=8)))

    def largest(file_bytes: int) -> int:
        monkeypatch.setattr(manager, "FILE_BYTES", file_bytes)
        folder = tmp_path / str(file_bytes)
        with _open(folder) as checkpoints:
            checkpoints.save(blueprint.make(1), metadata_of(1))
            checkpoints.wait()
            restored = checkpoints.restore_latest(blueprint.abstract)
        assert restored is not None
        jax.tree.map(np.testing.assert_array_equal, restored[0], blueprint.make(1))
        return max(path.stat().st_size for path in folder.rglob("d/*"))

    assert largest(4096) < 2 * 4096 < 64 * 64 * 4 <= largest(1 << 20)
    # Parts so small that OCDBT keeps them in its tree, compressed: the moments, all zeros, take
    # less of the disk than of memory, and that is no damage.
    largest(512)


def test_the_state_may_be_donated_while_it_is_being_saved(tmp_path: Path) -> None:
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with _open(tmp_path) as checkpoints:
        for step in range(1, 6):
            state = _state(step)
            checkpoints.save(state, metadata_of(step, None))
            jax.block_until_ready(overwrite(state))
    with _open(tmp_path) as checkpoints:  # compares the fingerprints
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
    assert restored is not None and restored[1].step == 5


@pytest.mark.parametrize("keep_latest", [1, 2, 3])
def test_worsening_losses_drop_neither_best_nor_latest(tmp_path: Path, keep_latest: int) -> None:
    losses = {step: 1.0 + step for step in range(1, 7)}
    _save_all(tmp_path, dict(losses), keep_latest=keep_latest)
    assert list_steps(tmp_path) == sorted({1, *range(7 - keep_latest, 7)})


def test_keep_every_keeps_for_good(tmp_path: Path) -> None:
    _save_all(tmp_path, dict.fromkeys(range(1, 8)), keep_latest=1, keep_every=3)
    assert list_steps(tmp_path) == [3, 6, 7]


STATE_BYTES = num_bytes(items_of(BLUEPRINT.abstract))


@pytest.mark.parametrize(
    ("room", "milestones"),
    [(14, [2, 4, 6, 8, 10, 12]), (9, [4, 8, 12]), (7, [8]), (5, []), (4, [])],
)
def test_a_disk_budget_thins_the_milestones_and_never_best_or_latest(
    room: int, milestones: list[int]
) -> None:
    # Of the room, two are for what is being written and deleted.
    config, kept = _budget_of(room), set[int]()
    for step in range(1, 15):  # the first stays the best
        losses: dict[int, float | None] = {found: float(found) for found in sorted({*kept, step})}
        kept = choose_kept(config, losses, state_bytes=STATE_BYTES)
    assert kept == {1, 13, 14, *milestones}
    assert len(kept) <= max(room - 2, 3)


def _budget_of(room: int) -> CheckpointConfig:
    return CheckpointConfig(keep_latest=2, keep_every=2, disk_budget_gb=room * STATE_BYTES / 1e9)


def test_a_disk_budget_thins_the_milestones_on_disk(tmp_path: Path) -> None:
    losses = {step: float(step) for step in range(1, 10)}
    _save_all(tmp_path, dict(losses), **dataclasses.asdict(_budget_of(6)))
    assert list_steps(tmp_path) == [1, 4, 8, 9]


def test_the_first_step_stays_under_any_budget() -> None:
    """It is a multiple of every number."""
    config = CheckpointConfig(keep_latest=1, keep_every=10, disk_budget_gb=1e-9)
    assert choose_kept(config, dict.fromkeys([0, 10, 20, 30]), state_bytes=1000) == {0, 30}


@pytest.mark.parametrize("worse", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_best(tmp_path: Path, worse: float) -> None:
    told = _save_all(tmp_path, {1: 2.0, 2: worse, 3: 3.0, 4: worse}, keep_latest=1)
    assert told.commits == [(1, True), (2, False), (3, False), (4, False)]
    assert list_steps(tmp_path) == [1, 4]
    assert select(f"{tmp_path}@best").step == 1


def test_reopened_folders_agree_on_the_best(tmp_path: Path) -> None:
    _save_all(tmp_path, {1: 2.0, 2: 1.0, 3: 1.0, 4: 1.5}, keep_latest=1)
    with _open(tmp_path, keep_latest=1) as checkpoints:
        assert checkpoints.best == (2, 1.0)
        checkpoints.save(_state(5), metadata_of(5, 1.0))  # as good is not better
        checkpoints.wait()
        assert checkpoints.best == (2, 1.0)
    assert list_steps(tmp_path) == [2, 5]


def test_a_step_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    with _open(tmp_path) as checkpoints:
        state = _state(1)
        checkpoints.save(state, metadata_of(1, None))
        broken = state._replace(params=jax.tree.map(lambda x: x * jnp.nan, _state(2).params))
        checkpoints.save(broken, metadata_of(2, None))
        with pytest.raises(CheckpointError, match="step 2 .*params/.* not finite; on disk .*: 1$"):
            checkpoints.wait()
    assert list_steps(tmp_path) == [1]


def test_a_damaged_latest_is_set_aside_and_the_next_one_restored(
    tmp_path: Path, lines: list[str]
) -> None:
    _save_all(tmp_path, {1: None, 2: None, 3: None})
    damage(tmp_path / "3")
    told = _Told()
    with _open(tmp_path, told) as checkpoints:
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
        assert restored is not None and restored[1].step == 2
        checkpoints.save(_state(3), metadata_of(3, None))  # the number is free again
    assert "checkpoint 3 is damaged" in lines[0]
    assert (tmp_path / "3.corrupt").is_dir()
    assert list_steps(tmp_path) == [1, 2, 3]


def test_with_verification_off_the_same_damage_is_silent(tmp_path: Path, lines: list[str]) -> None:
    # The negative control of the test above: Orbax itself sees nothing.
    _save_all(tmp_path, {1: None, 2: None, 3: None})
    damage(tmp_path / "3")
    told = _Told()
    with _open(tmp_path, told, verify="off") as checkpoints:
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
    assert restored is not None and restored[1].step == 3
    assert lines == []


def test_arrays_that_come_back_wrong_are_found_by_their_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    _save_all(tmp_path, {1: None, 2: None})
    damage(tmp_path / "2")
    # The files lie: every manifest passes. What is left is the fingerprint.
    monkeypatch.setattr("jaxlm.checkpoints.manifest.find_damage", lambda *_, **__: [])
    told = _Told()
    with _open(tmp_path, told) as checkpoints:
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
    assert restored is not None and restored[1].step == 1
    assert "differs from what was saved" in lines[0]


def test_a_damaged_best_does_not_block_the_next(tmp_path: Path) -> None:
    _save_all(tmp_path, {1: 1.0, 2: 3.0, 3: 2.0})
    damage(tmp_path / "1")
    told = _Told()
    with _open(tmp_path, told) as checkpoints:
        checkpoints.restore_latest(BLUEPRINT.abstract)
        assert checkpoints.best == (3, 2.0)
        checkpoints.save(_state(4), metadata_of(4, 1.5))  # worse than the damaged one was
    assert told.commits == [(4, True)]


def test_without_a_sound_one_there_is_no_fresh_start(tmp_path: Path) -> None:
    _save_all(tmp_path, {1: None})
    damage(tmp_path / "1")
    for _ in range(2):  # nor at the second try, when it has been set aside
        with (
            _open(tmp_path) as checkpoints,
            pytest.raises(CheckpointError, match="no sound checkpoint, only 1.corrupt"),
        ):
            checkpoints.restore_latest(BLUEPRINT.abstract)


def test_an_empty_folder_named_like_a_step_is_not_a_checkpoint(tmp_path: Path) -> None:
    _save_all(tmp_path, {1: None})
    (tmp_path / "5").mkdir()
    with _open(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
    assert restored is not None and restored[1].step == 1
    assert (tmp_path / "5.corrupt").is_dir()


def test_a_cut_off_metrics_file_does_not_block_the_folder(tmp_path: Path) -> None:
    _save_all(tmp_path, {1: 2.0, 2: 1.0})
    (tmp_path / "2" / "metrics" / "metrics").write_bytes(b'{"eval')
    with _open(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
        assert checkpoints.best == (1, 2.0)
    assert restored is not None and restored[1].step == 1


def test_another_model_is_refused_not_cast(tmp_path: Path) -> None:
    _save_all(tmp_path, {1: None})
    half = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
        BLUEPRINT.abstract.params,
    )
    with (
        _open(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"params/w holds float32 .* this model has bfloat16"),
    ):
        checkpoints.restore_latest(BLUEPRINT.abstract._replace(params=half))
    assert list_steps(tmp_path) == [1]


def test_a_replaced_step_is_there_at_every_instant(tmp_path: Path, lines: list[str]) -> None:
    _save_all(tmp_path, {1: None, 2: None})
    with _open(tmp_path) as checkpoints:
        checkpoints.replace(_state(2), metadata_of(2, 1.25))
        assert checkpoints.best == (2, 1.25)
    assert list_steps(tmp_path) == [1, 2]
    # Killed after the rename and before the commit: the old one comes back.
    (tmp_path / "2").rename(tmp_path / "2.replaced")
    with _open(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
    assert restored is not None and restored[1].step == 2
    # Killed after the commit and before the deletion: the new one stays.
    (tmp_path / "1").rename(tmp_path / "2.replaced")
    with _open(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
    assert restored is not None and restored[1].eval_loss == 1.25
    assert not (tmp_path / "2.replaced").exists()
    # A disk lost what was committed: the old one comes back, and the other is kept for a look.
    shutil.copytree(tmp_path / "2", tmp_path / "2.replaced")
    (tmp_path / "2" / "manifest.json").unlink()
    told = _Told()
    with _open(tmp_path, told) as checkpoints:
        assert checkpoints.restore_latest(BLUEPRINT.abstract)
    assert lines == ["Warning: checkpoint 2 is unfinished; renamed to 2.corrupt"]
    assert sorted(path.name for path in tmp_path.glob("2*")) == ["2", "2.corrupt"]


def test_what_a_killed_save_left_is_cleared(tmp_path: Path) -> None:
    _save_all(tmp_path, {1: None})
    (tmp_path / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / "deleting" / "1").mkdir(parents=True)
    with _open(tmp_path) as checkpoints:
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
    assert restored is not None and restored[1].step == 1
    assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()
    assert list((tmp_path / "deleting").iterdir()) == []


@contextlib.contextmanager
def _no_room() -> Iterator[None]:
    # A write past this many bytes fails with EFBIG, as one to a full disk does with ENOSPC.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# Orbax drops the coroutines of the other arrays without having awaited them.
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_a_save_that_fails_is_reported_and_nothing_is_lost(
    tmp_path: Path, policy: Any, lines: list[str]
) -> None:
    told = _Told()
    with _open(tmp_path, told, on_save_error=policy) as checkpoints:
        checkpoints.save(_state(1), metadata_of(1, 1.0))
        checkpoints.wait()
        fails = pytest.raises(CheckpointError, match="saving step 2 failed: .*untouched: 1")
        with fails if policy == "stop" else contextlib.nullcontext(), _no_room():
            checkpoints.save(_state(2), metadata_of(2, 0.5))
            checkpoints.wait()
        assert checkpoints.best == (1, 1.0)  # what is not on disk is not the best
        if policy == "warn":
            assert "saving step 2 failed" in lines[0]
        checkpoints.save(_state(3), metadata_of(3, None))
    assert list_steps(tmp_path) == [1, 3]
    assert not list(tmp_path.glob("*tmp*"))  # nor does what it had written keep the space
    assert told.commits == [(1, True), (3, False)]


def test_a_save_that_orbax_refuses_at_once_does_not_keep_the_lock(tmp_path: Path) -> None:
    fails = pytest.raises(CheckpointError, match=r"saving step 1 failed: .*untouched: 1\.")
    with fails, _open(tmp_path) as checkpoints:
        checkpoints.save(_state(1), metadata_of(1))
        checkpoints.save(_state(1), metadata_of(1))
    with _open(tmp_path) as checkpoints:
        assert checkpoints.latest.step == 1


def test_all_that_makes_a_step_whole_is_flushed_before_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax writes two files after the manifest, and flushes neither."""
    flushed: list[str] = []
    told = _Told()
    monkeypatch.setattr(checkpoint, "fsync", lambda path: flushed.append(path.name))
    told.commits = Mock(append=lambda _: flushed.append("told"))
    with _open(tmp_path, told) as checkpoints:
        checkpoints.save(_state(1), metadata_of(1, 1.0))
    assert {"commit_success.txt", "_CHECKPOINT_METADATA", "1"} <= set(flushed)
    assert flushed[-2:] == [tmp_path.name, "told"]


def test_a_save_is_told_though_what_goes_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = _Told()
    with _open(tmp_path, told) as checkpoints:
        monkeypatch.setattr(Purger, "purge", Mock(side_effect=OSError(errno.EROFS, "read-only")))
        checkpoints.save(_state(1), metadata_of(1, 1.0))
    assert told.commits == [(1, True)]


def test_an_interrupted_end_leaves_the_save_under_way_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads go on; cleared under their hands, an emptied folder would be committed."""
    begun, may_end = threading.Event(), threading.Event()
    write = Metadata.write

    def slow(metadata: Metadata, folder: Path) -> None:
        if metadata.step == 2:
            begun.set()
            may_end.wait()
        write(metadata, folder)

    monkeypatch.setattr(Metadata, "write", slow)
    checkpoints = _open(tmp_path, keep_latest=1).__enter__()
    checkpoints.save(_state(1), metadata_of(1, 1.0))
    checkpoints.wait()
    checkpoints.save(_state(2), metadata_of(2, 0.5))
    assert begun.wait(60)
    end = checkpoints._manager.wait_until_finished
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints._manager, "wait_until_finished", _interrupt)
        checkpoints.__exit__(None, None, None)
    may_end.set()
    end()
    checkpoints.release()
    with _open(tmp_path, keep_latest=1) as checkpoints:
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
        checkpoints.retain()
    assert restored is not None and restored[1].step == 2
    assert list_steps(tmp_path) == [2]


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_save_that_fails_after_its_commit_counts_as_what_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    told = _Told()
    with _open(tmp_path, told, on_save_error="warn", keep_latest=1) as checkpoints:
        checkpoints.save(_state(1), metadata_of(1, 2.0))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "fsync", Mock(side_effect=OSError(errno.EIO, "no answer")))
            checkpoints.save(_state(2), metadata_of(2, 1.0))
            checkpoints.wait()
        # It is there; that it would outlive a power cut, no one knows, so nothing went for it.
        assert re.search(r"saving step 2 failed: .*untouched: 1, 2\.", lines[0])
        assert checkpoints.best == (2, 1.0) and checkpoints.latest.step == 2
        checkpoints.save(_state(3), metadata_of(3, 1.5))
    assert told.commits == [(1, True), (3, False)]


@pytest.mark.parametrize("where", ["in the loop", "in the saving thread"])
def test_a_save_that_ends_by_a_mistake_is_never_told_as_one_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, lines: list[str]
) -> None:
    told = _Told()
    with pytest.raises(KeyError, match="a mistake"), _open(tmp_path, told) as checkpoints:
        checkpoints.save(_state(1), metadata_of(1, 1.0))
        checkpoints.wait()
        at = (ocp.CheckpointManager, "save") if "loop" in where else (Metadata, "write")
        monkeypatch.setattr(*at, Mock(side_effect=KeyError("a mistake")))
        checkpoints.save(_state(2), metadata_of(2, 0.5))
        checkpoints.wait()
    assert list_steps(tmp_path) == [1]
    assert not list(tmp_path.glob("*tmp*"))
    assert told.commits == [(1, True)]
    assert "saving step 2 failed: " in lines[-1]


def test_a_folder_deleted_under_the_run_is_not_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(CheckpointError, match="deleted or replaced"), _open(folder) as checkpoints:
        checkpoints.save(_state(1), metadata_of(1, None))
        checkpoints.wait()
        folder.rename(tmp_path / "moved")
        checkpoints.save(_state(2), metadata_of(2, None))
    assert not folder.exists()


def test_a_second_trainer_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    with _open(tmp_path), pytest.raises(RuntimeError, match=f"process {os.getpid()} on"):
        _open(tmp_path).__enter__()
    with _open(tmp_path):  # and free at once when it is closed
        pass


def test_a_deleted_holder_file_lets_no_second_trainer_in(tmp_path: Path) -> None:
    with _open(tmp_path):
        for text in (None, "{}"):  # deleted, and made again
            (tmp_path / "holder.json").unlink(missing_ok=True)
            if text:
                (tmp_path / "holder.json").write_text(text)
            with pytest.raises(RuntimeError, match="holder unknown"):
                _open(tmp_path).__enter__()


def test_the_lock_goes_with_the_folder_that_is_renamed(tmp_path: Path) -> None:
    folder, moved = tmp_path / "checkpoints", tmp_path / "moved"
    with pytest.raises(CheckpointError, match="deleted or replaced"), _open(folder) as checkpoints:
        checkpoints.save(_state(1), metadata_of(1, None))
        checkpoints.wait()
        folder.rename(moved)
        with pytest.raises(RuntimeError, match="in use by another trainer"):
            _open(moved).__enter__()
        with _open(folder) as second:  # the folder made anew is another one: who made it has it
            second.save(_state(7), metadata_of(7, None))
            second.wait()
            checkpoints.save(_state(2), metadata_of(2, None))
    assert (list_steps(moved), list_steps(folder)) == ([1], [7])


def test_a_latest_deleted_by_hand_does_not_stop_a_restore(tmp_path: Path) -> None:
    with _open(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(_state(step), metadata_of(step, None))
        checkpoints.wait()
        shutil.rmtree(tmp_path / "3")
        assert checkpoints.latest and checkpoints.latest.step == 2
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
        assert restored and restored[1].step == 2


def test_commits_are_told_only_once_they_are_on_disk(tmp_path: Path) -> None:
    seen = []

    def on_commit(step: int, path: str, best: bool) -> None:
        seen.append((step, (Path(path) / "commit_success.txt").exists()))

    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), on_commit=on_commit)
    with checkpoints:
        for step in (1, 2):
            checkpoints.save(_state(step), metadata_of(step, None))
    assert seen == [(1, True), (2, True)]


def test_metadata_round_trips_through_json(tmp_path: Path) -> None:
    metadata = replace(metadata_of(3, None), lineage=[{"step": 1}], best_eval_loss=math.inf)
    assert Metadata.from_json(metadata.to_json()) == metadata
    assert metadata.to_json()["best_eval_loss"] is None


@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    _open(tmp_path).__enter__()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"!")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(ready, 1)
        (held,) = lock._held
        os.close(held)  # as the kernel does when the holder dies, and its child lives on
        lock._held.clear()
        with _open(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(tell)


def test_what_was_deleted_by_hand_does_not_take_the_best_with_it(tmp_path: Path) -> None:
    with _open(tmp_path, keep_latest=1) as checkpoints:
        for step, loss in ((1, 1.0), (2, 2.0)):
            checkpoints.save(_state(step), metadata_of(step, loss))
        checkpoints.wait()
        shutil.rmtree(tmp_path / "1")
        assert checkpoints.best == (2, 2.0)
        for step, loss in ((3, 3.0), (4, 4.0)):
            checkpoints.save(_state(step), metadata_of(step, loss))
    assert list_steps(tmp_path) == [2, 4]


def test_a_run_that_has_lost_its_folder_leaves_another_s_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    theirs = [folder / "4.orbax-checkpoint-tmp", folder / "deleting" / "1"]
    with pytest.raises(CheckpointError, match="deleted or replaced"), _open(folder) as checkpoints:
        checkpoints.save(_state(1), metadata_of(1, None))
        checkpoints.wait()
        folder.rename(tmp_path / "moved")
        for path in theirs:
            path.mkdir(parents=True)
        (folder / "holder.json").write_text("{}")
        checkpoints.save(_state(2), metadata_of(2, None))
    assert all(path.exists() for path in theirs) and (folder / "holder.json").exists()


def test_a_lock_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    folder, there = tmp_path / "a/b/c", tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr("fcntl.flock", no_locks)
    for name in (folder, there):
        with pytest.raises(RuntimeError, match="could not be kept out"):
            lock.lock(name, required=True)
    assert list(tmp_path.iterdir()) == [there]  # one that was there before stays
    held = lock.lock(folder, required=False)
    assert folder.is_dir()
    lock.unlock(held)


def _tree(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    paths = sorted(folder.rglob("*"))
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in paths
    }


def test_a_folder_of_somebody_else_is_refused_untouched(tmp_path: Path) -> None:
    for name in ("2024", "20250131", "deleting/photos", "1.orbax-checkpoint-tmp-mine"):
        (tmp_path / "theirs" / name).mkdir(parents=True)
        (tmp_path / "theirs" / name / "file.txt").write_text("theirs")
    before = _tree(tmp_path)
    with pytest.raises(ValueError, match=r"found 1\.orbax-checkpoint-tmp-mine and no jaxlm\.json"):
        _open(tmp_path / "theirs").__enter__()
    assert _tree(tmp_path) == before


def test_what_others_put_into_a_folder_of_ours_stays(tmp_path: Path) -> None:
    """The names that a run gives are exact; nothing of another name is renamed or deleted."""
    _save_all(tmp_path, {1: 2.0})
    names = ["2.orbax-checkpoint-tmp-mine", "deleting/photos", "my.superseded", "x.corrupt", "y"]
    names += ["old.replaced", "3.superseded-", "deleting/4.jpg", "01"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("theirs")
    (tmp_path / "deleting" / "7").mkdir()  # the control
    with _open(tmp_path, keep_latest=1) as checkpoints:
        for step in (2, 3):
            checkpoints.save(_state(step), metadata_of(step, 3.0))
        checkpoints.wait()
        checkpoints.go_back(2, "a test")
    assert [name for name in names if not (tmp_path / name).is_dir()] == []
    assert (tmp_path / "notes.txt").exists()
    assert not (tmp_path / "deleting" / "7").exists()
    assert list_steps(tmp_path) == [1] and (tmp_path / "3.superseded").exists()


def test_a_run_that_never_began_leaves_a_folder_as_it_was(tmp_path: Path) -> None:
    with _open(tmp_path / "new" / "folder"):
        assert (tmp_path / "new" / "folder" / "jaxlm.json").exists()
    with _open(tmp_path):
        assert (tmp_path / "jaxlm.json").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_kill_between_a_commit_and_its_deletions_is_made_up_for(tmp_path: Path) -> None:
    losses = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _save_all(whole, losses, keep_latest=1, keep_weights_every=2)
    _save_all(killed, losses, keep_latest=9)  # as if none of its deletions had been made
    with _open(killed, keep_latest=1, keep_weights_every=2) as checkpoints:
        assert list_steps(killed) == [1, 2, 3, 4], "nothing goes before the run is known to go on"
        checkpoints.restore_latest(BLUEPRINT.abstract)
        checkpoints.retain()
        assert checkpoints.best == (1, 1.0) and checkpoints.latest.step == 4
    for folder in (whole, killed):
        assert (list_steps(folder), list_steps(folder / "weights")) == ([1, 4], [2])
