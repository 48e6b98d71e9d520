"""Keeps a run's states in a folder, so that none that matters is ever lost.

A step is committed by one rename; it carries the manifest of its files and the fingerprint of its
arrays. What turns out to be damaged is renamed aside and said, never deleted, and the next sound
one is taken. Orbax's `CheckpointManager` writes and commits; this module decides when, deletes,
verifies what came back, and reports only what is true on disk.
"""

import contextlib
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.entries import (
    CORRUPT,
    REPLACED,
    SUPERSEDED,
    UNFINISHED,
    list_corrupt,
    list_named,
    list_names,
    list_steps,
)
from jaxlm.checkpoints.folder import WEIGHTS, Best, find_best, scan_folder
from jaxlm.checkpoints.manager import args_of, open_manager
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.multihost import find_damage_together, rows_alike, scan_folder_alike
from jaxlm.checkpoints.quarantine import Purger, clear_partial, list_old_superseded, put_aside
from jaxlm.checkpoints.restore import DamagedArrays, items_of, restore_state
from jaxlm.checkpoints.retention import Retention
from jaxlm.cluster import agree
from jaxlm.config import CheckpointConfig
from jaxlm.device.fingerprint import PendingFingerprint, fingerprint_async
from jaxlm.device.state import TrainState, num_bytes
from jaxlm.files.durable import fsync
from jaxlm.files.lock import lock, unlock
from jaxlm.tracking.events import Events
from jaxlm.tracking.rows import Rows

_RETRY_S, _MAX_RETRY_S = 10.0, 600.0
# What Orbax and TensorStore raise when the disk refuses, or the memory.
_SAVE_ERRORS = (OSError, ValueError, RuntimeError, MemoryError)

Flush = Callable[[], Rows]
Restored = tuple[TrainState, Metadata]


class CheckpointError(RuntimeError):
    """A checkpoint could not be kept or had back; the message says what to do."""


@dataclass(frozen=True)
class _Save:
    """A save under way: what its checkpoint says, the reason, and what the device finds."""

    metadata: Metadata
    why: str
    fingerprint: PendingFingerprint

    def proven(self) -> Metadata:
        """The metadata with the fingerprints, for which it waits; raises CheckpointError."""
        fingerprints, nonfinite = self.fingerprint()
        if spoilt := next((name for name in nonfinite if name.startswith("params/")), None):
            raise CheckpointError(f"{spoilt} holds values that are not finite")
        return replace(self.metadata, fingerprints=fingerprints)


