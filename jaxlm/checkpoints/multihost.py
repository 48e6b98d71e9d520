"""A checkpoint folder, looked at by all processes of a run: what process 0 sees there holds."""

import dataclasses
from pathlib import Path

import jax

from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.folder import FolderScan, read_metadata, scan_folder
from jaxlm.cluster import agree, see
from jaxlm.errors import RunError
from jaxlm.files.lock import describe_holder
from jaxlm.files.strict import validate
from jaxlm.tracking.rows import Rows


def scan_folder_alike(folder: Path, *, check: bool = True) -> FolderScan:
    """What process 0 finds, on every process of a run; arguments are those of `scan_folder`.

    Raises:
      RuntimeError: a process does not see the folder that process 0 holds.
      ValueError: as in `scan_folder`, or a process does not see a step.
    """
    holder = agree(describe_holder(folder))
    if not see(lambda: describe_holder(folder) == holder):
        raise RunError(
            f"{folder}: this process does not see there who uses it ({holder}); put the run on a "
            "disk that all of its processes share"
        )
    found = scan_folder(folder, check=check) if jax.process_index() == 0 else None
    told = agree(found and found._asdict() | {"sound": [*found.sound]})
    if found:
        return found
    for step in told["sound"]:
        see((folder / str(step) / "meta" / "metadata").exists)
    sound = {step: read_metadata(folder, step) for step in told["sound"]}
    damaged = {int(step): damage for step, damage in told["damaged"].items()}
    return FolderScan(sound, damaged, told["run_id"])


def rows_alike(rows: Rows) -> Rows:
    """The rows of process 0, which alone has them, on all processes of a run."""
    return validate(agree(dataclasses.asdict(rows)), Rows)


def find_damage_together(folder: Path) -> list[str]:
    """What `find_damage` tells process 0, on all processes of a run; each reads a share."""
    share = jax.process_index(), jax.process_count()
    if not agree(bool(manifest.find_damage(folder, share=share)), any):
        return []
    # Another process may have seen the step late, or read it badly.
    return agree(manifest.find_damage(folder) if jax.process_index() == 0 else [])
