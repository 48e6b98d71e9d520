"""The config of a resume, checked against the newest checkpoint."""

import dataclasses
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxlm.checkpoints.checkpoint import Checkpoints
from jaxlm.checkpoints.folder import Best, list_steps, recorded_directory, select
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.config import Change, Config, changes
from jaxlm.device.optim import make_schedule
from jaxlm.errors import InputError

_log = logging.getLogger(__name__)


class ResumePlan(NamedTuple):
    """The config of a resumed run, and its differences from the checkpoint."""

    config: Config
    """The config to train with."""
    changed: list[Change]
    """Fields that differ from the newest checkpoint's; a resume may change each."""
    complete: bool
    """Whether no step is left, and both checkpoints on disk are sound."""


def check_folders(config: Config) -> None:
    """Refuses wrong folders before anything is made or locked.

    Raises:
      ValueError: the folders hold another run, or any with `resume` never; or the checkpoint
        to start from is missing.
    """
    run_dir, folder = Path(config.run_dir), Path(config.checkpoint_dir)
    if run_dir.resolve() != folder.resolve():
        _check_roles(run_dir, folder)
    steps = list_steps(folder)
    if config.resume == "never" and steps:
        raise InputError(
            f"resume: found never, but {folder} holds checkpoints {steps}; "
            "choose another --run_dir, or leave --resume out to resume from the latest"
        )
    _check_run_folder(config)
    if steps:  # A resume: the options below only begin a run.
        return
    if config.init_from:
        select(config.init_from, contents=False)
    if config.branch_from:
        step = select(config.branch_from, contents=False).step
        if step >= config.num_steps:
            raise InputError(
                f"branch_from: found step {step}, expected one before num_steps "
                f"({config.num_steps}); add a larger --num_steps"
            )


def _check_roles(run_dir: Path, folder: Path) -> None:
    # A run in another's checkpoint folder would hide the other from commands given it.
    if (folder / "config.json").is_file():
        raise InputError(
            f"checkpoint.directory: found {folder}, the run folder of another run; choose another "
            "--checkpoint_dir"
        )
    if steps := list_steps(run_dir):
        raise InputError(
            f"run_dir: found {run_dir}, the checkpoint folder of another run (steps {steps}); "
            "choose another --run_dir"
        )


def plan_resume(config: Config, checkpoints: Checkpoints) -> ResumePlan:
    """Compares the config with that of the newest checkpoint.

    Raises:
      ValueError: a fixed field differs.
    """
    latest, best = checkpoints.latest, checkpoints.best
    if latest is None:
        return ResumePlan(config, [], False)
    before = latest.run_config()
    # Chosen at the first start: best keeps its meaning.
    chosen = {
        name: getattr(before.data, name)
        for name in ("eval_tokens", "best_by")
        if getattr(config.data, name) is None
    }
    there = {**config.data.corpora, **config.data.held_out}
    if chosen.get("best_by") and (gone := {*before.data.judges} - {*there}):
        raise InputError(
            f"data.sources: found {', '.join(there)}, without {', '.join(sorted(gone))}, whose "
            f"held-out set decides the best of {config.run_dir}; name it too, with weight 0 if it "
            "is not to be trained on any more, or add --run_dir for a new run"
        )
    data = dataclasses.replace(config.data, **chosen)
    config = dataclasses.replace(config, data=data)
    changed = _allowed_changes(latest, config, checkpoints.folder)
    _check_owner(latest, config)
    complete = latest.final and is_at_end(config, latest.step, latest.num_worse_evals)
    if not complete or (best and goes_back(config, latest, best)):
        return ResumePlan(config, changed, False)
    to_verify = {each.step for each in (latest, best) if each}
    # Not a generator: each damaged one is set aside, not only the first.
    sound = [checkpoints.is_sound(step) for step in sorted(to_verify)]
    return ResumePlan(config, changed, all(sound))


def goes_back(config: Config, latest: Metadata, best: Best) -> bool:
    """Whether `--resume best` must still go back to the best.

    Each checkpoint made under `--resume best` records it; the same command then resumes from
    the latest.
    """
    asked = config.resume == "best" and best.step < latest.step
    return asked and latest.run_config().resume != "best"


def is_at_end(config: Config, step: int, num_worse_evals: int) -> bool:
    """Whether training ends at this step: by `num_steps`, or by `stop_after_worse_evals`."""
    limit = config.stop_after_worse_evals
    return step >= config.num_steps or (limit is not None and num_worse_evals >= limit)


def _allowed_changes(latest: Metadata, config: Config, folder: Path) -> list[Change]:
    differing = changes(latest.run_config(), config)
    refused = [str(change) for change in differing if change.policy == "fixed"]
    if refused:
        raise InputError(
            f"{folder} holds a run with other settings, which a resume cannot change:\n  "
            + "\n  ".join(refused)
            + "\nadd --run_dir for a new run, or set these back to resume this one"
        )
    return differing


def log_changes(restored: Metadata, config: Config, recorded: list[Change]) -> None:
    """Logs recorded changes and their effect on the learning rate."""
    for change in recorded:
        _log.info(f"changed from step {restored.step} on: {change}")
    if any(change.name.startswith(("optim.", "num_steps")) for change in recorded):
        was, now = (_learning_rate(c, restored.step) for c in (restored.run_config(), config))
        _log.info(f"learning rate at step {restored.step}: was {was:.3e}, is {now:.3e}")


def _check_owner(restored: Metadata, config: Config) -> None:
    owner = restored.run_config().run_dir
    if config.checkpoint.directory and owner != config.run_dir:
        raise InputError(
            f"checkpoint.directory: found {config.checkpoint.directory}, which holds the run "
            f"{owner}; for a new run, name another --checkpoint_dir too, or leave it out"
        )


def _check_run_folder(config: Config) -> None:
    # A resume from another checkpoint folder would truncate the rows of metrics.jsonl.
    if not (Path(config.run_dir) / "config.json").is_file():
        return
    there = recorded_directory(Path(config.run_dir))
    if there != config.checkpoint.directory:
        raise InputError(
            f"checkpoint.directory: found {config.checkpoint.directory}, but run_dir "
            f"{config.run_dir} belongs to {there or 'its own checkpoints'}; add --run_dir for a "
            "new run, or set it back (after moving the folder: edit its config.json)"
        )


def _learning_rate(config: Config, step: int) -> float:
    return float(np.asarray(make_schedule(config.optim, config.num_steps)(step)))
