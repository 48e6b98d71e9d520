"""Saves and restores the states of a run, with verification.

A step is committed by one rename, with the manifest of its files and the fingerprints of its
arrays. Orbax's `CheckpointManager` writes and commits; this module decides when, verifies restored
states, and reports a save only once it is on disk.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.entries import REPLACED, UNFINISHED, list_corrupt, list_steps
from jaxlm.checkpoints.folder import scan_folder
from jaxlm.checkpoints.held import CheckpointError, HeldFolder
from jaxlm.checkpoints.manager import args_of, open_manager
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.multihost import agree_on_rows
from jaxlm.checkpoints.restore import DamagedArrays, items_of, restore_state
from jaxlm.cluster import agree
from jaxlm.config import CheckpointConfig
from jaxlm.device.fingerprint import PendingFingerprint, fingerprint_async
from jaxlm.device.state import TrainState, num_bytes
from jaxlm.files.durable import fsync
from jaxlm.insides import wait_for_step_metadata
from jaxlm.tracking.events import Events
from jaxlm.tracking.rows import Rows

_log = logging.getLogger(__name__)

_RETRY_S, _MAX_RETRY_S = 10.0, 600.0
# The errors of Orbax and TensorStore if the disk or the memory is full or fails.
_SAVE_ERRORS = (OSError, ValueError, RuntimeError, MemoryError)

Flush = Callable[[], Rows]
Restored = tuple[TrainState, Metadata]


@dataclass(frozen=True)
class _Save:
    """A save in progress: metadata, reason, and the fingerprint being computed."""

    metadata: Metadata
    why: str
    fingerprint: PendingFingerprint

    def proven(self) -> Metadata:
        """Waits for the fingerprints, and adds them; CheckpointError for NaN or infinite params."""
        fingerprints, nonfinite = self.fingerprint()
        if spoilt := next((name for name in nonfinite if name.startswith("params/")), None):
            raise CheckpointError(f"{spoilt} holds values that are not finite")
        return replace(self.metadata, fingerprints=fingerprints)


class Checkpoints(HeldFolder):
    """The checkpoints of a run in training, in a locked folder.

    Args:
      folder, config, events: as in `HeldFolder`.
      on_commit: called with (step, path, whether it is the best) once a checkpoint is on disk.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        on_commit: Callable[[int, str, bool], None],
        events: Events | None = None,
    ):
        super().__init__(folder, config, events=events)
        self._on_commit = on_commit
        self._saving: _Save | None = None
        self._num_failures, self._last_save_s = 0, time.monotonic()

    def __enter__(self) -> "Checkpoints":
        """Locks and opens the folder; errors are those of `hold`."""
        self.hold()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.release)
            self._manager = open_manager(self.folder, self._config.save_timeout_s, self._seal)
            on_error.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Waits for the save in progress; an error of the run takes precedence over its error."""
        try:
            self.wait()
            self._manager.close()
        except _SAVE_ERRORS as own:
            if error is None:
                raise
            _log.warning(str(own))
        finally:
            # After an interrupt, Orbax's threads may still be writing: the next start cleans up.
            # The end of the process releases the lock. `is_saving_in_progress` alone stays true if
            # Orbax refused a save before its threads started.
            if not (self._saving and self._manager.is_saving_in_progress()):
                self.clear_partial()
                self.release()

    @property
    def due_by_time(self) -> bool:
        """Whether a save is due by time: `save_interval_min`, or a retry of a failed save."""
        since_s = time.monotonic() - self._last_save_s
        if self._num_failures and not self._saving:
            return since_s >= min(_RETRY_S * 2 ** (self._num_failures - 1), _MAX_RETRY_S)
        minutes = self._config.save_interval_min
        return minutes is not None and since_s >= 60 * minutes

    def restore_latest(self, abstract: TrainState) -> Restored | None:
        """The newest sound state, verified; None in a folder that never held one.

        Raises:
          CheckpointError: the folder holds checkpoints, and none is sound.
          ValueError: the checkpoint is of another model.
        """
        restored, self.state_bytes = None, num_bytes(items_of(abstract))
        while restored is None and (latest := self.latest):
            restored = self._restore(latest, abstract)
        if restored is None and (aside := list_corrupt(self.folder)):
            raise CheckpointError(
                f"{self.folder} holds no sound checkpoint, only {', '.join(aside)}; bring "
                "back a copy of one, or start a new run with --run_dir"
            )
        self.find_sound(best=True)
        return restored

    def restore_best(self, abstract: TrainState) -> Restored | None:
        """The best sound state, verified; None if there is none."""
        restored = None
        while restored is None and (best := self.best):
            restored = self._restore(self._steps[best.step], abstract)
        return restored

    def save(
        self, state: TrainState, metadata: Metadata, before: Flush = Rows, why: str = ""
    ) -> None:
        """Starts a save; returns once the next step may consume the state.

        Args:
          state: the state.
          metadata: of the state, still without fingerprints.
          before: flushes the rows, which must be on disk first, and returns their length and
            checksum; if it fails, so does the save.
          why: human-readable reason.

        Raises:
          CheckpointError: this or the last save failed (by `on_save_error`), the folder is gone,
            or this or the last state is not finite.
        """
        self.wait()
        self.check_folder()
        self.clear_partial()
        if set(self._manager.all_steps()) != set(list_steps(self.folder)):
            self._manager.reload()  # Orbax caches the list of steps, which has changed on disk.
        items = items_of(state)
        self.state_bytes = num_bytes(items)
        metadata = replace(metadata, run_id=self.run_id)
        loss = metadata.eval_loss
        metrics = None if loss is None or not math.isfinite(loss) else {"eval_loss": loss}
        self._saving = _Save(metadata, why, fingerprint_async(items))
        self._last_save_s = time.monotonic()
        try:
            if jax.process_count() > 1:  # All reject NaN now: only process 0 runs `_seal`.
                self._saving.proven()
            rows = agree_on_rows(before())
            self._saving = replace(self._saving, metadata=replace(metadata, rows=rows))
            self._manager.save(metadata.step, args=args_of(items), metrics=metrics, force=True)
        except _SAVE_ERRORS as error:
            self._save_failed(error)

    def replace(self, state: TrainState, metadata: Metadata, before: Flush = Rows) -> None:
        """Saves a step again; at any instant, the old or the new copy is on disk."""
        self.wait()
        current = self.folder / str(metadata.step)
        if not agree(current.exists()):
            return self.save(state, metadata, before)
        aside = self.folder / f"{metadata.step}{REPLACED}"
        if self._primary:
            current.rename(aside)
            fsync(self.folder)
        agree(None)
        try:
            self.save(state, metadata, before)
            self.wait()
        finally:
            if self._primary and aside.exists():  # False if the folder was deleted: `save` raised
                self.finish_replacing(aside)
        agree(None)

    def poll(self) -> None:
        """Finishes and reports the save if its writing has ended; never blocks."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: the save failed and `on_save_error` is `stop`, or its params are not
            finite.
        """
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
            if self._primary:  # Other processes may not see the step yet.
                step_folder = self.folder / str(self._saving.metadata.step)
                for path in (*step_folder.iterdir(), step_folder, self.folder):
                    fsync(path)  # Covers Orbax's last files; raises if the step is missing.
        except _SAVE_ERRORS as error:
            return self._save_failed(error)
        metadata, why, self._saving = self._saving.proven(), self._saving.why, None
        self._num_failures = 0
        is_best = self.add(metadata, why)
        self._on_commit(metadata.step, str(self.folder / str(metadata.step)), is_best)

    def _seal(self) -> None:
        # Runs in the saving thread of the primary process, after the arrays and before the rename.
        assert self._saving is not None
        wait_for_step_metadata(self._manager)
        self.check_folder()  # TensorStore recreates a deleted folder, with half of the arrays.
        metadata = self._saving.proven()
        partial = self.folder / f"{metadata.step}{UNFINISHED}"
        metadata.write(partial)
        manifest.write_manifest(partial)

    def _restore(self, metadata: Metadata, abstract: TrainState) -> Restored | None:
        step, verify = metadata.step, self._config.verify == "full"
        # The fingerprints prove each array that is restored. The checksums of their files are read
        # where an array is left out, and where several processes must agree on damage.
        leaves_out = metadata.weights_item == "ema_params" and abstract.ema_params is None
        if (jax.process_count() > 1 or leaves_out) and not self.is_sound(step):
            return None
        try:
            state = restore_state(self.folder / str(step), metadata, abstract, verify=verify)
        except DamagedArrays as error:
            if jax.process_count() > 1:  # Other processes may have read the step correctly.
                raise CheckpointError(
                    f"{error}; look at the disk and the memory of this machine, then start all "
                    "processes again"
                ) from error
            return self.set_aside(step, self.damage(step) or [str(error)])
        if verify:
            self.proven.add(step)
        return state, metadata

    def _save_failed(self, error: Exception) -> None:
        assert self._saving is not None
        step, self._saving = self._saving.metadata.step, None
        self._num_failures += 1
        self.check_folder()
        self.clear_partial()
        self._manager.reload()
        self._steps |= scan_folder(self.folder, check=self._config.verify != "off").sound
        kept = ", ".join(map(str, list_steps(self.folder))) or "none"
        text = f"saving step {step} failed: {error}; on disk and untouched: {kept}"
        if isinstance(error, CheckpointError):
            raise CheckpointError(text) from error
        text += f". Look at the disk of {self.folder}"
        # With several processes, Orbax's barriers are out of step after an error.
        if self._config.on_save_error == "stop" or jax.process_count() > 1:
            raise CheckpointError(text + "; the same command resumes from the latest") from error
        _log.warning(
            text + "; training goes on, and tries again (checkpoint.on_save_error is warn)"
        )
