"""AdamW and learning-rate schedules, from Optax."""

import jax
import optax

from jaxlm.config import OptimConfig


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
    """Clip, Adam, and decoupled weight decay (1711.05101), all but the learning rate.

    The caller multiplies by the rate of its own step counter, which also counts steps whose
    gradient was not finite and which therefore changed nothing here.
    """
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    return optax.chain(
        clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def decayed(params: optax.Params) -> optax.Params:
    """True for the leaves that decay: matrices, but not norm scales."""
    return jax.tree.map(lambda param: param.ndim >= 2, params)
