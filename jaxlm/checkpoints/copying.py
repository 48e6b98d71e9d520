"""Copies a run, or one step of it, to another place: complete and verified, or absent."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoints.entries import list_steps, when_settled
from jaxlm.checkpoints.folder import (
    TOKENIZER,
    WEIGHTS,
    find_checkpoints,
    run_folder,
    scan_folder,
    select,
)
from jaxlm.checkpoints.manifest import find_damage
from jaxlm.checkpoints.names import split_step
from jaxlm.errors import InputError, RunError
from jaxlm.files.durable import write_file
from jaxlm.files.ours import mark
from jaxlm.files.publish import check_free, published
from jaxlm.files.strict import read_json
from jaxlm.terminal import prints_lines, track
from jaxlm.tracking.events import NAME as EVENTS
from jaxlm.tracking.rows import NAME as ROWS
from jaxlm.tracking.rows import find_row_damage

_log = logging.getLogger(__name__)


class Copied(NamedTuple):
    """The result of a copy."""

    folder: Path | str
    """The new run folder, or its address."""
    steps: list[int]
    """Steps copied and verified."""
    deleted: list[int]
    """Steps that the trainer deleted meanwhile."""
    damaged: dict[int, str]
    """Step -> damage, of the steps left out."""


@prints_lines
def copy_run(run: str, dest: str, *, copy_file: Callable[[str, str], Any] = shutil.copy2) -> Copied:
    """Copies a run or one step into a new run folder, and verifies every file of the copy.

    A trainer may be training the source. The copy is an independent run, which can be listed,
    loaded and resumed. It has config, metrics, events, tokenizer, sound steps and `weights/` alone.

    Args:
      run: a run folder or checkpoint folder, with `@STEP` for one step alone.
      dest: the new folder; appears under this name once it is complete.
      copy_file: copies, or links, a file of a step.

    Raises:
      ValueError: no such run or step, `dest` exists or lies within the source, or no step is
        sound.
      RuntimeError: a file could not be read or written.
    """
    name, at = split_step(run)
    source, target = find_checkpoints(name), check_free(dest)
    # Newest first: a trainer deletes old steps meanwhile.
    run_dir, steps = run_folder(name, source), list_steps(source)[::-1]
    kept_weights = [] if at else list_steps(source / WEIGHTS)
    if at:  # `selected.folder` is `weights/` for a step of which only the weights are left
        selected = select(run)
        source, steps = selected.folder, [selected.step]
    check_outside(target, run_dir, source)
    deleted, damaged = [], {}
    with published(target) as partial:
        folder = partial / "checkpoints"
        folder.mkdir()
        mark(partial)
        mark(folder)
        try:
            paths = [str(step) for step in steps] + [f"{WEIGHTS}/{step}" for step in kept_weights]
            for path in track(paths, "Copying"):
                step = int(Path(path).name)
                damage = _copy_step(source / path, folder / path, copy_file)
                if damage is None:
                    deleted.append(step)
                    _log.info(f"{step}: deleted by its trainer meanwhile, passed over")
                elif damage:
                    damaged[step] = damage[0]
            _copy_files(source, folder, TOKENIZER, f"{WEIGHTS}/{TOKENIZER}")
            _copy_files(run_dir, partial, ROWS, EVENTS)
            _copy_config(run_dir, partial)
        except OSError as error:
            raise RunError(
                f"{dest}: the copy failed, and nothing is left of it ({error}); "
                "look at the disks, then start again"
            ) from error
        found = scan_folder(folder)
        for step, damage in found.damaged.items():  # such as steps of another run
            shutil.rmtree(folder / str(step))
            damaged[step] = damage[0]
        for step, damage in damaged.items():
            _log.info(f"{step}: damaged, left out: {damage}")
        if not (copied := list_steps(folder)):
            raise InputError(f"{run}: found no sound checkpoint to copy; look at {source}")
        newest = found.sound[max(found.sound)] if found.sound else None
        for what in find_row_damage(partial / ROWS, newest.rows) if newest else ():
            _log.warning(f"{ROWS}: {what}")
    return Copied(target, copied, deleted, damaged)


def check_outside(target: Path, *folders: Path) -> None:
    """Raises ValueError if `target` lies inside one of these folders."""
    if inside := [path for path in folders if target.resolve().is_relative_to(path.resolve())]:
        raise InputError(f"{target}: lies within {inside[0]}, expected a place outside of the run")


def _copy_step(source: Path, target: Path, copy_file: Callable[..., Any]) -> list[str] | None:
    # Returns the damage of source or copy, empty for none; None if the step was deleted meanwhile.
    def copy() -> list[str]:
        shutil.rmtree(target, ignore_errors=True)
        if damage := find_damage(source, contents=False):  # reports links and pipes as damage
            return damage
        try:
            shutil.copytree(source, target, copy_function=copy_file)
        except OSError:
            if source.exists():
                raise
        return find_damage(target)

    damage = when_settled(source, copy)
    if damage != []:
        shutil.rmtree(target, ignore_errors=True)
    return damage


def _copy_files(source: Path, target: Path, *names: str) -> None:
    for name in names:
        if (source / name).is_file() and (target / name).parent.is_dir():
            shutil.copy2(source / name, target / name)


def _copy_config(run: Path, target: Path) -> None:
    path = run / "config.json"
    if path.is_file():
        values = read_json(path, dict[str, Any])
        if isinstance(values.get("checkpoint"), dict):
            values["checkpoint"]["directory"] = None  # the default: `checkpoints/` in its run
        write_file(target / path.name, json.dumps(values, indent=2).encode())
