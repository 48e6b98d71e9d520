"""`jaxlm checkpoints prune`: lists the checkpoints that the rules drop; --delete deletes them."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoints.entries import DELETING, list_named, list_names
from jaxlm.checkpoints.folder import find_best, find_checkpoints, run_folder, scan_folder
from jaxlm.checkpoints.manifest import find_damage
from jaxlm.checkpoints.quarantine import Purger
from jaxlm.checkpoints.retention import choose_kept
from jaxlm.config import CheckpointConfig
from jaxlm.errors import InputError, RunError
from jaxlm.files.durable import folder_bytes
from jaxlm.files.lock import locked
from jaxlm.terminal import track
from jaxlm.tracking.events import NAME, Events


class Pruning(NamedTuple):
    """The checkpoints to keep and to delete."""

    folder: Path
    kept: dict[int, str]
    """Step -> reason to keep the step."""
    dropped: dict[int, int]
    """Step -> bytes."""
    keep_weights_every: int | None
    """As in the run's config: of a dropped step that is a multiple, the weights stay."""


def plan_pruning(
    run: str,
    *,
    keep_latest: int = 1,
    keep_every: int | None = None,
    disk_budget_gb: float | None = None,
) -> Pruning:
    """The checkpoints to delete by these rules; changes nothing on disk.

    Best, latest and damaged steps stay under any rule. Best and latest are read in full, and a
    damaged one does not count as such: the next sound one takes its place, and stays.

    Args:
      run: a run folder or checkpoint folder.
      keep_latest: number of newest steps to keep.
      keep_every: keep also each step that is a multiple of this.
      disk_budget_gb: of these multiples (of all steps, without `keep_every`) keep only as many
        as fit, evenly spaced (10^9 bytes).

    Raises:
      ValueError: no such run, or a rule that is out of range.
    """
    if disk_budget_gb is not None and not math.isfinite(disk_budget_gb):
        raise InputError(f"--disk_budget_gb: found {disk_budget_gb}, expected a finite number")
    folder = find_checkpoints(run)
    found = scan_folder(folder)
    losses = {step: metadata.eval_loss for step, metadata in found.sound.items()}
    kept = dict.fromkeys(found.damaged, "damaged")
    while losses:
        best, latest = find_best(losses), max(losses)
        named = {latest: "latest"}
        if best:
            named[best.step] = "best, latest" if best.step == latest else "best"
        damaged = [step for step in track([*named], "Verifying") if find_damage(folder / str(step))]
        if not damaged:
            kept |= named
            break
        for step in damaged:
            kept[step] = "damaged"
            del losses[step]
    sizes = {step: folder_bytes(folder / str(step)) for step in losses}
    if disk_budget_gb and not keep_every:
        keep_every = math.gcd(*losses) or 1  # every step is a multiple, for the budget to thin
    rules = CheckpointConfig(
        keep_latest=keep_latest, keep_every=keep_every, disk_budget_gb=disk_budget_gb
    )
    state_bytes = max(sizes.values(), default=0)
    for step in choose_kept(rules, losses, state_bytes=state_bytes, num_in_transit=0):
        kept.setdefault(step, "by the rules")
    dropped = {step: size for step, size in sizes.items() if step not in kept}
    newest = found.sound.get(max(losses, default=-1))
    every = newest.config["checkpoint"].get("keep_weights_every") if newest else None
    return Pruning(folder, dict(sorted(kept.items())), dropped, every)


def prune(run: str, **rules: Any) -> Pruning:
    """Deletes the steps that `plan_pruning` drops; renames each first: a kill leaves no half step.

    Args:
      run: a run folder or checkpoint folder.
      **rules: those of `plan_pruning`.

    Raises:
      ValueError: as `plan_pruning` raises.
      RuntimeError: a trainer holds the folder, or the leftovers of a killed one cannot be deleted.
    """
    folder = find_checkpoints(run)
    with locked(folder, required=True):
        pruning = plan_pruning(run, **rules)
        if not pruning.dropped:
            return pruning
        purger = Purger(folder, pruning.keep_weights_every)
        purger.purge()  # A killed run may have left steps of these names in `deleting/`.
        purger.join()
        if stuck := [path.name for path in list_named(folder / DELETING)]:
            raise RunError(f"{folder / DELETING}: {stuck} cannot be deleted; look at its disk")
        purger.purge(*(folder / str(step) for step in pruning.dropped))
        if (path := run_folder(run, folder) / NAME).exists():
            why = dict.fromkeys(map(str, pruning.dropped), "jaxlm checkpoints prune")
            Events(path).compare(list_names(folder), why)
        purger.join()
    return pruning
