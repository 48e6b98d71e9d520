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
from jaxlm.checkpoints.restore import items_of
from jaxlm.config import CheckpointConfig, Config, MeshConfig, to_dict
from jaxlm.device.fingerprint import fingerprint_async
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import Blueprint, TrainState, blueprint_of, num_bytes
from jaxlm.huge_pages import use_huge_pages
from jaxlm.launch import load_config

TURNS = 5
COPY, NUMPY_SAVE = "copy of the state in memory", "numpy.save and fsync"
WAITS, SAVE = "save: the loop waits", "save: until it is committed"
RESTORE = "open and restore, verify"
Verify = Literal["full", "fast", "off"]


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes, until its arrays are there."""
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def open_checkpoints(folder: Path, verify: Verify = "full") -> Checkpoints:
    """The folder, saying nothing of its commits."""
    config = CheckpointConfig(keep_latest=1, verify=verify)
    return Checkpoints(folder, config, on_commit=lambda *_: None)


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
        data={},
        phases=[],
        eval_set="",
        bytes_per_token=None,
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


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache, so that they come from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


CACHES = {"from the disk": forget, "from the page cache": lambda folder: None}


def main(folder: Path) -> None:
    """Saves and restores in turns, and prints a table of medians."""
    config = load_config(str(Path(__file__).parent.parent / "configs" / "180m.py"))
    blueprint = blueprint_of(config, make_mesh(MeshConfig()))
    state = jax.block_until_ready(blueprint.make(0))
    items = items_of(state)
    fingerprint_async(items)()  # compiles
    times: dict[str, list[float]] = defaultdict(list)
    plain, num_arrays = folder / "numpy", len(jax.tree.leaves(state))
    for step in range(1, TURNS + 1):
        times["fingerprint, and all is finite"].append(timed(lambda: fingerprint_async(items)()))
        times[COPY].append(timed(lambda: [np.array(leaf) for leaf in jax.tree.leaves(state)]))
        time_save(folder, state, describe_step(step, config), times)
        manifest_s = timed(lambda n=step: manifest.write_manifest(folder / str(n)))
        times["manifest (crc32c of every file)"].append(manifest_s)
        times[NUMPY_SAVE].append(timed(lambda: save_with_numpy(state, plain)))
        for cache, prepare in CACHES.items():
            for verify in ("off", "fast", "full"):
                prepare(folder)
                time_restore(folder, verify, cache, blueprint, times)
            prepare(folder)
            load_s = timed(lambda: load_with_numpy(plain, num_arrays))
            times[f"numpy.load, {cache}"].append(load_s)
    print(f"state: {num_bytes(state) / 1e9:.2f} GB; medians of {TURNS} turns, and their range")
    for name, values in times.items():
        spread = f"{min(values):.2f}-{max(values):.2f}"
        print(f"{name:46} | {statistics.median(values):.2f} s | {spread}")
    restored, loaded = f"{RESTORE}=full, from the disk", "numpy.load, from the disk"
    for ours, theirs in ((WAITS, COPY), (SAVE, NUMPY_SAVE), (restored, loaded)):
        turns = zip(times[ours], times[theirs], strict=True)
        ratios = ", ".join(f"{mine / other:.2f}" for mine, other in turns)
        print(f"{ours} over {theirs}: {ratios}")


def time_save(folder: Path, state: TrainState, metadata: Metadata, times: Any) -> None:
    """A save in a folder that holds one already, the older one to be deleted."""
    with open_checkpoints(folder) as checkpoints:
        blocked_s = timed(lambda: checkpoints.save(state, metadata))
        waited_s = timed(checkpoints.wait)
    times[WAITS].append(blocked_s)
    times[SAVE].append(blocked_s + waited_s)


def time_restore(
    folder: Path, verify: Verify, cache: str, blueprint: Blueprint, times: Any
) -> None:
    """A restore, and before it what opening the folder looks at."""

    def restore() -> TrainState:
        with open_checkpoints(folder, verify) as checkpoints:
            restored = checkpoints.restore_latest(blueprint.abstract)
        assert restored is not None
        return restored[0]

    times[f"{RESTORE}={verify}, {cache}"].append(timed(restore))


if __name__ == "__main__":
    use_huge_pages()
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
