"""Programs of equal runs, traced and compiled once in a process."""

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxlm.config import MeshConfig, OptimConfig
from jaxlm.device import guard
from jaxlm.device.state import AS_CONFIGURED, Own
from jaxlm.evaluation import score
from jaxlm.inference import load
from jaxlm.training import setup, start, train

_SCHEDULE = ("learning_rate", "schedule", "warmup_steps", "decay_fraction", "min_lr_ratio")


def share(patch: pytest.MonkeyPatch) -> None:
    """Makes `training.setup` reuse programs for as long as the patch lasts.

    Each start of a run would trace its step, eval and initial state anew: most of its time.
    """
    blueprint_of, lower_step = setup.blueprint_of, setup.lower_step
    make_eval_step = setup.make_eval_step
    kept: dict[Any, Any] = {}

    def shared_blueprint(config: Any, mesh: Any, own: Own = AS_CONFIGURED) -> Any:
        optim = _without_schedule(config.optim)
        key = config.model, optim, config.deterministic, mesh, own, guard.WINDOW
        if key not in kept:
            kept[key] = blueprint_of(config, mesh, own)
        return kept[key]

    def shared_step(config: Any, blueprint: Any, loss: Any, mesh: Any, example: Any) -> Any:
        batch = jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding), example)
        optim, of_loss = _without_schedule(config.optim), (loss, config.num_microbatches)
        key = id(blueprint), optim, *of_loss, config.guard.outlier_zscore, str(batch)
        if key not in kept:
            lowered = lower_step(config, blueprint, loss, mesh, example)
            compiled = SimpleNamespace(compile=functools.cache(lowered.compile))
            kept[key] = compiled, blueprint  # an id is that of one object while this lives
        return kept[key][0]

    def shared_eval_step(blueprint: Any, loss: Any, mesh: Any) -> Any:
        key = id(blueprint), loss, mesh
        if key not in kept:
            kept[key] = make_eval_step(blueprint, loss, mesh), blueprint
        return kept[key][0]

    for module in (setup, start, load):  # the eval of a model that is loaded is kept with it
        patch.setattr(module, "blueprint_of", shared_blueprint)
    patch.setattr(setup, "lower_step", shared_step)
    for module in (setup, score):
        patch.setattr(module, "make_eval_step", shared_eval_step)
    for name in ("next_token_loss", "make_schedule", "scheduled"):
        patch.setattr(setup, name, functools.cache(getattr(setup, name)))
    _take_two_devices(patch)


def _take_two_devices(patch: pytest.MonkeyPatch) -> None:
    """Runs with batches of their own take two devices; those of text all, as their evals do."""
    make_mesh, make_parts, takes_two = setup.make_mesh, train.set_up, False

    def small_parts(config: Any, **parts: Any) -> Any:
        nonlocal takes_two
        takes_two = parts["batches"] is not None and config.mesh == MeshConfig()
        try:
            return make_parts(config, **parts)
        finally:
            takes_two = False

    def small_mesh(config: Any) -> Any:
        return make_mesh(config, jax.devices()[:2] if takes_two else None)

    patch.setattr(train, "set_up", small_parts)
    patch.setattr(setup, "make_mesh", small_mesh)


def _without_schedule(config: OptimConfig) -> OptimConfig:
    # The rate is an argument of the step.
    defaults = OptimConfig()
    return replace(config, **{name: getattr(defaults, name) for name in _SCHEDULE})
