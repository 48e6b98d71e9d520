"""Restores the arrays of a checkpoint on any mesh, and verifies their fingerprints."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlm.checkpoints.metadata import Metadata
from jaxlm.device.fingerprint import fingerprint
from jaxlm.device.guard import Guard
from jaxlm.device.state import Params, TrainState, cast_like, path_name
from jaxlm.errors import InputError
from jaxlm.files.durable import NO_ANSWER, no_answer, reading
from jaxlm.insides import quiet_orbax

ITEMS = ("params", "ema_params", "opt_state", "state")
"""The items of a checkpoint that hold arrays; `meta` is JSON."""

# The errors of Orbax and TensorStore for damaged files.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class DamagedArrays(InputError):
    """Arrays were restored with other bits than were saved."""


def items_of(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint of this state; each can be restored alone."""
    rest = {"step": state.step, **state.guard._asdict()}
    items = {"params": state.params, "opt_state": state.opt_state, "state": rest}
    return items if state.ema_params is None else {**items, "ema_params": state.ema_params}


def without_empty(tree: Any) -> Any:
    """The tree with None for each array of no elements: Orbax refuses to store them."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)


def _or_empty(leaf: jax.ShapeDtypeStruct, found: jax.Array | None) -> jax.Array:
    if found is not None:
        return found
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)


def restore_state(
    path: Path, metadata: Metadata, abstract: TrainState, *, verify: bool = True
) -> TrainState:
    """The state of a step folder; arguments and errors are those of `restore_items`.

    If the run keeps a moving average and the checkpoint has none, the average starts from the
    params; if the run keeps none, that of the checkpoint is left out.
    """
    begins = abstract.ema_params is not None and metadata.weights_item == "params"
    wanted = items_of(abstract._replace(ema_params=None) if begins else abstract)
    items = restore_items(path, metadata, wanted, verify=verify)
    rest = items.pop("state")
    state = TrainState(**items, step=rest.pop("step"), guard=Guard(**rest))
    return state.begin_ema() if begins else state


def restore_weights(path: Path, metadata: Metadata, abstract: Params) -> Params:
    """The weights of a step folder, verified: the moving average if there is one."""
    item = metadata.weights_item
    saved = abstract if item == "params" else jax.tree.map(_of_average, abstract)
    return cast_like(restore_items(path, metadata, {item: saved})[item], abstract)


def _of_average(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return leaf.update(dtype=np.promote_types(leaf.dtype, np.float32))


def restore_items(
    path: Path, metadata: Metadata, abstract: dict[str, Any], *, verify: bool = True
) -> dict[str, Any]:
    """Restores items from a step folder.

    Args:
      path: the step folder.
      metadata: of that step.
      abstract: the items to restore, as trees of `jax.ShapeDtypeStruct` with shardings, on any
        mesh.
      verify: compare the fingerprint of every array with the one taken at the save.

    Raises:
      ValueError: an item has other leaves, dtypes or shapes.
      DiskError: the disk does not respond.
      DamagedArrays: an item cannot be read, or an array differs from the saved one.
    """
    check_layout(metadata.fingerprints, abstract, path)
    restored, folder = {}, path.absolute()  # Orbax takes no relative path
    for name, tree in abstract.items():
        if not jax.tree.leaves(tree):  # as of an optimizer without a state
            restored[name] = tree
            continue
        with _reading(folder / name) as checkpointer:
            _check_bytes(folder / name, tree)
            stored = without_empty(tree)
            args = ocp.checkpoint_utils.construct_restore_args(stored)
            found = checkpointer.restore(
                folder / name, args=ocp.args.PyTreeRestore(item=stored, restore_args=args)
            )
        restored[name] = jax.tree.map(_or_empty, tree, found)
    if verify:
        found = fingerprint(restored)
        changed = [name for name in found if found[name] != metadata.fingerprints[name]]
        if changed:
            raise DamagedArrays(
                f"{path}: {changed[0]} differs from what was saved"
                + (f" (and {len(changed) - 1} more arrays)" if len(changed) > 1 else "")
            )
    return restored


def find_changed_arrays(path: Path, metadata: Metadata) -> list[str]:
    """The arrays of a step folder that differ from the saved ones; needs no model.

    Loads one item at a time into host memory, and one array at a time onto the device.
    """
    saved, found = metadata.fingerprints, {}
    for name in _items_at(path):
        found |= fingerprint(restore_numpy(path, (name,)))
    names = sorted(saved.keys() | found.keys())
    changed = [name for name in names if saved.get(name) != found.get(name)]
    return [name for name in changed if name in found or not _has_no_elements(saved[name])]


def _has_no_elements(entry: list[Any]) -> bool:
    return any(isinstance(shape, list) and 0 in shape for shape in entry[1:2])


def restore_numpy(path: Path, items: Sequence[str] = ()) -> dict[str, Any]:
    """Items of a step folder (by default all) as numpy arrays, in host memory.

    Raises:
      DamagedArrays: an item cannot be read.
    """
    restored, path = {}, path.absolute()
    to_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    for name in items or _items_at(path):
        with _reading(path / name) as checkpointer:
            about: Any = checkpointer.metadata(path / name).item_metadata  # None if unreadable
            tree = about.tree
            _check_bytes(path / name, tree)
            args = jax.tree.map(lambda _: to_numpy, tree)
            restored[name] = checkpointer.restore(
                path / name, args=ocp.args.PyTreeRestore(restore_args=args)
            )
    return restored


def _items_at(path: Path) -> list[str]:
    return [name for name in ITEMS if (path / name).is_dir()]  # an averaged run has params only


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[ocp.Checkpointer]:
    try:
        with quiet_orbax(), reading(path):
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                yield checkpointer
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        # Only the text of TensorStore's error tells an unreachable disk from damage.
        if any(f"OS error {code}:" in str(error) for code in NO_ANSWER):
            raise no_answer(path, reason) from error
        raise DamagedArrays(f"{path}: cannot be read ({type(error).__name__}: {reason})") from error


def _check_bytes(path: Path, tree: Any) -> None:
    # Arrays are stored uncompressed, so metadata that claims more bytes than the files hold is
    # corrupt. Arrays of up to 1 KiB are the exception: OCDBT compresses them into its tree.
    wanted = sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )
    found = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if found + (1 << 28) < wanted:
        raise InputError(f"{found:,} bytes, for arrays of {wanted:,}")


def check_layout(saved: dict[str, list[Any]], abstract: dict[str, Any], path: Path) -> None:
    """Raises ValueError unless arrays were saved with these names, dtypes and shapes."""
    if "state" in abstract and not any(name.startswith("state/") for name in saved):
        raise InputError(
            f"{path} holds weights only, so training cannot resume from it; to start a run with "
            f"them, add --init_from {path.parent}@{path.name}"
        )
    # Orbax would silently drop an array that is not asked for, and cast another dtype.
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
            raise InputError(
                f"{path}: {name} holds {there}, but this model has {here}; "
                "restore it with the model and optimizer that it was saved from (one of your own: "
                "pass it again, as `model` or `optimizer`)"
            )
