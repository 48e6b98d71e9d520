"""The checkpoint folder that a trainer has locked: its steps, retention and quarantine.

A damaged step is renamed and reported, never deleted. Only names that jaxlm gives are touched.
"""

import contextlib
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.entries import (
    CORRUPT,
    REPLACED,
    SUPERSEDED,
    list_named,
    list_names,
    list_steps,
)
from jaxlm.checkpoints.folder import WEIGHTS, Best, find_best
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.multihost import agree_on_scan, find_damage_together
from jaxlm.checkpoints.quarantine import Purger, clear_partial, list_old_superseded, put_aside
from jaxlm.checkpoints.retention import choose_kept, why_dropped
from jaxlm.cluster import agree
from jaxlm.config import CheckpointConfig
from jaxlm.errors import RunError
from jaxlm.files.lock import Lock, lock, unlock
from jaxlm.tracking.events import Events

_log = logging.getLogger(__name__)


class CheckpointError(RunError):
    """A checkpoint could not be saved or restored; the message says what to do."""


class HeldFolder:
    """A checkpoint folder, and the steps in it that are sound.

    `best`, `latest` and `steps` are collectives: every process reads them in the same order, or
    `agree` mixes the values.

    Args:
      folder: the folder, made if missing.
      config: the rules of retention.
      events: records what happens to the checkpoints; by default nothing is recorded.

    Attributes:
      events: as above.
      run_id: the same in all checkpoints of the run.
      state_bytes: size of a checkpoint, for the disk budget; 0 until it is known.
      proven: steps whose files or arrays were all verified since the start.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, events: Events | None = None):
        self.folder = folder.absolute()
        self.events = events or Events(None)
        self.run_id = ""
        self.state_bytes = 0
        self.proven: set[int] = set()
        self._config = config
        self._steps: dict[int, Metadata] = {}
        self._purger = Purger(self.folder, config.keep_weights_every)
        self._primary = jax.process_index() == 0
        self._lock: Lock | None = None

    def hold(self) -> None:
        """Locks the folder, removes a killed run's unfinished files, sets damaged steps aside.

        Raises:
          ValueError: jaxlm did not make the folder.
          RuntimeError: another trainer holds the folder, or it cannot be written.
        """
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.release)
            if self._primary:
                required = self._config.lock == "required"
                self._lock = lock(self.folder, required=required)
                self._opened = self.folder.stat()
                self._purge()
                clear_partial(self.folder)
                self._write_down({})  # Record changes that a kill left out of events.jsonl.
                for path in list_named(self.folder, REPLACED):
                    self.finish_replacing(path)
            # The scan begins with `agree`, so the others wait here until process 0 has cleaned up.
            found = agree_on_scan(self.folder, check=self._config.verify != "off")
            self._opened = self.folder.stat()
            self._steps = found.sound
            self.run_id = agree(found.run_id or secrets.token_hex(8))
            for step, damage in found.damaged.items():
                self.set_aside(step, damage)
            on_error.pop_all()

    def release(self) -> None:
        """Frees the lock, and removes what `lock` made if nothing else was written."""
        self._purger.join()
        if self._lock:
            unlock(self._lock)

    @property
    def best(self) -> Best | None:
        """The best checkpoint that is on disk."""
        return self.best_with(-1, None)

    def best_with(self, step: int, eval_loss: float | None) -> Best | None:
        """The best checkpoint, as if one with this step and eval loss were on disk too."""
        losses = {s: found.eval_loss for s, found in self.steps.items()}
        return find_best({**losses, step: eval_loss})

    @property
    def latest(self) -> Metadata | None:
        """The newest checkpoint that is on disk."""
        return max(self.steps.values(), key=lambda found: found.step, default=None)

    @property
    def steps(self) -> dict[int, Metadata]:
        """Step -> metadata of the sound checkpoints, without those that were deleted by hand.

        Process 0 looks for all: the others may see a shared disk as it was some seconds ago, and
        would decide otherwise.
        """
        there = agree([step for step in self._steps if (self.folder / str(step)).exists()])
        self._steps = {step: self._steps[step] for step in there}
        return self._steps

    def damage(self, step: int) -> list[str]:
        """A line for each damaged file of a step; the processes share the reading."""
        return find_damage_together(self.folder / str(step))

    def is_sound(self, step: int) -> bool:
        """Whether a step is sound; reads its files unless it is proven, sets damage aside."""
        if self._config.verify == "full" and step not in self.proven:
            if damage := self.damage(step):
                self.set_aside(step, damage)
                return False
            self.proven.add(step)
        return True

    def find_sound(self, *, best: bool = False) -> Metadata | None:
        """The latest (or best) step whose files are sound; damaged ones are set aside."""
        while (of := self.best if best else self.latest) and not self.is_sound(of.step):
            pass
        return self._steps[of.step] if of else None

    def add(self, metadata: Metadata, why: str) -> bool:
        """Adds a committed step, and deletes the checkpoints that retention drops.

        Returns:
          Whether the step is the best.
        """
        self._steps[metadata.step] = metadata
        self.proven.discard(metadata.step)
        self.retain({str(metadata.step): why})
        best = find_best({step: found.eval_loss for step, found in self._steps.items()})
        if is_best := best is not None and best.step == metadata.step:
            self.events.add("best", metadata.step, f"eval loss {metadata.eval_loss:.4f}")
        return is_best

    def retain(self, why: dict[str, str] | None = None) -> None:
        """Deletes the checkpoints that retention drops.

        Starts call it too: a kill between a commit and its deletions leaves extra ones.

        Args:
          why: reasons for the other changes to record, by folder name.
        """
        there = [step for step in sorted(self._steps) if (self.folder / str(step)).exists()]
        losses = {step: self._steps[step].eval_loss for step in there}
        kept = choose_kept(self._config, losses, state_bytes=self.state_bytes)
        dropped = [str(step) for step in there if step not in kept]
        self._purge(*(self.folder / name for name in dropped))
        self._write_down((why or {}) | dict.fromkeys(dropped, why_dropped(self._config)))

    def go_back(self, to: int, why: str) -> None:
        """Renames every step after `to` to N.superseded.

        Ascending order keeps the latest until last, so a start after a kill sees the same latest
        and goes back again.
        """
        weights = self.folder / WEIGHTS
        if self._primary and (newer := [step for step in list_steps(weights) if step > to]):
            put_aside(weights, newer, SUPERSEDED)
            self._purge(*list_old_superseded(weights, self._config.keep_latest))
        newer = agree([step for step in list_steps(self.folder) if step > to])
        self.events.add("back", to, f"from step {max(newer, default=to)}: {why}")
        self._put_aside(newer, SUPERSEDED, f"the run went back to step {to}")
        if self._primary:
            old = list_old_superseded(self.folder, self._config.keep_latest)
            self._purge(*old)
            self._write_down({path.name: "not among the newest set aside" for path in old})

    def set_aside(self, step: int, damage: list[str]) -> None:
        """Renames a damaged step to N.corrupt, and reports it."""
        (name,) = self._put_aside([step], CORRUPT, f"damaged: {damage[0]}")
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        _log.warning(f"checkpoint {step} is damaged: {damage[0]}{more}; renamed to {name}")

    def finish_replacing(self, aside: Path) -> None:
        """Keeps a re-saved step if complete; otherwise restores its older copy from N.replaced.

        Called in process 0 alone.
        """
        current = aside.with_name(aside.name.removesuffix(REPLACED))
        if manifest.find_damage(current, contents=False):
            if current.exists():  # `_put_aside` would wait in `agree` for the other processes.
                (name,) = put_aside(self.folder, [int(current.name)], CORRUPT)
                self._write_down({name: "damaged: it is unfinished"})
                _log.warning(f"checkpoint {current.name} is unfinished; renamed to {name}")
            aside.rename(current)
        else:
            self._purger.purge(aside)

    def clear_partial(self) -> None:
        """Removes the files of a failed save."""
        if self._primary and self._is_opened_folder():
            clear_partial(self.folder)

    def check_folder(self) -> None:
        """Raises CheckpointError unless the path still leads to the folder that was opened."""
        if not self._is_opened_folder():
            raise CheckpointError(
                f"{self.folder} was deleted or replaced during training; nothing more is written "
                "there. Bring it back: the same command resumes from the latest checkpoint"
            )

    def _is_opened_folder(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(self.folder.stat(), self._opened)
        return False

    def _put_aside(self, steps: Sequence[int], suffix: str, why: str) -> list[str]:
        # Renames `steps`, the same on every process; returns their new names.
        names = agree(put_aside(self.folder, steps, suffix) if self._primary else [])
        self._write_down(dict.fromkeys(names, why))
        for step in steps:
            self._steps.pop(step, None)
            self.proven.discard(step)
        return names

    def _write_down(self, why: dict[str, str]) -> None:
        # Records the checkpoints that came, went or were renamed since the last call.
        self.events.compare(list_names(self.folder), why)

    def _purge(self, *paths: Path) -> None:
        if self._primary and self._is_opened_folder():
            with contextlib.suppress(OSError):  # The next purge tries again.
                self._purger.purge(*paths)
