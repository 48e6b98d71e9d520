"""Mesh, model, compiled step and data of a run, from its config or a caller's own parts."""

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxlm.compilation_cache import enable_compilation_cache
from jaxlm.config import Config
from jaxlm.data.batches import EvalBatches, TrainBatches, recorded
from jaxlm.data.dataset import Dataset, Recorded, load_dataset
from jaxlm.device.loss import Batch, Loss, next_token_loss
from jaxlm.device.optim import make_schedule
from jaxlm.device.sharding import AXES_OF, make_mesh, put_batch, replicated
from jaxlm.device.state import AS_CONFIGURED, Blueprint, Own, blueprint_of
from jaxlm.device.step import TrainStep, make_eval_step, make_train_step, scheduled
from jaxlm.errors import InputError
from jaxlm.terminal import prints_lines
from jaxlm.tracking.clock import Clock
from jaxlm.tracking.throughput import peak_flops
from jaxlm.training.evaluate import EvalSet, EvalStep
from jaxlm.training.first_look import check_given, look_at
from jaxlm.training.preflight import check_prompt

_log = logging.getLogger(__name__)


class TrainSet(Protocol):
    """Batch n of the training data: a pure function of n, so that a resume needs no state.

    An optional attribute `fingerprint` is kept in each checkpoint, and a resume with another one is
    refused.
    """

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """The given rows of batch `index`, as host arrays (`inputs`, `targets` by default)."""
        ...


class HeldOut(NamedTuple):
    """One held-out set."""

    put: Callable[[int], Batch]
    """Index -> that batch on the mesh."""
    num_batches: int


class TrainSetup(NamedTuple):
    """The parts that the training loop runs."""

    config: Config
    """The config, with `data.max_tokens` filled in."""
    mesh: Mesh
    blueprint: Blueprint
    train_step: TrainStep
    compiled: jax.stages.Compiled
    """The compiled update of `train_step`."""
    own: Own
    """Model, optimizer and frozen params of the caller."""
    peak_flops: float | None
    """Peak of all devices together (FLOP/s); None if unknown, or for a caller's own model."""
    eval_step: EvalStep
    put: Callable[[int], Batch]
    """Index -> that batch on the mesh."""
    held_out: dict[str, HeldOut]
    """Prefix of metric names -> held-out set; the set `eval` decides the best."""
    data_fingerprint: str
    eval_set: str
    """Name and fingerprint of the held-out set that decides the best; empty without one."""
    eos_id: int | None
    tokenizer_path: Path | None

    def eval_due(self, step: int) -> bool:
        """Whether a checkpoint of this step holds an eval."""
        due = step % self.config.eval_interval == 0 or step == self.config.num_steps
        return due and step > 0 and any(of.num_batches for of in self.held_out.values())


@prints_lines
def set_up(
    config: Config,
    *,
    own: Own = AS_CONFIGURED,
    loss: Loss | None = None,
    eval_loss: Loss | None = None,
    batches: TrainSet | None = None,
    eval_batches: EvalSet | Mapping[str, EvalSet] | None = None,
    data_of_run: Recorded | None = None,
    clock: Clock | None = None,
) -> TrainSetup:
    """Prepares the data, shards the model on the mesh and compiles the step.

    Raises:
      ValueError: the mesh does not divide the batch or the model, or the data does not fit.
      OSError, ImportError: the data is not available.
    """
    check_given(own.model, batches, eval_batches)
    sets = name_sets(eval_batches)
    enable_compilation_cache(config.data.cache_dir)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    blueprint = blueprint_of(config, mesh, own)  # refuses a model before any data is prepared
    dataset = None
    if batches is None:
        config, dataset = load_dataset(config, data_of_run)
        batches = TrainBatches(
            dataset.train,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            seed=config.seed,
            fingerprint=dataset.fingerprint,
        )
        if own.model is None:  # a caller's own model makes no sample
            check_prompt(config, dataset.tokenizer_path)
        _log_epochs(config, dataset, batches.windows_per_epoch)
        sets = sets or name_sets(held_out_batches(config, dataset))
    rows_of = recorded(batches, os.environ.get("JAXLM_RECORD_BATCHES"))
    train_loss, eval_of = _losses(config, dataset, loss, eval_loss)

    def put(index: int) -> Batch:
        index = 0 if config.overfit_one_batch else index
        return put_batch(partial(rows_of, index), mesh, config.batch_size)

    first = put(0)
    look_at(blueprint, first, own, loss, eval_loss)
    with (clock or Clock()).spent("compile"):
        compiled = lower_step(config, blueprint, train_loss, mesh, first).compile()
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    schedule = make_schedule(config.optim, config.num_steps)
    if own.optimizer is not None:
        schedule = optax.constant_schedule(1.0)
    return TrainSetup(
        config=config,
        mesh=mesh,
        blueprint=blueprint,
        train_step=scheduled(compiled, schedule, mesh, config.seed),
        compiled=compiled,
        own=own,
        peak_flops=peak * mesh.size if peak and own.model is None else None,
        eval_step=make_eval_step(blueprint, eval_of, mesh),
        put=put,
        held_out={name: hold_out(config, mesh, batches) for name, batches in sets.items()},
        data_fingerprint=str(getattr(batches, "fingerprint", "")),
        eval_set=_identity(eval_batches, sets),
        eos_id=dataset.eos_id if dataset else None,
        tokenizer_path=dataset.tokenizer_path if dataset else None,
    )


