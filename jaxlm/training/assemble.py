"""The parts of a run, from its config or from a caller's own model, loss and data."""

import dataclasses
import os
from collections.abc import Callable, Sized
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.compiled import keep_compiled
from jaxlm.config import Config
from jaxlm.data.batches import EvalBatches, TrainBatches, recorded
from jaxlm.data.prepare import Dataset, default_max_tokens, prepare
from jaxlm.device.loss import Batch, Loss, next_token_loss
from jaxlm.device.optim import make_schedule
from jaxlm.device.sharding import AXES_OF, make_mesh, put_batch, replicated
from jaxlm.device.state import Blueprint, ModelFactory, blueprint_of
from jaxlm.device.step import TrainStep, make_eval_step, make_train_step, scheduled
from jaxlm.tracking.clock import Clock
from jaxlm.tracking.throughput import peak_flops
from jaxlm.training.evaluate import EvalSet, EvalStep
from jaxlm.training.preflight import check_prompt


class TrainSet(Protocol):
    """Batch n of the training data: a pure function of n, so that a resume needs no state.

    A `fingerprint` attribute, where there is one, is kept in each checkpoint, and a resume with
    another is refused.
    """

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """Those rows of batch `index`, as host arrays; our loss takes `inputs` and `targets`."""
        ...


class Parts(NamedTuple):
    """What the loop works with."""

    config: Config
    """With what was left open filled in."""
    mesh: Mesh
    blueprint: Blueprint
    train_step: TrainStep
    compiled: jax.stages.Compiled
    """The update that it makes."""
    own_model: bool
    """Whether the model is the caller's, and not that of `config.model`."""
    peak_flops: float | None
    """Of all devices together (FLOP/s), where it is known, as is the work of a step."""
    eval_step: EvalStep
    put: Callable[[int], Batch]
    """Index -> that batch on the mesh."""
    put_eval: Callable[[int], Batch]
    num_eval_batches: int
    """0 where there is no held-out set."""
    data_fingerprint: str
    eos_id: int | None
    tokenizer_path: Path | None

    def eval_due(self, step: int) -> bool:
        """Whether a checkpoint of this step holds an eval."""
        due = step % self.config.eval_interval == 0 or step == self.config.num_steps
        return due and step > 0 and self.num_eval_batches > 0


def assemble(
    config: Config,
    *,
    model: ModelFactory | None = None,
    loss: Loss | None = None,
    batches: TrainSet | None = None,
    eval_batches: EvalSet | None = None,
    say: Callable[[str], None] = print,
    clock: Clock | None = None,
) -> Parts:
    """Prepares the data, lays the model out on the mesh and compiles the step.

    Raises:
      ValueError: the mesh does not divide the batch or the model, or the data does not fit.
      OSError, ImportError: the data is not there.
    """
    keep_compiled(config.data.cache_dir)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    blueprint = blueprint_of(config, mesh, model)  # refuses a model before any data is prepared
    dataset = None
    if batches is None:
        config, dataset = prepare_data(config, say)
        batches = TrainBatches(
            dataset.train,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            seed=config.seed,
            fingerprint=dataset.fingerprint,
        )
        if model is None:  # a caller's own model makes no sample
            check_prompt(config, dataset.tokenizer_path)
        _tell_epochs(config, dataset, batches.windows_per_epoch, say)
        eval_batches = held_out_batches(config, dataset) if eval_batches is None else eval_batches
    if eval_batches is not None and not isinstance(eval_batches, Sized):
        raise ValueError("eval_batches: found no length, expected `__len__`: how many there are")
    rows_of = recorded(batches, os.environ.get("JAXLM_RECORD_BATCHES"))
    mask = mask_id(config, dataset)
    next_token = partial(next_token_loss, eos_id=mask, num_chunks=config.loss_chunks)
    train_loss = loss or next_token(z_loss=config.z_loss)

    def put(index: int) -> Batch:
        index = 0 if config.overfit_one_batch else index
        return put_batch(partial(rows_of, index), mesh, config.batch_size)

    with (clock or Clock()).spent("compile"):
        compiled = lower_step(config, blueprint, train_loss, mesh, put(0)).compile()
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    eval_loss = loss or next_token()
    eval_step, put_eval = assemble_eval(config, blueprint, mesh, eval_batches, eval_loss)
    return Parts(
        config=config,
        mesh=mesh,
        blueprint=blueprint,
        train_step=scheduled(compiled, make_schedule(config.optim, config.num_steps), mesh),
        compiled=compiled,
        own_model=model is not None,
        peak_flops=peak * mesh.size if peak and model is None else None,
        eval_step=eval_step,
        put=put,
        put_eval=put_eval,
        num_eval_batches=0 if eval_batches is None else len(eval_batches),
        data_fingerprint=str(getattr(batches, "fingerprint", "")),
        eos_id=dataset.eos_id if dataset else None,
        tokenizer_path=dataset.tokenizer_path if dataset else None,
    )


