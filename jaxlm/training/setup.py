"""Mesh, model, compiled step and data of a run, from its config or a caller's own parts."""

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxlm.compilation_cache import enable_compilation_cache
from jaxlm.config import Config
from jaxlm.data.batches import Rows
from jaxlm.data.mixture import Phase
from jaxlm.data.run_data import Recorded
from jaxlm.device.loss import Batch, Loss, next_token_loss
from jaxlm.device.optim import make_schedule
from jaxlm.device.sharding import AXES_OF, make_mesh, put_batch, replicated
from jaxlm.device.state import AS_CONFIGURED, Blueprint, Own, Params, blueprint_of
from jaxlm.device.step import TrainStep, make_eval_step, make_train_step, scheduled
from jaxlm.errors import InputError
from jaxlm.terminal import prints_lines
from jaxlm.tracking.clock import Clock
from jaxlm.tracking.throughput import peak_flops
from jaxlm.training.evaluate import EvalSet, EvalStep, HeldOut, evaluate
from jaxlm.training.first_look import check_given, look_at
from jaxlm.training.inputs import Inputs, TrainSet, find_inputs
from jaxlm.training.preflight import check_prompt

Tasks = Callable[[int, Params, Callable[[], bool]], dict[str, float]]
"""(step, weights, stops) -> `eval/TASK/METRIC`; raises `Stopped` if `stops` returns True."""

_OPEN_TASKS = "jaxlm.evaluation.tasks:open_tasks"


class TrainSetup(NamedTuple):
    """The parts that the training loop runs."""

    config: Config
    """The config, with the settings that the data determines filled in."""
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
    inputs: Inputs
    held_out: dict[str, HeldOut]
    """Held-out sets on the mesh, by name."""
    tasks: Tasks | None = None
    """The tasks of `config.tasks`."""

    def put_batches(self, phases: Sequence[Phase]) -> Callable[[int], Batch]:
        """Index -> that batch of the mixture on the mesh."""
        return put_rows(self.config, self.mesh, self.inputs.rows_of(phases))

    def evaluate(self, step: int, weights: Params, stops: Callable[[], bool]) -> dict[str, float]:
        """The row of the eval of a step; raises `Stopped` if `stops` returns True."""
        row = evaluate(self.eval_step, weights, self.held_out, self.inputs.best_by, stops)
        last = step == self.config.num_steps
        if self.tasks and (last or step % self.config.tasks.interval == 0):
            row |= self.tasks(step, weights, stops)
        return row

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
    enable_compilation_cache(config.data.cache_dir)
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    blueprint = blueprint_of(config, mesh, own)  # refuses a model before any data is prepared
    config, inputs = find_inputs(config, batches, eval_batches, data_of_run)
    if inputs.tokenizer_path and own.model is None:  # a caller's own model makes no sample
        check_prompt(config, inputs.tokenizer_path)
    train_loss, eval_of = _losses(config, inputs.eos_id, loss, eval_loss)
    # Of the mixture from now on: a source of earlier batches may be gone.
    example = put_rows(config, mesh, inputs.rows_of(inputs.planned))(inputs.step)
    look_at(blueprint, example, own, loss, eval_loss)
    with (clock or Clock()).spent("compile"):
        compiled = lower_step(config, blueprint, train_loss, mesh, example).compile()
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
        inputs=inputs,
        held_out={name: hold_out(config, mesh, of) for name, of in inputs.held_out.items()},
        tasks=_open_tasks(config, blueprint, mesh, inputs) if config.tasks.names else None,
    )


def _open_tasks(config: Config, blueprint: Blueprint, mesh: Mesh, inputs: Inputs) -> Tasks:
    if inputs.tokenizer_path is None:
        raise InputError(
            "tasks.names: found tasks, expected none with custom batches: no tokenizer"
        )
    return pkgutil.resolve_name(_OPEN_TASKS)(
        config, blueprint, mesh, inputs.tokenizer_path, inputs.eos_id
    )


def _losses(
    config: Config, eos_id: int | None, loss: Loss | None, eval_loss: Loss | None
) -> tuple[Loss, Loss]:
    # The losses of training and of evals; evals leave out the z-loss.
    next_token = partial(
        next_token_loss, eos_id=mask_id(config, eos_id), num_chunks=config.loss_chunks
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


def put_rows(config: Config, mesh: Mesh, rows: Rows) -> Callable[[int], Batch]:
    """Index -> that training batch on the mesh."""

    def put(index: int) -> Batch:
        index = 0 if config.overfit_one_batch else index
        return put_batch(partial(rows, index), mesh, config.batch_size)

    return put


def hold_out(config: Config, mesh: Mesh, batches: EvalSet) -> HeldOut:
    """A held-out set on a mesh."""

    def put(index: int) -> Batch:
        return put_batch(partial(batches, index), mesh, config.micro_batch_size)

    return HeldOut(put, len(batches), getattr(batches, "num_bytes", None))


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises ValueError unless the devices of the mesh get equal numbers of rows."""
    ways = int(np.prod([mesh.shape[axis] for axis in AXES_OF["batch"]]))
    if config.micro_batch_size % ways:
        raise InputError(
            f"batch_size: found {config.batch_size} in {config.num_microbatches} microbatch(es) of "
            f"{config.micro_batch_size}, expected a multiple of mesh.data x mesh.fsdp = {ways} in "
            "each"
        )


def mask_id(config: Config, eos_id: int | None) -> int | None:
    """The EOS that bounds attention with `document_mask`, else None."""
    return eos_id if config.model.document_mask else None
