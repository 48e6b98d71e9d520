"""A run of a second: a very small model on tokens made here, for tests of everything around it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm.config import CheckpointConfig, Config, ModelConfig, OptimConfig
from jaxlm.training.train import Result, train

VOCAB, BATCH, SEQ = 64, 8, 16


def tiny_config(run_dir: Path | str, **changes: Any) -> Config:
    """Twelve steps, an eval every three, a save every four; `checkpoint` takes a dict."""
    checkpoint = replace(CheckpointConfig(save_interval=4), **changes.pop("checkpoint", {}))
    config = Config(
        model=ModelConfig(
            vocab_size=VOCAB,
            num_layers=1,
            d_model=16,
            d_ff=32,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
        ),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
        checkpoint=checkpoint,
        num_steps=12,
        batch_size=BATCH,
        seq_len=SEQ,
        eval_interval=3,
        log_interval=1,
        run_dir=str(run_dir),
    )
    return replace(config, **changes)


def _tokens(seed: int, rows: slice) -> dict[str, np.ndarray]:
    # Each token is the one before plus a small step: there is something to learn.
    steps = np.random.default_rng(seed).integers(1, 4, (BATCH, SEQ + 1))
    tokens = (np.cumsum(steps, axis=1) % VOCAB).astype(np.int32)[rows]
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


class TinyBatches:
    """Batch n is made from the number n."""

    fingerprint = "tiny"

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        return _tokens(index, rows)


class TinyEvalSet:
    """Two batches that training never sees."""

    def __len__(self) -> int:
        return 2

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        return _tokens(1_000_000 + index, rows)


def data() -> dict[str, Any]:
    """The `batches` and `eval_batches` of `train`."""
    return {"batches": TinyBatches(), "eval_batches": TinyEvalSet()}


class Table(nnx.Module):
    """The logits of the next token, by the token: a run of it costs half of one of `tiny_config`.

    For tests of what does not depend on the model.
    """

    def __init__(self, rngs: nnx.Rngs):
        self.table_VV = nnx.Param(0.01 * jax.random.normal(rngs.params(), (VOCAB, VOCAB)))

    def __call__(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None) -> jax.Array:
        return 30 * self.table_VV[...][tokens_BT]  # it learns within a few steps


def train_table(config: Config, **parts: Any) -> Result:
    """Trains a `Table` on `data()`, but for the parts that are given."""
    return train(config, **{"model": Table, **data(), **parts})
