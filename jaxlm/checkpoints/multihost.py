"""A checkpoint folder, as process 0 sees it, for all processes of a run."""

import dataclasses
from pathlib import Path

import jax

from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.folder import FolderScan, read_metadata, scan_folder
from jaxlm.cluster import agree, wait_until_visible
from jaxlm.errors import RunError
from jaxlm.files.lock import describe_holder
from jaxlm.files.strict import validate
from jaxlm.tracking.rows import Rows


def agree_on_scan(folder: Path, *, check: bool = True) -> FolderScan:
    """Process 0's `scan_folder`, on every process of a run; arguments as there.

    Raises:
      RuntimeError: a process does not see the folder that process 0 holds.
      ValueError: as in `scan_folder`, or a process does not see a step.
    """
    holder = agree(describe_holder(folder))
    if not wait_until_visible(lambda: describe_holder(folder) == holder):
        raise RunError(
            f"{folder}: this process does not see process 0's holder.json there ({holder}); put "
            "the run on a disk that all of its processes share"
        )
    found = scan_folder(folder, check=check) if jax.process_index() == 0 else None
    shared = agree(found and found._asdict() | {"sound": [*found.sound]})
    if found:
        return found
    for step in shared["sound"]:
        wait_until_visible((folder / str(step) / "meta" / "metadata").exists)
    sound = {step: read_metadata(folder, step) for step in shared["sound"]}
    damaged = {int(step): damage for step, damage in shared["damaged"].items()}
    return FolderScan(sound, damaged, shared["run_id"])


def agree_on_rows(rows: Rows) -> Rows:
    """Process 0's `Rows`, on every process: only process 0 writes metrics.jsonl."""
    return validate(agree(dataclasses.asdict(rows)), Rows)


def find_damage_together(folder: Path) -> list[str]:
    """Process 0's `find_damage`, on every process; each first reads a share of the files."""
    share = jax.process_index(), jax.process_count()
    if not agree(bool(manifest.find_damage(folder, share=share)), any):
        return []
    # Process 0 checks again: another process may have seen the step late, or read it badly.
    return agree(manifest.find_damage(folder) if jax.process_index() == 0 else [])
