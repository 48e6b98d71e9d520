"""Muon, AdamW and learning-rate schedules, from Optax."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from jaxlm.config import OptimConfig
from jaxlm.device.sharding import Dims

ParamPath = tuple[Any, ...]
"""The keys of a param, such as `("layers", 0, "mlp", "w_up_DF")`."""

# Names of the dims of a hidden matrix, and of the dim that stacks such matrices.
_SIDES = ("model", "mlp", "heads", "kv_heads", "head_dim")
_STACK = "experts"

# Muon's published coefficients, a row for each iteration: Optax then loops, not unrolls, and the
# step of configs/180m.py takes 0.6 GB of a TPU v5e, not 1.5.
_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Step -> learning rate: a linear warmup, then the rest by `config.schedule`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    # The rate of step 0 is peak / warmup: with 0, the first step would change nothing.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, SCHEDULES[config.schedule](config, num_steps)], [warmup])


def _constant(config: OptimConfig, num_steps: int) -> optax.Schedule:
    return optax.constant_schedule(config.learning_rate)


def _cosine(config: OptimConfig, num_steps: int) -> optax.Schedule:
    decay_steps = max(num_steps - config.warmup_steps, 1)
    return optax.cosine_decay_schedule(config.learning_rate, decay_steps, config.min_lr_ratio)


def _warmup_stable_decay(config: OptimConfig, num_steps: int) -> optax.Schedule:
    # Constant, then linear over the last `decay_fraction` of the run (2404.06395). A warmup that
    # reaches into the decay shortens the decay, not the run.
    peak, after_warmup = config.learning_rate, num_steps - config.warmup_steps
    decay_steps = min(round(config.decay_fraction * num_steps), after_warmup)
    fall = optax.linear_schedule(peak, peak * config.min_lr_ratio, max(decay_steps, 1))
    stable = optax.constant_schedule(peak)
    return optax.join_schedules([stable, fall], [after_warmup - decay_steps])


SCHEDULES: dict[str, Callable[[OptimConfig, int], optax.Schedule]] = {
    "constant": _constant,
    "cosine": _cosine,
    "wsd": _warmup_stable_decay,
}
"""Name -> (config, num_steps with the warmup) -> schedule after the warmup."""


def make_optimizer(
    config: OptimConfig, dims: Mapping[ParamPath, Dims | None]
) -> optax.GradientTransformation:
    """Clipping, the named optimizer, decoupled weight decay: updates to subtract.

    The caller multiplies by the learning rate: its step counter also counts steps that were not
    applied, which a counter in here would miss.

    Args:
      config: the settings.
      dims: the names of each param's dims, or None; see `matrix_axes`.
    """
    norm = config.clip_norm
    return optax.chain(
        optax.identity() if norm is None else optax.clip_by_global_norm(norm),
        OPTIMIZERS[config.name](config, dims),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def _adam(
    config: OptimConfig, dims: Mapping[ParamPath, Dims | None]
) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def _muon(
    config: OptimConfig, dims: Mapping[ParamPath, Dims | None]
) -> optax.GradientTransformation:
    # Muon (kellerjordan.github.io/posts/muon) for the hidden matrices, Adam for the others. Muon's
    # updates are scaled to one RMS for any shape (2502.16982), so that both share the rate.
    matrices = {path: axes for path, names in dims.items() if (axes := matrix_axes(names))}
    orthogonal = optax.contrib.scale_by_muon(
        _NEWTON_SCHULZ,
        beta=config.muon_beta,
        weight_dimension_numbers=partial(
            _map_with_keys, lambda path, _: MuonDimensionNumbers(*matrices[path])
        ),
    )
    scaled = optax.stateless(partial(_scale_to_rms, config.muon_rms, matrices))
    label = partial(_map_with_keys, lambda path, _: "muon" if path in matrices else "adam")
    return optax.partition(
        {"muon": optax.chain(orthogonal, scaled), "adam": _adam(config, dims)}, label
    )


OPTIMIZERS: dict[
    str, Callable[[OptimConfig, Mapping[ParamPath, Dims | None]], optax.GradientTransformation]
] = {"adamw": _adam, "muon": _muon}
"""Name -> updates without clipping, weight decay and learning rate."""


def decayed(params: optax.Params) -> optax.Params:
    """True for the leaves that decay: matrices, but not norm scales."""
    return jax.tree.map(lambda param: param.ndim >= 2, params)


class MatrixAxes(NamedTuple):
    """Axes of a hidden matrix: of the residual stream, and the others."""

    stream: int
    others: tuple[int, ...]


def matrix_axes(dims: Dims | None) -> MatrixAxes | None:
    """The axes of a hidden matrix, which Muon updates; None for other params.

    A hidden matrix maps from or to the residual stream, the dim `model`; its other dims form the
    other side. Embedding and head have `vocab`, and are for Adam. With `experts`, each expert is a
    separate matrix. None if a dim is unnamed: Muon on all experts as one matrix would train wrong
    silently.

    Args:
      dims: the names of a param's dims; None for a param that names none.
    """
    names = dims or ()
    sides = [axis for axis, name in enumerate(names) if name in _SIDES]
    others = set(names) - {*_SIDES, _STACK}
    if "model" not in names or len(sides) < 2 or others:
        return None
    stream = names.index("model")
    return MatrixAxes(stream, tuple(axis for axis in sides if axis != stream))


def _map_with_keys(function: Callable[[ParamPath, Any], Any], params: Any) -> Any:
    def with_keys(path: tuple[Any, ...], param: Any) -> Any:
        return function(tuple(entry.key for entry in path), param)

    return jax.tree_util.tree_map_with_path(with_keys, params)


def _scale_to_rms(
    rms: float,
    matrices: Mapping[ParamPath, MatrixAxes],
    updates: optax.Updates,
    params: optax.Params | None,
) -> optax.Updates:
    del params

    # The entries of an orthogonal m x n have a root mean square of 1 / sqrt(max(m, n)).
    def scale(path: ParamPath, update: jax.Array) -> jax.Array:
        stream, others = matrices[path]
        m, n = update.shape[stream], math.prod(update.shape[axis] for axis in others)
        return update * (rms * max(m, n) ** 0.5)

    return _map_with_keys(scale, updates)