class Checkpoints:
    """The checkpoint folder of a run that trains; one trainer at a time.

    Of several processes, each makes the same calls in the same order, `best` and `latest` included.

    Args:
      folder: the folder, made if missing.
      config: when to keep what.
      on_commit: called with (step, path, whether it is the best) once a checkpoint is on disk.
      warn: called with a line about anything that is not as it should be.
      events: takes what happens to the checkpoints; by default it is not written down.

    Attributes:
      events: as above.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        on_commit: Callable[[int, str, bool], None],
        warn: Callable[[str], None],
        events: Events | None = None,
    ):
        self.folder = folder.absolute()
        self._config = config
        self._on_commit, self._warn = on_commit, warn
        self.events = events or Events(None)
        self._steps: dict[int, Metadata] = {}
        self._saving: _Save | None = None
        self._retention = Retention(config)
        self._num_failures, self._last_save_s = 0, time.monotonic()
        self._purger = Purger(self.folder, config.keep_weights_every)
        self._primary = jax.process_index() == 0

    def __enter__(self) -> "Checkpoints":
        """Locks the folder, clears what a killed run left half-done, and sets damaged steps aside.

        Raises:
          ValueError: jaxlm did not make the folder.
          RuntimeError: another trainer holds the folder, or it cannot be written.
        """
        if self._primary:
            self._lock = lock(
                self.folder, required=self._config.lock == "required", warn=self._warn
            )
            self._opened = self.folder.stat()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._unlock)
            self._open()
            on_error.pop_all()
        return self

    def _open(self) -> None:
        if self._primary:
            self._purge()
            clear_partial(self.folder)
            self._tell({})  # what a kill kept from being written down
            for path in list_named(self.folder, REPLACED):
                self._finish_replacing(path)
        # The others wait in this one until process 0 has done all of that.
        found = scan_folder_alike(self.folder, check=self._config.verify != "off")
        self._opened = self.folder.stat()
        self._steps = found.sound
        self._run_id = agree(found.run_id or secrets.token_hex(8))
        for step, damage in found.damaged.items():
            self._set_aside(step, damage)
        self._manager = open_manager(self.folder, self._config.save_timeout_s, self._seal)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Waits for the save under way; an error of the run itself goes first."""
        try:
            self.wait()
            self._manager.close()
        except _SAVE_ERRORS as own:
            if error is None:
                raise
            self._warn(str(own))
        finally:
            # After an interrupt, Orbax's threads may still be writing: the next start cleans up.
            # The end of the process releases the lock.
            if not self._manager.is_saving_in_progress():
                self._clear_partial()
                self._purger.join()
                self._unlock()

    def _unlock(self) -> None:
        if self._primary:
            unlock(self._lock)

    @property
    def best(self) -> Best | None:
        """The best checkpoint that is on disk."""
        return self.best_with(-1, None)

    def best_with(self, step: int, eval_loss: float | None) -> Best | None:
        """The best, once a checkpoint of this step and eval loss is on disk too."""
        losses = {s: found.eval_loss for s, found in self._look().items()}
        return find_best({**losses, step: eval_loss})

    @property
    def latest(self) -> Metadata | None:
        """The newest checkpoint that is on disk."""
        return max(self._look().values(), key=lambda found: found.step, default=None)

    def _look(self) -> dict[int, Metadata]:
        # What is on disk, without what was deleted by hand, as the first process sees it: others
        # may see a shared disk as it was some seconds ago, and all must decide alike.
        there = agree([step for step in self._steps if (self.folder / str(step)).exists()])
        return {step: self._steps[step] for step in there}

    def retain(self) -> None:
        """Deletes what retention drops; a kill may have come between a commit and its deletions."""
        self._drop()
        self._tell(self._retention.dropped)
        self._steps = self._look()
        self._manager.reload()

    @property
    def due_by_time(self) -> bool:
        """Whether the clock wants a save: for its interval, or to try a failed one again."""
        since_s = time.monotonic() - self._last_save_s
        if self._num_failures and not self._saving:
            return since_s >= min(_RETRY_S * 2 ** (self._num_failures - 1), _MAX_RETRY_S)
        minutes = self._config.save_interval_min
        return minutes is not None and since_s >= 60 * minutes

    def damage(self, step: int) -> list[str]:
        """What of a step's files is not as it was written; all processes share in the reading."""
        return find_damage_together(self.folder / str(step))

    def restore_latest(self, abstract: TrainState) -> Restored | None:
        """The newest state that is proven sound, or None in a folder that never held one.

        Raises:
          CheckpointError: the folder holds checkpoints, and none is sound.
          ValueError: the checkpoint is of another model.
        """
        restored, self._retention.state_bytes = None, num_bytes(items_of(abstract))
        while restored is None and (latest := self.latest):
            restored = self._restore(latest, abstract)
        if restored is None and (aside := list_corrupt(self.folder)):
            raise CheckpointError(
                f"{self.folder} holds no sound checkpoint, only {', '.join(aside)}; bring "
                "back a copy of one, or start a new run with --run_dir"
            )
        while self._config.verify == "full" and (best := self.best):
            if not (damage := self.damage(best.step)):
                break
            self._set_aside(best.step, damage)
        return restored

    def restore_best(self, abstract: TrainState) -> Restored | None:
        """The best state that is proven sound, or None if there is none."""
        restored = None
        while restored is None and (best := self.best):
            restored = self._restore(self._steps[best.step], abstract)
        return restored

    def go_back(self, to: int, why: str) -> None:
        """Sets all that came after step `to` aside as N.superseded.

        In ascending order: until the last one is renamed, the latest stays the latest, and a start
        after a kill goes back as this one did.
        """
        weights = self.folder / WEIGHTS
        if self._primary and (newer := [step for step in list_steps(weights) if step > to]):
            put_aside(weights, newer, SUPERSEDED)
            self._purge(*list_old_superseded(weights, self._config.keep_latest))
        newer = agree([step for step in list_steps(self.folder) if step > to])
        self.events.add("back", to, f"from step {newer[-1]}: {why}")
        self._put_aside(newer, SUPERSEDED, f"the run went back to step {to}")

    def save(
        self, state: TrainState, metadata: Metadata, before: Flush = Rows, why: str = ""
    ) -> None:
        """Starts to save; returns once the state may be given to the next step.

        Args:
          state: the state.
          metadata: what the checkpoint says of it.
          before: brings the rows to the disk, which must be there first, and returns what proves
            them; if it fails, so does the save.
          why: the reason, for people.

        Raises:
          CheckpointError: this or the last save failed (by `on_save_error`), the folder is gone,
            or this or the last state is not finite.
        """
        self.wait()
        self._check_folder()
        self._clear_partial()
        if set(self._manager.all_steps()) != set(list_steps(self.folder)):
            self._manager.reload()  # Orbax would keep what is gone, and delete what is the best
        self._steps = self._look()  # the memory too is free of what is deleted
        items = items_of(state)
        self._retention.state_bytes = num_bytes(items)
        metadata = replace(metadata, run_id=self._run_id)
        loss = metadata.eval_loss
        metrics = None if loss is None or not math.isfinite(loss) else {"eval_loss": loss}
        self._saving = _Save(metadata, why, fingerprint_async(items))
        self._last_save_s = time.monotonic()
        try:
            if jax.process_count() > 1:  # all refuse alike; in its saving thread, one alone would
                self._saving.proven()
            rows = rows_alike(before())
            self._saving = replace(self._saving, metadata=replace(metadata, rows=rows))
            self._manager.save(metadata.step, args=args_of(items), metrics=metrics, force=True)
        except _SAVE_ERRORS as error:
            self._save_failed(error)

    def replace(self, state: TrainState, metadata: Metadata, before: Flush = Rows) -> None:
        """Saves a step that may be there already; at any instant, the one or the other is."""
        self.wait()
        current = self.folder / str(metadata.step)
        if not agree(current.exists()):
            return self.save(state, metadata, before)
        aside = self.folder / f"{metadata.step}{REPLACED}"
        if self._primary:
            current.rename(aside)
            fsync(self.folder)
        agree(None)
        self._manager.reload()
        try:
            self.save(state, metadata, before)
            self.wait()
        finally:
            if self._primary and aside.exists():  # a folder that is gone has its error already
                self._finish_replacing(aside)
        agree(None)
        self._manager.reload()

    def poll(self) -> None:
        """Reports a save that has ended; costs nothing while the save runs."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: it failed, and `on_save_error` is `stop`; or its state was not finite.
        """
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            if self._primary:  # the others may not see it yet
                step_folder = self.folder / str(self._saving.metadata.step)
                for path in (*step_folder.iterdir(), step_folder, self.folder):
                    fsync(path)  # Orbax's own files too; and the step is there at all
        except _SAVE_ERRORS as error:
            return self._save_failed(error)
        metadata, why, self._saving = self._saving.proven(), self._saving.why, None
        self._steps[metadata.step] = metadata
        self._num_failures = 0
        self._drop()
        best = find_best({step: found.eval_loss for step, found in self._steps.items()})
        is_best = best is not None and best.step == metadata.step
        self._tell({str(metadata.step): why} | self._retention.dropped)
        if is_best:
            self.events.add("best", metadata.step, f"eval loss {metadata.eval_loss:.4f}")
        self._on_commit(metadata.step, str(self.folder / str(metadata.step)), is_best)

    def _seal(self) -> None:
        # Runs in the saving thread of the primary process, after the arrays and before the rename.
        assert self._saving is not None
        # Orbax writes `_CHECKPOINT_METADATA` in a thread of its own, and has no public way to wait.
        self._manager._non_blocking_metadata_store.wait_until_finished()
        self._check_folder()  # TensorStore makes a deleted one again, with half of the arrays
        metadata = self._saving.proven()
        partial = self.folder / f"{metadata.step}{UNFINISHED}"
        metadata.write(partial)
        manifest.write_manifest(partial)

    def _restore(self, metadata: Metadata, abstract: TrainState) -> Restored | None:
        path, verify = self.folder / str(metadata.step), self._config.verify == "full"
        if verify and (damage := self.damage(metadata.step)):
            return self._set_aside(metadata.step, damage)
        try:
            return restore_state(path, metadata, abstract, verify=verify), metadata
        except DamagedArrays as error:
            if jax.process_count() > 1:  # the others may have read it well
                raise CheckpointError(
                    f"{error}; look at the disk and the memory of this machine, then start all "
                    "processes again"
                ) from error
            return self._set_aside(metadata.step, [str(error)])

    def _set_aside(self, step: int, damage: list[str]) -> None:
        (name,) = self._put_aside([step], CORRUPT, f"damaged: {damage[0]}")
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        self._warn(f"checkpoint {step} is damaged: {damage[0]}{more}; renamed to {name}")

    def _put_aside(self, steps: Sequence[int], suffix: str, why: str) -> list[str]:
        # The new names, of steps on which all processes have agreed.
        if not steps:
            return []
        names = agree(put_aside(self.folder, steps, suffix) if self._primary else [])
        self._tell(dict.fromkeys(names, why))
        if self._primary and suffix == SUPERSEDED:
            old = list_old_superseded(self.folder, self._config.keep_latest)
            self._purger.purge(*old)
            self._tell({path.name: "not among the newest set aside" for path in old})
        for step in steps:
            self._steps.pop(step, None)
        if hasattr(self, "_manager"):
            self._manager.reload()
        return names

    def _save_failed(self, error: Exception) -> None:
        assert self._saving is not None
        step, self._saving = self._saving.metadata.step, None
        self._num_failures += 1
        self._check_folder()
        self._clear_partial()
        self._manager.reload()
        self._steps |= scan_folder(self.folder, check=self._config.verify != "off").sound
        kept = ", ".join(map(str, list_steps(self.folder))) or "none"
        text = f"saving step {step} failed: {error}; on disk and untouched: {kept}"
        if isinstance(error, CheckpointError):
            raise CheckpointError(text) from error
        text += f". Look at the disk of {self.folder}"
        # With several processes, Orbax's barriers are out of step after an error.
        if self._config.on_save_error == "stop" or jax.process_count() > 1:
            raise CheckpointError(text + "; the same command goes on from the latest") from error
        self._warn(text + "; training goes on, and tries again (checkpoint.on_save_error is warn)")

    def _clear_partial(self) -> None:
        if self._primary and self._is_ours():
            clear_partial(self.folder)

    def _is_ours(self) -> bool:
        # Whether the path still leads to the folder that was opened, and not to another one.
        with contextlib.suppress(OSError):
            return os.path.samestat(self.folder.stat(), self._opened)
        return False

    def _check_folder(self) -> None:
        if not self._is_ours():
            raise CheckpointError(
                f"{self.folder} was deleted or replaced while the run was training; nothing more "
                "is written there. Bring it back, and the same command goes on from its latest"
            )

    def _finish_replacing(self, aside: Path) -> None:
        current = aside.with_name(aside.name.removesuffix(REPLACED))
        if manifest.find_damage(current, contents=False):
            if current.exists():  # not by `_put_aside`: no other process comes here
                (name,) = put_aside(self.folder, [int(current.name)], CORRUPT)
                self._tell({name: "damaged: it is unfinished"})
                self._warn(f"checkpoint {current.name} is unfinished; renamed to {name}")
            aside.rename(current)
        else:
            self._purger.purge(aside)

    def _tell(self, why: dict[str, str]) -> None:
        # Writes down what has become of the checkpoints since the last time.
        self.events.compare(list_names(self.folder), why)

    def _drop(self) -> None:
        there = [step for step in sorted(self._steps) if (self.folder / str(step)).exists()]
        kept = self._retention.kept({step: self._steps[step].eval_loss for step in there})
        self._purge(*(self.folder / str(step) for step in there if step not in kept))

    def _purge(self, *paths: Path) -> None:
        if self._primary and self._is_ours():
            with contextlib.suppress(OSError):  # what stays is for the next time
                self._purger.purge(*paths)
