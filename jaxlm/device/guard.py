"""The recent losses of a run, by which a spike is detected. Arrays in, arrays out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOSS_WINDOW = 128
"""Losses remembered; there is no spike before there are as many."""
# The median absolute deviation of a normal distribution, in standard deviations.
_MAD_OF_NORMAL = 0.6745
# A loss that hardly varies must not make a spike of noise (nats).
_MIN_DEVIATION = 0.01


class Guard(NamedTuple):
    """Part of the state, so that a resumed run judges as the run in one piece would."""

    nonfinite_steps: jax.Array
    """int32 []: steps that were not finite, and changed nothing else."""
    nonfinite_run: jax.Array
    """int32 []: those of them in a row, up to now."""
    spike_run: jax.Array
    """int32 []: steps in a row, up to now, whose loss was out of the ordinary."""
    losses: jax.Array
    """float32 [LOSS_WINDOW]: the last finite losses, newest last; NaN before there are any."""


def make_guard() -> Guard:
    """The guard of a new run."""
    zero = jnp.zeros((), jnp.int32)
    return Guard(zero, zero, zero, jnp.full((LOSS_WINDOW,), jnp.nan, jnp.float32))


def observe(guard: Guard, loss: jax.Array, finite: jax.Array, spike_zscore: float | None) -> Guard:
    """Takes in one step.

    A loss is out of the ordinary if it lies more than `spike_zscore` standard deviations above
    the median of the window, the deviation being estimated from the median absolute one: neither
    is moved by the spike itself (Iglewicz and Hoaglin, 1993).

    Args:
      guard: before the step.
      loss: of the step, float32 [].
      finite: whether loss and gradient were, bool [].
      spike_zscore: None takes no loss for a spike.
    """
    median = jnp.median(guard.losses)  # NaN until the window is full, and then nothing is above it
    deviation = jnp.median(jnp.abs(guard.losses - median)) / _MAD_OF_NORMAL
    limit = jnp.inf if spike_zscore is None else spike_zscore
    spike = loss > median + limit * jnp.maximum(deviation, _MIN_DEVIATION)
    # Steps that are not finite continue a spike, but begin none.
    in_spike = jnp.where(finite, spike, guard.spike_run > 0)
    return Guard(
        nonfinite_steps=guard.nonfinite_steps + jnp.where(finite, 0, 1),
        nonfinite_run=jnp.where(finite, 0, guard.nonfinite_run + 1),
        spike_run=jnp.where(in_spike, guard.spike_run + 1, 0),
        losses=jnp.where(finite, jnp.append(guard.losses[1:], loss), guard.losses),
    )
