"""What saves cost a run of `configs/180m.py` whose steps are made elsewhere, as on an accelerator.

    uv run python benchmarks/save_overhead.py --step_s 0.36

The step is simulated: the host sleeps for as long as the device would compute. The saves are real,
of the real state (1.6 GB), verified, and as often as `--every` says; 0 is never. Prints the wall
time of each arm in each turn.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from save_time import describe_step, open_checkpoints

from jaxlm.checkpoints.restore import items_of
from jaxlm.config import Config, MeshConfig
from jaxlm.device.fingerprint import fingerprint_async
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import TrainState, blueprint_of
from jaxlm.launch import load_config


def run_s(state: TrainState, config: Config, num_steps: int, every: int, step_s: float) -> float:
    """Seconds from the first step to the last, each save as a run makes it."""
    with tempfile.TemporaryDirectory() as folder, open_checkpoints(Path(folder)) as checkpoints:
        started = time.perf_counter()
        for step in range(1, num_steps + 1):
            time.sleep(step_s)
            if every and step % every == 0 and step < num_steps:
                checkpoints.save(state, describe_step(step, config))
            checkpoints.poll()
        seconds = time.perf_counter() - started
        checkpoints.wait()
    return seconds


def main() -> None:
    """Each arm in turn, several times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--step_s", type=float, default=0.36)
    parser.add_argument("--num_steps", type=int, default=501)
    parser.add_argument("--every", type=int, nargs="+", default=[0, 500, 50])
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    config = load_config(str(Path(__file__).parent.parent / "configs" / "180m.py"))
    blueprint = blueprint_of(config, make_mesh(MeshConfig()))
    state: Any = jax.block_until_ready(blueprint.make(0))
    fingerprint_async(items_of(state))()  # compiles
    for turn in range(args.turns):
        seconds = [run_s(state, config, args.num_steps, n, args.step_s) for n in args.every]
        print(f"turn {turn}:", ", ".join(f"{s:.2f}" for s in seconds), "s")
        print("  over the first:", ", ".join(f"{s / seconds[0] - 1:+.2%}" for s in seconds))


if __name__ == "__main__":
    main()
