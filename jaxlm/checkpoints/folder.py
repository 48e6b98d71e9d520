"""Reads a checkpoint folder: steps, their metadata, and which is best, latest and final.

Changes nothing, and may be used while a trainer writes (`jaxlm.checkpoints.checkpoint`).
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.entries import identity, list_corrupt, list_steps
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.names import split_step
from jaxlm.data.run_data import Recorded
from jaxlm.errors import InputError
from jaxlm.files.durable import expand
from jaxlm.files.strict import read_json
from jaxlm.terminal import progress

TOKENIZER = "tokenizer.json"
WEIGHTS = "weights"
"""The folder, beside the steps, of deleted steps whose weights were kept."""


MAX_CHOICES = 20
"""Limit of choices, if a trainer deletes one chosen step after the other."""


class Best(NamedTuple):
    """The best checkpoint on disk."""

    step: int
    loss: float


def read_metadata(folder: Path, step: int) -> Metadata:
    """The metadata of one step.

    Raises:
      ValueError: the metadata is missing or cannot be read.
    """
    path = folder / str(step) / "meta" / "metadata"
    try:
        metadata = Metadata.from_json(read_json(path, dict[str, Any]))
        if metadata.step != step:
            raise InputError(f"it is of step {metadata.step}")
        return metadata
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder / str(step)}: its metadata cannot be read ({error}); name another step"
        ) from error


class FolderScan(NamedTuple):
    """The result of a quick check of a checkpoint folder."""

    sound: dict[int, Metadata]
    """Step, ascending -> metadata. Of large files, only the size was checked."""
    damaged: dict[int, list[str]]
    """Step -> lines about its damage."""
    run_id: str
    """The run of these steps; empty without steps."""


def scan_folder(folder: Path, *, check: bool = True) -> FolderScan:
    """Checks every step quickly; changes nothing, and a trainer may be writing there.

    Args:
      folder: the checkpoint folder.
      check: compare the files with the manifest.

    Raises:
      ValueError: two runs have equally many checkpoints there, or `check` is off and metadata
        cannot be read.
    """
    found, damaged = {}, {}
    for step in list_steps(folder):
        try:
            damage = manifest.find_damage(folder / str(step), contents=False) if check else []
            if damage and (folder / str(step)).exists():
                damaged[step] = damage
            elif not damage:
                found[step] = read_metadata(folder, step)
        except (OSError, ValueError):
            if not check or (folder / str(step)).exists():
                raise  # a complete step of another version; a deleted one is skipped
    run_id, foreign = _run_and_others(folder, {s: m.run_id for s, m in found.items()})
    for step in foreign:
        other = found.pop(step).run_id
        damaged[step] = [f"it is of another run ({other}) than the others ({run_id})"]
    return FolderScan(found, damaged, run_id)


def _run_and_others(folder: Path, run_ids: dict[int, str]) -> tuple[str, list[int]]:
    # The run of most checkpoints, and the steps of other runs.
    ranked = Counter(run_ids.values()).most_common(2)
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        found = ", ".join(f"{step} of run {run_id}" for step, run_id in run_ids.items())
        raise InputError(
            f"{folder}: found checkpoints of several runs ({found}), expected those of one; "
            "move away those that are not of this run"
        )
    own = ranked[0][0] if ranked else ""
    return own, [step for step, run_id in run_ids.items() if run_id != own]


def find_best(eval_losses: dict[int, float | None]) -> Best | None:
    """The step of the lowest finite loss; the first of equal ones."""
    finite = [Best(s, x) for s, x in eval_losses.items() if x is not None and math.isfinite(x)]
    return min(finite, key=lambda best: (best.loss, best.step), default=None)


class _Directory(TypedDict):
    directory: str | None


class _Recorded(TypedDict):
    checkpoint: _Directory


def recorded_directory(run_dir: Path) -> str | None:
    """`checkpoint.directory` in the config.json of a run folder.

    Raises:
      OSError: the file cannot be read.
      ValueError: the file is not a config.
    """
    return read_json(run_dir / "config.json", _Recorded)["checkpoint"]["directory"]


def find_checkpoints(run: str) -> Path:
    """The checkpoint folder of a run folder, or of itself.

    Raises:
      ValueError: there is none.
    """
    path = Path(expand(run, "RUN"))
    if (path / "config.json").is_file():
        try:
            recorded = recorded_directory(path)
        except ValueError as error:
            raise InputError(
                f"{run}: its config.json is not that of a run ({error}); of a folder of "
                f"transformers, `jaxlm import {run} RUN` makes one; if the file is damaged, name "
                f"{path / 'checkpoints'} instead"
            ) from error
        path = Path(recorded) if recorded else path / "checkpoints"
    elif (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    try:
        found = list_steps(path) or list_corrupt(path)
    except OSError as error:
        raise InputError(f"{run}: its checkpoints cannot be listed ({error.strerror})") from error
    if not found and not (path.name == "checkpoints" and path.is_dir()):
        raise InputError(
            f"{run}: found no checkpoints, expected a run folder (such as runs/tiny) "
            "or its checkpoints folder" + (", without a @STEP" if "@" in run else "")
        )
    return path


def run_folder(run: str, folder: Path) -> Path:
    """The run folder of `run`, which names the run folder or its checkpoint folder."""
    path = Path(expand(run, "RUN"))
    is_run = (path / "config.json").is_file() or path != folder
    return path if is_run else folder.parent


class Selected(NamedTuple):
    """The checkpoint that RUN@STEP names."""

    folder: Path
    step: int
    metadata: Metadata
    passed_over: dict[int, list[str]]
    """Damaged steps that would, or might, have been chosen -> lines about their damage."""
    identity: tuple[int, int] | None
    """`identity` of the verified step folder, to detect a later change by a trainer."""

    @property
    def path(self) -> Path:
        """The step folder."""
        return self.folder / str(self.step)

    @property
    def recorded_data(self) -> Recorded | None:
        """The data of the run up to here; None with a caller's own batches."""
        return self.metadata.recorded_data(self.folder / TOKENIZER)


