"""Keeps a run's states in a folder, so that none that matters is ever lost.

A step is committed by one rename; it carries the manifest of its files and the fingerprint of its
arrays. What turns out to be damaged is renamed aside and said, never deleted, and the next sound
one is taken. Orbax's `CheckpointManager` writes, commits and deletes; this module decides when,
proves what came back, and tells only what is true on disk.
"""

import contextlib
import fcntl
import json
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jaxlm import manifest
from jaxlm.cluster import barrier
from jaxlm.config import CheckpointConfig
from jaxlm.durable import fsync, write_file
from jaxlm.folder import (
    CORRUPT,
    Best,
    Metadata,
    find_best,
    list_set_aside,
    list_steps,
    read_metadata,
)
from jaxlm.restore import ITEMS, DamagedArrays, items_of, restore_items, state_of
from jaxlm.state import TrainState, all_finite, fingerprint

HOLDER = "holder.json"
_DELETING = "deleting"
_REPLACED = ".replaced"
# What Orbax and TensorStore raise when the disk refuses.
_SAVE_ERRORS = (OSError, ValueError, RuntimeError)


class CheckpointError(RuntimeError):
    """A checkpoint could not be kept or had back; the message says what to do."""


class _Retention:
    """Keeps the newest, the best, and every so many: no setting can drop best or latest."""

    def __init__(self, config: CheckpointConfig):
        self._config = config

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        steps = [info.step for info in checkpoints]
        best = find_best({info.step: (info.metrics or {}).get("eval_loss") for info in checkpoints})
        kept = set(steps[-self._config.keep_latest :])
        if best:
            kept.add(best.step)
        if self._config.keep_every:
            kept |= {step for step in steps if step % self._config.keep_every == 0}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoint folder of a run that trains; one trainer at a time.

    Args:
      folder: the folder, made if missing.
      config: when to keep what.
      on_commit: called with (step, path, whether it is the best) once a checkpoint is on disk.
      warn: called with a line about anything that is not as it should be.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        on_commit: Callable[[int, str, bool], None],
        warn: Callable[[str], None],
    ):
        self.folder = folder.absolute()
        self._config = config
        self._on_commit = on_commit
        self._warn = warn
        self._eval_losses: dict[int, float | None] = {}
        self._saving: Metadata | None = None
        self._purger = threading.Thread()
        self._primary = jax.process_index() == 0
        self._last_save_s = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        """Locks the folder, clears what a killed run left half-done, and sets damaged steps aside.

        Raises:
          CheckpointError: another trainer holds the folder.
        """
        if self._primary:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder)
            self._identify()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._unlock)
            self._open()
            on_error.pop_all()
        return self

    def _identify(self) -> None:
        found = self.folder.stat()
        self._identity = found.st_dev, found.st_ino

    def _open(self) -> None:
        if self._primary:
            self._purge()
            for path in self.folder.glob(f"*{_REPLACED}"):
                self._finish_replacing(path)
        self._sync("opened")
        self._identify()
        for step in list_steps(self.folder):
            damage = manifest.find_damage(self.folder / str(step), contents=False)
            if damage and self._config.verify != "off":
                self._set_aside(step, damage)
            else:
                self._eval_losses[step] = read_metadata(self.folder, step).eval_loss
        self._manager = self._open_manager()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Waits for the save under way; an error of the run itself goes first."""
        try:
            self.wait()
            self._manager.close()
        except (CheckpointError, *_SAVE_ERRORS) as own:
            if error is None:
                raise
            self._warn(str(own))
        finally:
            self._clear_partial()
            if self._purger.ident:
                self._purger.join()
            self._unlock()

    def _unlock(self) -> None:
        if self._primary:
            with contextlib.suppress(OSError):  # a disk that is read-only by now
                if self._is_ours():
                    (self.folder / HOLDER).unlink(missing_ok=True)
            _held.remove(self._lock)
            os.close(self._lock)

    @property
    def best(self) -> Best | None:
        """The best checkpoint that is on disk."""
        return self.best_with(-1, None)

    def best_with(self, step: int, eval_loss: float | None) -> Best | None:
        """The best, once a checkpoint of this step and eval loss is on disk too."""
        # What was deleted by hand under the run is no longer the best.
        there = {s: x for s, x in self._eval_losses.items() if (self.folder / str(s)).exists()}
        return find_best({**there, step: eval_loss})

    @property
    def due_by_time(self) -> bool:
        """Whether `save_interval_min` has passed since the last save."""
        minutes = self._config.save_interval_min
        return minutes is not None and time.monotonic() - self._last_save_s >= 60 * minutes

    def restore_latest(self, abstract: TrainState) -> tuple[TrainState, Metadata] | None:
        """The newest state that is proven sound, or None in a folder that never held one.

        Raises:
          CheckpointError: the folder holds checkpoints, and none is sound.
          ValueError: the checkpoint is of another model.
        """
        restored = None
        while self._eval_losses and restored is None:
            restored = self._restore(max(self._eval_losses), abstract)
        if restored is None:
            if aside := list_set_aside(self.folder):
                raise CheckpointError(
                    f"{self.folder} holds no sound checkpoint, only {', '.join(aside)}; bring "
                    "back a copy of one, or start a new run with --run_dir"
                )
            return None
        while self._config.verify == "full" and (best := self.best):
            if not (damage := manifest.find_damage(self.folder / str(best.step))):
                break
            self._set_aside(best.step, damage)
        return restored

    def save(self, state: TrainState, metadata: Metadata) -> None:
        """Starts to save; returns once the state may be given to the next step.

        Raises:
          CheckpointError: this or the last save failed (by `on_save_error`), the folder is gone,
            or the state is not finite.
        """
        self.wait()
        self._check_folder()
        self._clear_partial()
        if set(self._manager.all_steps()) != set(list_steps(self.folder)):
            self._manager.reload()  # Orbax would keep what is gone, and delete what is the best
        if not all_finite(state.params):
            raise CheckpointError(
                f"step {metadata.step}: params hold values that are not finite, so the state is "
                f"not saved; the last sound step is {max(self._eval_losses, default=None)}"
            )
        items = items_of(state)
        metadata = replace(metadata, fingerprints=fingerprint(items))
        loss = metadata.eval_loss
        metrics = None if loss is None or not math.isfinite(loss) else {"eval_loss": loss}
        args = {name: ocp.args.PyTreeSave(item) for name, item in items.items()}
        meta = ocp.args.JsonSave(metadata.to_json())
        self._saving = metadata
        self._last_save_s = time.monotonic()
        try:
            saved = self._manager.save(
                metadata.step,
                args=ocp.args.Composite(**args, meta=meta),
                metrics=metrics,
                force=True,
            )
            assert saved, f"Orbax refused step {metadata.step} without a word"
        except _SAVE_ERRORS as error:
            self._save_failed(error)

    def replace(self, state: TrainState, metadata: Metadata) -> None:
        """Saves a step that may be there already; at any instant, the one or the other is."""
        self.wait()
        current = self.folder / str(metadata.step)
        if not current.exists():
            return self.save(state, metadata)
        aside = self.folder / f"{metadata.step}{_REPLACED}"
        if self._primary:
            current.rename(aside)
            fsync(self.folder)
        self._sync("replacing")
        self._manager.reload()
        self.save(state, metadata)
        self.wait()
        if self._primary:
            self._finish_replacing(aside)
        self._sync("replaced")
        self._manager.reload()

    def poll(self) -> None:
        """Tells of a save that has ended since; costs nothing while it runs."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: it failed, and `on_save_error` is `stop`.
        """
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            fsync(self.folder)
        except _SAVE_ERRORS as error:
            self._save_failed(error)
            return
        metadata, self._saving = self._saving, None
        self._eval_losses[metadata.step] = metadata.eval_loss
        self._purge()
        best = self.best is not None and self.best.step == metadata.step
        self._on_commit(metadata.step, str(self.folder / str(metadata.step)), best)

    def _open_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics["eval_loss"],
            best_mode="min",
            save_decision_policy=checkpoint_managers.AnySavePolicy([]),
            preservation_policy=_Retention(self._config),
            cleanup_tmp_directories=True,
            todelete_subdir=_DELETING,
            async_options=ocp.AsyncOptions(
                timeout_secs=self._config.save_timeout_s,
                barrier_sync_fn=barrier if jax.process_count() > 1 else None,
                post_finalization_callback=self._write_manifest,
            ),
        )
        # Uncompressed: zstd would save 8% of the bytes and double the time.
        handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ITEMS}
        return ocp.CheckpointManager(
            self.folder,
            item_handlers={**handlers, "meta": ocp.JsonCheckpointHandler()},
            options=options,
        )

    def _write_manifest(self) -> None:
        # Runs in the saving thread of the primary process, after the arrays and before the rename.
        assert self._saving is not None
        (partial,) = self.folder.glob(f"{self._saving.step}.orbax-checkpoint-tmp*")
        manifest.write_manifest(partial)

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Metadata] | None:
        path = self.folder / str(step)
        if self._config.verify == "full" and (damage := manifest.find_damage(path)):
            return self._set_aside(step, damage)
        metadata = read_metadata(self.folder, step)
        verify = self._config.verify == "full"
        try:
            items = restore_items(path, metadata, items_of(abstract), verify=verify)
        except DamagedArrays as error:
            return self._set_aside(step, [str(error)])
        return state_of(items), metadata

    def _set_aside(self, step: int, damage: list[str]) -> None:
        path = self.folder / str(step)
        aside = path.with_name(f"{step}{CORRUPT}")
        for number in range(2, 1000):
            if not aside.exists():
                break
            aside = path.with_name(f"{step}{CORRUPT}-{number}")
        self._sync(f"damaged {step}")  # every process has seen it
        if self._primary:
            path.rename(aside)
            fsync(self.folder)
        self._sync(f"set aside {step}")
        self._eval_losses.pop(step, None)
        if hasattr(self, "_manager"):
            self._manager.reload()
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        self._warn(f"checkpoint {step} is damaged: {damage[0]}{more}; renamed to {aside.name}")

    def _save_failed(self, error: Exception) -> None:
        assert self._saving is not None
        step, self._saving = self._saving.step, None
        self._check_folder()
        self._clear_partial()
        self._manager.reload()
        kept = ", ".join(map(str, list_steps(self.folder))) or "none"
        text = (
            f"saving step {step} failed: {error}; on disk and untouched: {kept}. "
            f"Look at the disk of {self.folder}"
        )
        # With several processes, Orbax's barriers are out of step after an error.
        if self._config.on_save_error == "stop" or jax.process_count() > 1:
            raise CheckpointError(text + "; the same command goes on from the latest") from error
        self._warn(text + "; training goes on (checkpoint.on_save_error is warn)")

    def _clear_partial(self) -> None:
        # What a failed save has written. Its other threads may still be at it, so it is looked
        # for again before the next save.
        if self._primary and self._is_ours():
            for partial in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(partial, ignore_errors=True)

    def _is_ours(self) -> bool:
        # Whether the path still leads to the folder that was opened, and not to another one.
        try:
            found = self.folder.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def _check_folder(self) -> None:
        if not self._is_ours():
            raise CheckpointError(
                f"{self.folder} was deleted or replaced while the run was training; nothing more "
                "is written there. Bring it back, and the same command goes on from its latest"
            )

    def _finish_replacing(self, aside: Path) -> None:
        current = aside.with_name(aside.name.removesuffix(_REPLACED))
        if manifest.find_damage(current, contents=False):
            if current.exists():
                self._set_aside(int(current.name), ["it is unfinished"])
            aside.rename(current)
        else:
            aside.rename(self.folder / _DELETING / aside.name)
            self._purge()

    def _purge(self) -> None:
        # Orbax only renames into this folder; the space is ours to free, off the training thread.
        if not (self._primary and self._is_ours()):
            return
        doomed = self.folder / _DELETING
        doomed.mkdir(exist_ok=True)
        if self._purger.ident:
            self._purger.join()
        paths = list(doomed.iterdir())
        self._purger = threading.Thread(target=lambda: [shutil.rmtree(p, True) for p in paths])
        self._purger.start()

    def _sync(self, name: str) -> None:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{self.folder}: {name}")


_held: set[int] = set()


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


# A lock lives on in the children that its holder forks: they close their copy at once.
os.register_at_fork(after_in_child=_let_go)


def _lock(folder: Path) -> int:
    """Locks the folder itself, so that there is no lock file to delete; returns the descriptor.

    The kernel frees the lock when its holder dies.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"{folder} is in use by another trainer ({_holder(folder)}); wait for it, stop it, or "
            "start a new run with --run_dir"
        ) from None
    _held.add(descriptor)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.ctime()}
    write_file(folder / HOLDER, json.dumps(holder).encode())
    return descriptor


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER).read_bytes())
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (OSError, ValueError, KeyError):
        return "it has not said which"
