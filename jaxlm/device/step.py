"""The train step: loss, gradient, update. Arrays in, arrays out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxlm.device.guard import judge
from jaxlm.device.loss import Batch, Loss, Totals, total
from jaxlm.device.sharding import batch_sharding, replicated, shard_grads
from jaxlm.device.state import Blueprint, Params, TrainState, cast_like, in_float32, jit_with_model

StepMetrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def make_train_step(
    blueprint: Blueprint,
    loss: Loss,
    mesh: Mesh,
    num_microbatches: int = 1,
    outlier_zscore: float | None = None,
    ema_decay: float | None = None,
) -> jax.stages.Wrapped:
    """The jitted update; the state is donated.

    The rows of the batch are split into `num_microbatches` parts, whose loss and gradient sums add
    up to those of the batch. A step that `judge` rejects leaves params, optimizer and `ema_params`
    (kept with `ema_decay`) unchanged.

    Returns:
      `(state, batch, learning_rate, key) -> (state, metrics)`; `key` is the step's randomness. The
      metrics are scalars: `loss` (mean over tokens), the loss's terms and metrics by name,
      `grad_norm` (before clipping), `learning_rate`, and the counts of `Guard`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, blueprint.abstract)

    def means_and_grads(params: Params, batch: Batch, key: jax.Array) -> tuple[Totals, Params]:
        def objective(params: Params, part: Batch, key: jax.Array) -> tuple[jax.Array, Totals]:
            totals = total(loss, nnx.merge(blueprint.graphdef, params), part, key)
            return totals.objective(), totals

        def sums_and_grads(params: Params, part: Batch, key: jax.Array) -> tuple[Totals, Params]:
            (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params, part, key)
            return in_float32((sums, grads))

        if num_microbatches == 1:
            sums, grads = sums_and_grads(params, batch, key)
        else:
            sums, grads = _accumulate(sums_and_grads, params, batch, key, num_microbatches)
        grads = shard_grads(grads, shardings.params)
        return sums.means(), jax.tree.map(lambda x: x / sums.num_tokens, grads)

    def train_step(
        state: TrainState, batch: Batch, learning_rate: jax.Array, key: jax.Array
    ) -> tuple[TrainState, StepMetrics]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for attention and `constrain`
            means, grads = means_and_grads(state.params, batch, key)
        grad_norm = optax.tree_utils.tree_norm(grads)
        before = in_float32(state.params)
        updates, opt_state = blueprint.tx.update(grads, state.opt_state, before)
        after = jax.tree.map(lambda p, u: p - learning_rate * u, before, updates)  # u points uphill
        params = cast_like(after, state.params)
        ema_params = _new_ema(state, params, ema_decay)

        finite = functools.reduce(
            jnp.logical_and, map(jnp.isfinite, (means.loss, *means.terms.values(), grad_norm))
        )
        applied, guard = judge(state.guard, means.loss, grad_norm, finite, outlier_zscore)
        params, opt_state, ema_params = jax.tree.map(
            lambda new, old: jnp.where(applied, new, old),
            (params, opt_state, ema_params),
            (state.params, state.opt_state, state.ema_params),
        )
        metrics = {
            **means.metrics,
            **means.terms,
            "loss": means.loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped_steps": guard.skipped_steps,
            "consecutive_skips": guard.consecutive_skips,
        }
        return TrainState(params, opt_state, state.step + 1, guard, ema_params), metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh), replicated(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=blueprint.compiler_options,
    )


def scheduled(
    update: Callable[..., Any], schedule: optax.Schedule, mesh: Mesh, seed: int = 0
) -> TrainStep:
    """The update of `make_train_step`, called with the learning rate and the key of each step.

    Both are arguments, so another schedule or seed does not recompile the update.
    """

    def rate_and_key(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jnp.asarray(schedule(step), jnp.float32), key

    jitted = jax.jit(rate_and_key, out_shardings=replicated(mesh))
    return lambda state, batch: update(state, batch, *jitted(state.step))


def _new_ema(state: TrainState, params: Params, ema_decay: float | None) -> Params | None:
    # A lower decay in the first steps forgets the initial weights quickly (as in TensorFlow's
    # ExponentialMovingAverage).
    if ema_decay is None:
        return None
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))

    def toward(mean: jax.Array, p: jax.Array) -> jax.Array:
        return mean + (1 - decay) * (p - mean)  # a frozen param keeps its bits

    return jax.tree.map(toward, state.ema_params, params)


def _accumulate(
    sums_and_grads: Callable[..., Any],
    params: Params,
    batch: Batch,
    key: jax.Array,
    num_microbatches: int,
) -> tuple[Totals, Params]:
    # Parts interleave the rows: contiguous ones would move rows between devices.
    parts = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1), batch
    )

    keys = jax.random.split(key, num_microbatches)

    def add_part(sums: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, sums_and_grads(params, *part)), None

    first = jax.tree.map(lambda x: x[0], (parts, keys))
    shapes = jax.eval_shape(sums_and_grads, params, *first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add_part, zeros, (parts, keys))[0]


def make_eval_step(
    blueprint: Blueprint, loss: Loss, mesh: Mesh
) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """The jitted `(params, batch) -> sums`, all scalars: `loss`, `tokens` and each metric."""

    def sums(model: Any, batch: Batch) -> dict[str, jax.Array]:
        totals = total(loss, model, batch, None)
        return in_float32({**totals.metrics, "loss": totals.loss, "tokens": totals.num_tokens})

    return jit_with_model(sums, blueprint, mesh)