def select(run: str, default: str = "best", *, contents: bool = True) -> Selected:
    """Finds `RUN@STEP`: STEP is `best`, `latest`, `final` or a number.

    A damaged best or latest is skipped for the next one, and listed in `passed_over`.

    Args:
      run: a run folder or checkpoint folder, with `@STEP` or without.
      default: the STEP if none is given.
      contents: verify the array files too.

    Raises:
      ValueError: no such run or step, or the step is damaged.
    """
    name, which = split_step(run)
    which = which or default
    folder = find_checkpoints(name)
    for _ in range(MAX_CHOICES):
        if selected := _choose(name, folder, which, contents):
            return selected
    raise deleted_each_time(run)


def deleted_each_time(run: str) -> ValueError:
    """The error to raise after a trainer deleted MAX_CHOICES chosen steps."""
    return InputError(
        f"{run}: chosen {MAX_CHOICES} times, and deleted by its trainer each time before it was "
        "read; wait for the run to end, or start it again with a larger --checkpoint.keep_latest"
    )


def _choose(name: str, folder: Path, which: str, contents: bool) -> Selected | None:
    # None if a trainer has deleted or replaced the step meanwhile.
    found = scan_folder(folder)
    if which.isdigit() and not (folder / which).exists() and (folder / WEIGHTS / which).exists():
        return select(f"{folder / WEIGHTS}@{which}", contents=contents)
    # A damaged step may have been the best or a final one; its metadata cannot be trusted.
    passed_over = found.damaged if which in ("best", "final") else {}
    for step in _candidates(found, which):
        path = folder / str(step)
        before, damage, metadata = identity(path), [], None
        try:
            with progress(f"Verifying step {step}"):
                damage = found.damaged.get(step) or manifest.find_damage(path, contents=contents)
            metadata = None if damage else read_metadata(folder, step)
        except (OSError, ValueError):
            if before and identity(path) == before:
                raise
        if before is None or identity(path) != before:
            return None
        if metadata:
            return Selected(folder, step, metadata, passed_over, before)
        passed_over[step] = damage
    damaged = "; ".join(f"step {step}: {damage[0]}" for step, damage in passed_over.items())
    there = ", ".join(map(str, list_steps(folder))) or "none"
    raise InputError(
        f"{name}@{which}: "
        + (f"damaged ({damaged})" if damaged else "there is no such checkpoint")
        + f"; {folder} holds steps: {there}"
    )


def _candidates(found: FolderScan, which: str) -> list[int]:
    steps = sorted(found.sound.keys() | found.damaged.keys(), reverse=True)
    if which.isdigit():
        return [step for step in steps if step == int(which)]
    if which == "latest":
        return steps
    if which == "final":
        return [step for step in steps if step in found.sound and found.sound[step].final]
    losses = {step: metadata.eval_loss for step, metadata in found.sound.items()}
    ranked = []
    while best := find_best(losses):
        ranked.append(best.step)
        del losses[best.step]
    return ranked
