"""How fast a host makes batches: those of `configs/180m.py`, from 200 million tokens on disk.

uv run python benchmarks/data_rate.py

Prints tokens a second of one thread for each turn, with the shards in the page cache, of a whole
batch and of the rows of one of four hosts.
"""

import tempfile
import time
from pathlib import Path

import numpy as np

from jaxlm.config import MAIN
from jaxlm.data.batches import TrainBatches
from jaxlm.data.mixture import Mixture
from jaxlm.data.packing import Packed, Windows, make_plan
from jaxlm.data.shards import TokenShards, map_tokens
from jaxlm.launch import load_config

NUM_SHARDS, SHARD_TOKENS, BATCHES, TURNS = 4, 50_000_000, 100, 5
EOS, DOCUMENT_TOKENS = 0, 600


def main() -> None:
    """Writes the shards, and reads shuffled batches of them."""
    config = load_config(str(Path(__file__).parents[1] / "configs" / "180m.py"))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.bin") for number in range(NUM_SHARDS)]
        draw = np.random.default_rng(0)
        for path in paths:
            shard = draw.integers(1, config.model.vocab_size, SHARD_TOKENS, np.uint16)
            shard[draw.integers(0, SHARD_TOKENS, SHARD_TOKENS // DOCUMENT_TOKENS)] = EOS
            shard.tofile(path)
        tokens = TokenShards([map_tokens(path, np.uint16) for path in paths])
        windows = Windows(tokens, config.seq_len)
        started = time.perf_counter()
        plan = make_plan(tokens.ends(EOS), [tokens.num_tokens], config.seq_len)
        packed = Packed(tokens, config.seq_len, plan, EOS)
        seconds = time.perf_counter() - started
        print(f"planned in {seconds:.1f} s, {packed.padding:.3%} padding")
        for what, rows, shares in (
            ("one source", windows, {MAIN: 1}),
            ("three sources", windows, {"a": 7, "b": 2, "c": 1}),
            ("whole documents", packed, {MAIN: 1}),
        ):
            batches = TrainBatches(
                dict.fromkeys(shares, rows),
                Mixture([{"step": 0, "shares": shares, "stages": {}}], config.batch_size),
                batch_size=config.batch_size,
                seed=0,
            )
            for part in (slice(0, config.batch_size), slice(0, config.batch_size // 4)):
                rates = []
                for turn in range(TURNS):
                    started = time.perf_counter()
                    for index in range(BATCHES):
                        batches(turn * BATCHES + index, part)
                    seconds = time.perf_counter() - started
                    rates.append(BATCHES * part.stop * config.seq_len / seconds / 1e6)
                found = ", ".join(f"{rate:.0f}" for rate in rates)
                print(f"{what}, {part.stop} rows: {found} M tokens/s")


if __name__ == "__main__":
    main()