def lower_step(
    config: Config, blueprint: Blueprint, loss: Loss, mesh: Mesh, example: Any
) -> jax.stages.Lowered:
    """The train step of a run, to be compiled for the devices of the mesh, which need not be here.

    `example` is a batch, or its `jax.ShapeDtypeStruct`s with their shardings.
    """
    train_step = make_train_step(
        blueprint,
        loss,
        mesh,
        config.num_microbatches,
        config.guard.spike_zscore,
        config.optim.ema_decay,
    )
    rate = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(mesh))
    return train_step.lower(blueprint.abstract, example, rate)


def assemble_eval(
    config: Config, blueprint: Blueprint, mesh: Mesh, batches: EvalSet | None, loss: Loss
) -> tuple[EvalStep, Callable[[int], Batch]]:
    """The eval step of a run, and what puts a held-out batch on the mesh for it."""

    def put(index: int) -> Batch:
        assert batches is not None
        return put_batch(partial(batches, index), mesh, config.micro_batch_size)

    return make_eval_step(blueprint, loss, mesh), put


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises ValueError unless the devices of the mesh get equal numbers of rows."""
    ways = int(np.prod([mesh.shape[axis] for axis in AXES_OF["batch"]]))
    if config.micro_batch_size % ways:
        raise ValueError(
            f"batch_size: found {config.batch_size} in {config.num_microbatches} microbatch(es) of "
            f"{config.micro_batch_size}, expected a multiple of mesh.data x mesh.fsdp = {ways} in "
            "each"
        )


def mask_id(config: Config, dataset: Dataset | None) -> int | None:
    """The token at whose end attention stops, where the model keeps to documents."""
    return dataset.eos_id if dataset and config.model.document_mask else None


def held_out_batches(config: Config, dataset: Dataset) -> EvalBatches:
    """The held-out set in the batches of the run's evals."""
    return EvalBatches(dataset.eval, batch_size=config.micro_batch_size, seq_len=config.seq_len)


def prepare_data(config: Config, say: Callable[[str], None]) -> tuple[Config, Dataset]:
    """The config with what was left open filled in, and its data, from the cache or made now."""
    max_tokens = default_max_tokens(config.data, config.num_steps * config.tokens_per_step)
    data = dataclasses.replace(config.data, max_tokens=max_tokens)
    dataset = prepare(data, vocab_size=config.model.vocab_size, max_tokens=max_tokens, log=say)
    return dataclasses.replace(config, data=data), dataset


def _tell_epochs(
    config: Config, dataset: Dataset, windows: int, say: Callable[[str], None]
) -> None:
    epochs = config.num_steps * config.batch_size / windows
    say(
        f"data: {dataset.train.num_tokens:,} training tokens from {config.data.source}, "
        f"{dataset.eval.num_tokens:,} held out; the run goes through them {epochs:.2f} times"
    )
    if epochs > 4 and not config.overfit_one_batch:
        say(
            f"the run is far larger than its data ({epochs:.1f} epochs): expect it to overfit; "
            "--stop_after_worse_evals 3 ends it when it does"
        )
