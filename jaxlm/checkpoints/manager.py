"""Orbax's `CheckpointManager`, which writes and commits, set up as we need it."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxlm.checkpoints.restore import ITEMS, without_empty
from jaxlm.cluster import barrier

LEAST_PART = 4 * 2**20
"""Of an array that several devices hold, what one of them writes at least (bytes)."""

FILE_BYTES = 64 * 2**20
"""Where Orbax begins the next file of arrays (bytes)."""


def open_manager(
    folder: Path, timeout_s: int, before_commit: Callable[[], None]
) -> ocp.CheckpointManager:
    """The manager of a folder; it saves when it is called to, and never deletes.

    Args:
      folder: the checkpoint folder.
      timeout_s: how long the processes wait for each other (s).
      before_commit: called in the saving thread of the primary process, after the arrays are
        written and before the rename.
    """
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics["eval_loss"],
        best_mode="min",
        save_decision_policy=checkpoint_managers.AnySavePolicy([]),
        # To delete step 2, it would take `2.orbax-checkpoint-tmp-x` of somebody else for the step.
        preservation_policy=checkpoint_managers.LatestN(n=None),
        # It would delete whatever has `.orbax-checkpoint-tmp` anywhere in its name.
        cleanup_tmp_directories=False,
        async_options=ocp.AsyncOptions(
            timeout_secs=timeout_s,
            barrier_sync_fn=barrier if jax.process_count() > 1 else None,
            post_finalization_callback=before_commit,
        ),
    )
    # Devices that hold the same array write a part of it each. That pays where the parts are large;
    # else the loop waits for thousands of slices to be made.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=LEAST_PART)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    # Uncompressed: zstd would save 8% of the bytes and double the time.
    handlers = {
        name: ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=types)
        for name in ITEMS
    }
    return ocp.CheckpointManager(
        folder, item_handlers={**handlers, "meta": ocp.JsonCheckpointHandler()}, options=options
    )


def args_of(items: dict[str, Any]) -> ocp.args.Composite:
    """What tells Orbax to save these items of arrays, beside a `meta` that is written later."""
    # In files of 2 GB, as by default, too few are on their way to the disk at once.
    save = functools.partial(ocp.args.PyTreeSave, ocdbt_target_data_file_size=FILE_BYTES)
    arrays = {name: save(without_empty(item)) for name, item in items.items()}
    return ocp.args.Composite(**arrays, meta=ocp.args.JsonSave({}))
