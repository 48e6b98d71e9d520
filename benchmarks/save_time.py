"""Times what a save of a large state costs the training loop, and a restore, beside NumPy's.

    uv run python benchmarks/save_time.py [FOLDER]

The state is that of configs/180m.py: 1.6 GB of params and moments. Memory: about 9 GB.
"""

import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.checkpoint import Checkpoints
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.config import CheckpointConfig, Config, MeshConfig, to_dict
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import (
    Blueprint,
    TrainState,
    blueprint_of,
    fingerprint,
    num_bytes,
)
from jaxlm.launch import load_config

TURNS = 5
Verify = Literal["full", "fast", "off"]


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes, until its arrays are there."""
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def open_checkpoints(folder: Path, verify: Verify = "full") -> Checkpoints:
    """The folder, saying nothing of its commits."""
    config = CheckpointConfig(keep_latest=1, verify=verify)
    return Checkpoints(folder, config, on_commit=lambda *_: None, warn=print)


def describe_step(step: int, config: Config) -> Metadata:
    """Metadata as of a run that has had no eval."""
    nothing: dict[str, Any] = dict.fromkeys(("best_step", "eval_loss", "eos_id"))
    return Metadata(
        step=step,
        tokens_seen=0,
        best_eval_loss=float("inf"),
        num_worse_evals=0,
        final=False,
        config=to_dict(config),
        data_fingerprint="",
        environment={},
        tracking_run_id="",
        lineage=[],
        **nothing,
    )


def save_with_numpy(state: TrainState, folder: Path) -> None:
    """Each array in a file of its own, brought to the disk."""
    folder.mkdir(exist_ok=True)
    for number, leaf in enumerate(jax.tree.leaves(state)):
        with open(folder / f"{number}.npy", "wb") as file:
            np.save(file, np.asarray(leaf))
            file.flush()
            os.fsync(file.fileno())


def load_with_numpy(folder: Path, num_arrays: int) -> list[np.ndarray]:
    """What `save_with_numpy` wrote."""
    return [np.load(folder / f"{number}.npy") for number in range(num_arrays)]


def main(folder: Path) -> None:
    """Saves and restores in turns, and prints a table of medians."""
    config = load_config(str(Path(__file__).parent.parent / "configs" / "180m.py"))
    blueprint = blueprint_of(config, make_mesh(MeshConfig()))
    state = jax.block_until_ready(blueprint.make(0))
    fingerprint(state)  # compiles
    times: dict[str, list[float]] = defaultdict(list)
    for step in range(1, TURNS + 1):
        times["fingerprint, and all is finite"].append(timed(lambda: fingerprint(state)))
        copy_s = timed(lambda: [np.array(leaf) for leaf in jax.tree.leaves(state)])
        times["copy of the state in memory"].append(copy_s)
        time_save(folder, state, describe_step(step, config), times)
        manifest_s = timed(lambda n=step: manifest.write_manifest(folder / str(n)))
        times["manifest (crc32c of every file)"].append(manifest_s)
        plain = folder / "numpy"
        times["numpy.save and fsync"].append(timed(lambda p=plain: save_with_numpy(state, p)))
        num_arrays = len(jax.tree.leaves(state))
        times["numpy.load"].append(timed(lambda p=plain, n=num_arrays: load_with_numpy(p, n)))
        for verify in ("off", "fast", "full"):
            time_restore(folder, verify, blueprint, times)
    print(f"state: {num_bytes(state) / 1e9:.2f} GB; medians of {TURNS} turns, and their range")
    for name, values in times.items():
        spread = f"{min(values):.2f}-{max(values):.2f}"
        print(f"{name:32} | {statistics.median(values):.2f} s | {spread}")


def time_save(folder: Path, state: TrainState, metadata: Metadata, times: Any) -> None:
    """A save in a folder that holds one already, the older one to be deleted."""
    with open_checkpoints(folder) as checkpoints:
        blocked_s = timed(lambda: checkpoints.save(state, metadata))
        waited_s = timed(checkpoints.wait)
    times["save: the loop waits"].append(blocked_s)
    times["save: until it is committed"].append(blocked_s + waited_s)


def time_restore(folder: Path, verify: Verify, blueprint: Blueprint, times: Any) -> None:
    """A restore, and before it what opening the folder looks at."""

    def restore() -> TrainState:
        with open_checkpoints(folder, verify) as checkpoints:
            restored = checkpoints.restore_latest(blueprint.abstract)
        assert restored is not None
        return restored[0]

    times[f"open and restore, verify={verify}"].append(timed(restore))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
