"""The arrays of a checkpoint, back on a mesh and proven to be those that were saved."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from jaxlm.durable import DiskError
from jaxlm.folder import Metadata
from jaxlm.guard import Guard
from jaxlm.state import TrainState, fingerprint, path_name

ITEMS = ("params", "opt_state", "state")
"""The items of a checkpoint that hold arrays; `meta` is JSON."""

# Orbax warns of what is as it should be, and logs an error that it raises too: we tell it once.
absl_logging.set_verbosity(absl_logging.FATAL)


class DamagedArrays(ValueError):
    """Arrays that came back with other bits than were saved."""


def items_of(state: TrainState) -> dict[str, Any]:
    """A state as the items of a checkpoint; each can be restored alone."""
    rest = {"step": state.step, **state.guard._asdict()}
    return {"params": state.params, "opt_state": state.opt_state, "state": rest}


def state_of(items: dict[str, Any]) -> TrainState:
    """The inverse of `items_of`."""
    rest = dict(items["state"])
    return TrainState(items["params"], items["opt_state"], rest.pop("step"), Guard(**rest))


def restore_items(
    path: Path, metadata: Metadata, abstract: dict[str, Any], *, verify: bool = True
) -> dict[str, Any]:
    """Restores items from a step folder.

    Args:
      path: the step folder.
      metadata: of that step.
      abstract: the items wanted, as trees of `jax.ShapeDtypeStruct` with shardings; any mesh will
        do, whatever it was saved from.
      verify: compare the fingerprint of every array with the one taken before the save.

    Raises:
      ValueError: an item has other leaves, dtypes or shapes.
      DiskError: the arrays cannot be read.
      DamagedArrays: an array differs from what was saved.
    """
    _check_layout(metadata.fingerprints, abstract, path)
    restored, folder = {}, path.absolute()  # Orbax takes no relative path
    for name, tree in abstract.items():
        args = ocp.args.PyTreeRestore(
            item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                restored[name] = checkpointer.restore(folder / name, args=args)
        except (OSError, ValueError) as error:
            raise DiskError(
                f"{path / name} cannot be read ({error}); look at its disk, then start again"
            ) from error
    if verify:
        found = fingerprint(restored)
        changed = [name for name in found if found[name] != metadata.fingerprints[name]]
        if changed:
            raise DamagedArrays(
                f"{path}: {changed[0]} differs from what was saved"
                + (f" (and {len(changed) - 1} more arrays)" if len(changed) > 1 else "")
            )
    return restored


def restore_numpy(path: Path) -> dict[str, Any]:
    """All items of a step folder as numpy arrays: two states may not fit on the devices."""
    restored, path = {}, path.absolute()
    to_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    for name in ITEMS:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(path / name).item_metadata.tree
            args = jax.tree.map(lambda _: to_numpy, tree)
            restored[name] = checkpointer.restore(
                path / name, args=ocp.args.PyTreeRestore(restore_args=args)
            )
    return restored


def _check_layout(saved: dict[str, list[Any]], abstract: dict[str, Any], path: Path) -> None:
    # Orbax would leave out what is not asked for, and cast another dtype, without a word.
    wanted = {
        path_name(key): [str(leaf.dtype), list(leaf.shape)]
        for key, leaf in jax.tree_util.tree_leaves_with_path(abstract)
    }
    of_items = {
        name: entry[:2] for name, entry in saved.items() if name.partition("/")[0] in abstract
    }
    for name in sorted(wanted.keys() | of_items.keys()):
        if wanted.get(name) != of_items.get(name):
            there, here = (
                " ".join(map(str, x.get(name) or ["nothing"])) for x in (of_items, wanted)
            )
            raise ValueError(
                f"{path}: {name} holds {there}, but this model has {here}; "
                "restore it with the model that it was saved from"
            )
