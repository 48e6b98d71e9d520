"""Compares two checkpoints bit by bit."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxlm.checkpoints.folder import Selected
from jaxlm.checkpoints.reading import read
from jaxlm.checkpoints.restore import ITEMS, restore_numpy
from jaxlm.device.state import path_name
from jaxlm.terminal import track


class Difference(NamedTuple):
    """An array that differs between two checkpoints."""

    name: str
    what: str


def diff_checkpoints(run_a: str, run_b: str) -> list[Difference]:
    """The arrays that differ between `RUN_A@STEP` and `RUN_B@STEP`, to the bit.

    Raises:
      ValueError: no such run or step, or a checkpoint is damaged.
    """

    def against(a: Selected) -> list[Difference]:
        return read(run_b, lambda b: _diff((run_a, a.path), (run_b, b.path)), "latest")

    return read(run_a, against, "latest")


def _diff(*sides: tuple[str, Path]) -> list[Difference]:
    (run_a, _), (run_b, _) = sides
    found = []
    for item in track(ITEMS, "Comparing"):  # two complete states may not fit into memory
        a, b = (_arrays(path, item) for _, path in sides)
        for name in a | b:
            if name not in a or name not in b:
                found.append(Difference(name, f"only in {run_a if name in a else run_b}"))
            elif what := _difference(a[name], b[name]):
                found.append(Difference(name, what))
    return found


def _arrays(path: Path, item: str) -> dict[str, np.ndarray]:
    arrays = restore_numpy(path, [item]) if (path / item).is_dir() else {}
    return {
        path_name(path): np.atleast_1d(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }


def _difference(a: np.ndarray, b: np.ndarray) -> str | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    bits_a, bits_b = (x.view(np.uint8).reshape(*x.shape, -1) for x in (a, b))
    differs = (bits_a != bits_b).any(axis=-1)
    if not differs.any():
        return None
    summary = f"{differs.sum()} of {a.size} values differ"
    float_a, float_b = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(float_a) & np.isfinite(float_b)
    if not (differs & finite).any():
        return f"{summary}, and none of them is finite in both"
    gaps = np.subtract(float_a, float_b, where=finite, out=np.zeros(a.shape))
    gap = float(np.abs(gaps).max())
    scale = float(np.sqrt(np.mean(np.square(float_a[finite]))))
    relative = f", {gap / scale:.1e} of its rms" if scale else ""
    return f"{summary}, by up to {gap:.3e}{relative}"
