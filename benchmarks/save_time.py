"""Times what a save of a large state costs the training loop, and a restore.

    uv run python benchmarks/save_time.py [FOLDER]

The state is that of configs/180m.py: 2.15 GB of params and Adam moments. Memory: about 7 GB.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxlm.assemble import model_factory
from jaxlm.checkpoint import Checkpoints
from jaxlm.config import CheckpointConfig, Config, MeshConfig, to_dict
from jaxlm.launch import load_config
from jaxlm.metadata import Metadata
from jaxlm.optim import make_optimizer
from jaxlm.preflight import count_bytes
from jaxlm.sharding import make_mesh
from jaxlm.state import Blueprint, all_finite, fingerprint, make_blueprint

SAVES = 3


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of a call."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def open_checkpoints(folder: Path) -> Checkpoints:
    """The folder, saying nothing of its commits."""
    return Checkpoints(
        folder, CheckpointConfig(keep_latest=1), on_commit=lambda *_: None, warn=print
    )


def time_saves(folder: Path, config: Config, blueprint: Blueprint) -> dict[str, str]:
    """What the saves of a new state cost."""
    state = jax.block_until_ready(blueprint.make(0))
    fingerprint(state)  # compiles
    fingerprint_s, _ = timed(lambda: fingerprint(state))
    all_finite(state.params)
    finite_s, _ = timed(lambda: all_finite(state.params))
    blocking, whole = [], []
    nothing: dict[str, Any] = dict.fromkeys(("best_step", "eval_loss", "eos_id"))
    for step in range(1, SAVES + 1):
        metadata = Metadata(
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
        with open_checkpoints(folder) as checkpoints:
            blocked_s, _ = timed(lambda c=checkpoints, m=metadata: c.save(state, m))
            waited_s, _ = timed(checkpoints.wait)
        blocking.append(blocked_s)
        whole.append(blocked_s + waited_s)
    on_disk = sum(path.stat().st_size for path in (folder / str(SAVES)).rglob("*"))
    return {
        "state": f"{count_bytes(state) / 1e9:.2f} GB in memory, {on_disk / 1e9:.2f} GB on disk",
        "fingerprint": f"{fingerprint_s:.2f} s",
        "finite check": f"{finite_s:.2f} s",
        "save, the loop waits": f"{statistics.median(blocking):.2f} s",
        "save, until on disk": f"{statistics.median(whole):.2f} s",
    }


def main(folder: Path) -> None:
    """Saves, restores and prints a table."""
    config = load_config(str(Path(__file__).parent.parent / "configs" / "180m.py"))
    factory = model_factory(config.model, "cpu")
    blueprint = make_blueprint(factory, make_optimizer(config.optim), make_mesh(MeshConfig()))
    rows = time_saves(folder, config, blueprint)
    with open_checkpoints(folder) as checkpoints:
        restore_s, _ = timed(lambda: checkpoints.restore_latest(blueprint.abstract))
    rows["restore, all verified"] = f"{restore_s:.2f} s"
    for name, value in rows.items():
        print(f"{name:22} | {value}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
