"""Muon, AdamW and learning-rate schedules, from Optax."""

from functools import partial
from typing import Any

import jax
import optax

from jaxlm.config import OptimConfig

# Coefficients of the author, one row an iteration: so Optax makes a loop of it, and the program of
# 180M for a TPU v5e takes 0.6 GB of a device rather than 1.5.
_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Step -> learning rate.

    `wsd` is warmup-stable-decay (2404.06395): constant, then linear over the last
    `decay_fraction` of the run.
    """
    peak, floor = config.learning_rate, config.learning_rate * config.min_lr_ratio
    warmup = config.warmup_steps
    # The rate of step 0 is peak / warmup, not 0: an update of nothing would be a step wasted.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, max(num_steps - warmup, 1), config.min_lr_ratio)
        return optax.join_schedules([rise, decay], [warmup])
    # A warmup that reaches into the decay shortens it; the end stays where it is.
    decay_steps = min(round(config.decay_fraction * num_steps), num_steps - warmup)
    fall = optax.linear_schedule(peak, floor, max(decay_steps, 1))
    stable_until = num_steps - decay_steps
    return optax.join_schedules([rise, optax.constant_schedule(peak), fall], [warmup, stable_until])


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clip, Muon or Adam, and decoupled weight decay (1711.05101), all but the learning rate.

    Muon (kellerjordan.github.io/posts/muon) is for the hidden matrices, Adam for all else. Its
    updates get the same size whatever the shape of the matrix (2502.16982), so they share the rate.

    The caller multiplies by the rate of its own step counter, which also counts steps whose
    gradient was not finite and which therefore changed nothing here.
    """
    norm = config.clip_norm
    clip = optax.identity() if norm is None else optax.clip_by_global_norm(norm)
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            _NEWTON_SCHULZ, beta=config.muon_beta, weight_dimension_numbers=_matrix_axes
        ),
        optax.stateless(partial(_scale_to_rms, config.muon_rms)),
    )
    return optax.chain(
        clip,
        adam if config.name == "adamw" else optax.partition({"muon": muon, "adam": adam}, labels),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def decayed(params: optax.Params) -> optax.Params:
    """True for the leaves that decay: matrices, but not norm scales."""
    return jax.tree.map(lambda param: param.ndim >= 2, params)


def labels(params: optax.Params) -> optax.Params:
    """For each leaf, whether `muon` or `adam` is for it.

    Muon is for the matrices from and to the residual stream, told by the dims in their name
    (`w_q_DNH`): D is the stream. Those with V are tables of tokens, whose rows have gradients of
    their own.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, param: "muon" if _stream_axis(path, param) >= 0 else "adam", params
    )


def _stream_axis(path: tuple[Any, ...], param: jax.Array) -> int:
    dims = str(getattr(path[-1], "key", "")).rpartition("_")[2]
    is_hidden = len(dims) == param.ndim > 1 and "D" in dims and "V" not in dims
    return dims.index("D") if is_hidden else -1


def _matrix_axes(params: optax.Params) -> optax.Params:
    # Of three dims, the two that are not D are one side of the matrix.
    def axes(path: tuple[Any, ...], param: jax.Array) -> optax.contrib.MuonDimensionNumbers:
        stream = _stream_axis(path, param)
        others = tuple(axis for axis in range(param.ndim) if axis != stream)
        return optax.contrib.MuonDimensionNumbers((stream,), others)

    return jax.tree_util.tree_map_with_path(axes, params)


def _scale_to_rms(rms: float, updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
    del params

    # The entries of an orthogonal m x n have a root mean square of 1 / sqrt(max(m, n)).
    def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        num_stream = update.shape[_stream_axis(path, update)]
        return update * (rms * max(num_stream, update.size // num_stream) ** 0.5)

    return jax.tree_util.tree_map_with_path(scale, updates)
