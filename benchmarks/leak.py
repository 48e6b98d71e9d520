"""Whether memory grows with the number of saves: a small run that saves at every step.

    uv run python benchmarks/leak.py [NUM_SAVES]

Prints the resident memory as the run goes, and its slope after the first quarter. Linux only.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxlm.config import CheckpointConfig, Config, ModelConfig, OptimConfig
from jaxlm.training.train import train

ROWS, SEQ_LEN, VOCAB = 4, 32, 512
POINTS = 20


class Batches:
    """Random tokens, a function of the batch's number."""

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """Rows of batch `index`."""
        shape = (ROWS, SEQ_LEN + 1)
        tokens = np.random.default_rng(index).integers(0, VOCAB, shape, np.int32)[rows]
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def resident_mb() -> float:
    """Memory of this process that is in RAM (MB)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(num_saves: int) -> None:
    """Trains, and prints a row a twentieth of the way."""
    seen: list[tuple[int, float]] = []

    def look(step: int, row: dict[str, float]) -> None:
        seen.append((step, resident_mb()))
        print(f"{step:6} saves | {seen[-1][1]:7.1f} MB", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            model=ModelConfig(
                vocab_size=VOCAB,
                num_layers=2,
                d_model=64,
                d_ff=128,
                num_heads=2,
                num_kv_heads=2,
                head_dim=32,
            ),
            optim=OptimConfig(warmup_steps=2),
            checkpoint=CheckpointConfig(save_interval=1),
            num_steps=num_saves,
            batch_size=ROWS,
            seq_len=SEQ_LEN,
            log_interval=num_saves // POINTS,
            run_dir=folder,
        )
        train(config, batches=Batches(), callbacks=[look])
    steps, sizes = np.array(seen[POINTS // 4 :]).T
    slope, _ = np.polyfit(steps, sizes, 1)
    growth = f"{sizes[0]:.0f} to {sizes[-1]:.0f} MB, {1000 * slope:.1f} MB a thousand"
    print(f"{num_saves} saves: {growth}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