def _losses(
    config: Config, dataset: Dataset | None, loss: Loss | None, eval_loss: Loss | None
) -> tuple[Loss, Loss]:
    # The losses of training and of evals; evals leave out the z-loss.
    next_token = partial(
        next_token_loss, eos_id=mask_id(config, dataset), num_chunks=config.loss_chunks
    )
    return loss or next_token(z_loss=config.z_loss), eval_loss or loss or next_token()


def lower_step(
    config: Config, blueprint: Blueprint, loss: Loss, mesh: Mesh, example: Any
) -> jax.stages.Lowered:
    """The lowered train step; the devices of the mesh need not be on this machine.

    `example` is a batch, or its `jax.ShapeDtypeStruct`s with their shardings.
    """
    train_step = make_train_step(
        blueprint,
        loss,
        mesh,
        config.num_microbatches,
        config.guard.outlier_zscore,
        config.optim.ema_decay,
    )
    dtypes = np.dtype(np.float32), jax.eval_shape(partial(jax.random.key, 0)).dtype
    rate, key = (jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh)) for dtype in dtypes)
    return train_step.lower(blueprint.abstract, example, rate, key)


def name_sets(given: EvalSet | Mapping[str, EvalSet] | None) -> dict[str, EvalSet]:
    """Held-out sets by the prefix of their metric names; the first is `eval`."""
    if not isinstance(given, Mapping):
        return {} if given is None else {"eval": given}
    names = [f"eval/{name}" if number else "eval" for number, name in enumerate(given)]
    return dict(zip(names, given.values(), strict=True))


def _identity(given: EvalSet | Mapping[str, EvalSet] | None, sets: Mapping[str, EvalSet]) -> str:
    # Name and fingerprint of the set that decides the best: the first.
    if not sets:
        return ""
    name = next(iter(given)) if isinstance(given, Mapping) else "eval"
    return f"{name} {getattr(sets['eval'], 'fingerprint', '')}".strip()


def hold_out(config: Config, mesh: Mesh, batches: EvalSet) -> HeldOut:
    """A held-out set on a mesh."""

    def put(index: int) -> Batch:
        return put_batch(partial(batches, index), mesh, config.micro_batch_size)

    return HeldOut(put, len(batches))


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises ValueError unless the devices of the mesh get equal numbers of rows."""
    ways = int(np.prod([mesh.shape[axis] for axis in AXES_OF["batch"]]))
    if config.micro_batch_size % ways:
        raise InputError(
            f"batch_size: found {config.batch_size} in {config.num_microbatches} microbatch(es) of "
            f"{config.micro_batch_size}, expected a multiple of mesh.data x mesh.fsdp = {ways} in "
            "each"
        )


def mask_id(config: Config, dataset: Dataset | None) -> int | None:
    """The EOS that bounds attention with `document_mask`, else None."""
    return dataset.eos_id if dataset and config.model.document_mask else None


def held_out_batches(config: Config, dataset: Dataset) -> EvalBatches:
    """The held-out set in the batches of the run's evals."""
    return EvalBatches(
        dataset.eval,
        batch_size=config.micro_batch_size,
        seq_len=config.seq_len,
        fingerprint=dataset.fingerprint,
    )


def _log_epochs(config: Config, dataset: Dataset, windows: int) -> None:
    epochs = config.num_steps * config.batch_size / windows
    _log.info(
        f"data: {dataset.train.num_tokens:,} training tokens from {config.data.source}, "
        f"{dataset.eval.num_tokens:,} held out; the run goes through them {epochs:.2f} times"
    )
    if epochs > 4 and not config.overfit_one_batch:
        _log.info(
            f"the run is far larger than its data ({epochs:.1f} epochs): expect it to overfit; "
            "--stop_after_worse_evals 3 ends it when it does"
        )
