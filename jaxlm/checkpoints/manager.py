"""The settings of Orbax's `CheckpointManager`, which writes and commits checkpoints."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxlm.checkpoints.restore import ITEMS, without_empty
from jaxlm.cluster import barrier
from jaxlm.insides import skip_orbax_byte_counts

LEAST_PART = 4 * 2**20
"""Smallest part of a replicated array that one device writes (bytes)."""

FILE_BYTES = 64 * 2**20
"""Size at which Orbax starts another file of arrays (bytes)."""


def open_manager(
    folder: Path, timeout_s: int, before_commit: Callable[[], None]
) -> ocp.CheckpointManager:
    """The Orbax manager of a folder; saves only when called, and never deletes.

    Args:
      folder: the checkpoint folder.
      timeout_s: timeout of the barriers between processes (s).
      before_commit: called in the saving thread of the primary process, after the arrays are
        written and before the rename.
    """
    skip_orbax_byte_counts()
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics["eval_loss"],
        best_mode="min",
        save_decision_policy=checkpoint_managers.AnySavePolicy([]),
        # Deleting step 2, Orbax would take a foreign `2.orbax-checkpoint-tmp-x` for the step.
        preservation_policy=checkpoint_managers.LatestN(n=None),
        # Cleaning up, Orbax would delete every name that contains `.orbax-checkpoint-tmp`.
        cleanup_tmp_directories=False,
        async_options=ocp.AsyncOptions(
            timeout_secs=timeout_s,
            barrier_sync_fn=barrier if jax.process_count() > 1 else None,
            post_finalization_callback=before_commit,
        ),
    )
    # Devices that hold the same array each write a part of it. With small parts, the loop would
    # wait for thousands of slices.
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
    """Arguments for Orbax to save these items of arrays, and a `meta` that is written later."""
    # Orbax's default of 2 GB a file would write too few files in parallel.
    save = functools.partial(ocp.args.PyTreeSave, ocdbt_target_data_file_size=FILE_BYTES)
    arrays = {name: save(without_empty(item)) for name, item in items.items()}
    return ocp.args.Composite(**arrays, meta=ocp.args.JsonSave({}))
