"""`jaxlm checkpoints verify`: the files, arrays and rows of a run, read in full."""

from pathlib import Path

from jaxlm.checkpoints.entries import when_settled
from jaxlm.checkpoints.folder import read_metadata, run_folder, scan_folder
from jaxlm.checkpoints.manifest import find_damage
from jaxlm.checkpoints.restore import find_changed_arrays
from jaxlm.tracking.rows import NAME as ROWS
from jaxlm.tracking.rows import find_row_damage


def verify_step(folder: Path, step: int) -> list[str] | None:
    """The damage of a step, after a check of every file and every array.

    Changes nothing on disk, and needs no model. The run may be training.

    Returns:
      One text for each damage, none for a sound step; None if the step was deleted meanwhile.
    """
    path = folder / str(step)

    def inspect_step() -> list[str]:
        try:
            if damage := find_damage(path):
                return damage
            metadata = read_metadata(folder, step)
            metadata.run_config()  # raises if a resume could not read it
            changed = find_changed_arrays(path, metadata)
        except (OSError, ValueError, RuntimeError) as error:
            return [f"it cannot be restored: {error}"]
        return [f"{name} differs from what was saved" for name in changed]

    return when_settled(path, inspect_step)


def verify_rows(run: str, folder: Path) -> tuple[list[str], str]:
    """The damage of metrics.jsonl, and a text on rows that were lost earlier.

    metrics.jsonl is compared with the newest checkpoint. The run may be training.
    """
    path, found = run_folder(run, folder) / ROWS, scan_folder(folder).sound
    if not found:
        return [], ""
    newest = found[max(found)]
    damage = when_settled(folder / str(newest.step), lambda: find_row_damage(path, newest.rows))
    return damage or [], newest.rows.lacking
