"""The guard: rejects steps with NaN or infinity, and outliers. Arrays in, arrays out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128
"""Applied steps remembered; no step is an outlier before this many are applied."""
# The median absolute deviation of a normal distribution, in standard deviations.
_MAD_OF_NORMAL = 0.6745
# Of the median. Without a minimum, noise would be an outlier of a loss or norm that hardly varies.
_MIN_DEVIATION = 0.01


class Guard(NamedTuple):
    """The guard's counters and history; in `TrainState`: a resume rejects the same steps."""

    skipped_steps: jax.Array
    """int32 []: steps that were not applied."""
    consecutive_skips: jax.Array
    """int32 []: steps not applied since the last applied one."""
    losses: jax.Array
    """float32 [WINDOW]: of the last applied steps, newest last; NaN where none yet."""
    grad_norms: jax.Array
    """float32 [WINDOW]: of the same steps."""


def make_guard() -> Guard:
    """The guard of a new run."""
    zero = jnp.zeros((), jnp.int32)
    empty = jnp.full((WINDOW,), jnp.nan, jnp.float32)
    return Guard(zero, zero, empty, empty)


def judge(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, finite: jax.Array, zscore: float | None
) -> tuple[jax.Array, Guard]:
    """Whether a step is applied, bool [], and the guard after the step.

    A loss or gradient norm is an outlier if its value exceeds the median of the window by more than
    `zscore` standard deviations, estimated from the median absolute deviation (robust to
    outliers: Iglewicz and Hoaglin, 1993).

    Args:
      guard: before the step.
      loss: of the step, float32 [].
      grad_norm: of the step, float32 [].
      finite: of loss, terms and gradient norm together, bool [].
      zscore: None applies every finite step.
    """
    applied = finite
    if zscore is not None:
        applied &= ~_is_outlier(guard.losses, loss, zscore)
        applied &= ~_is_outlier(guard.grad_norms, grad_norm, zscore)

    def push(window: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(applied, jnp.append(window[1:], value), window)

    return applied, Guard(
        skipped_steps=guard.skipped_steps + jnp.where(applied, 0, 1),
        consecutive_skips=jnp.where(applied, 0, guard.consecutive_skips + 1),
        losses=push(guard.losses, loss),
        grad_norms=push(guard.grad_norms, grad_norm),
    )


def _is_outlier(window: jax.Array, value: jax.Array, zscore: float) -> jax.Array:
    median = jnp.median(window)  # NaN until the window is full: no value is above NaN
    deviation = jnp.median(jnp.abs(window - median)) / _MAD_OF_NORMAL
    deviation = jnp.maximum(deviation, _MIN_DEVIATION * jnp.abs(median))
    return value > median + zscore * deviation
