"""Loads the weights of a checkpoint, verified, as a model."""

import logging
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jaxlm.checkpoints.folder import Selected
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.reading import read
from jaxlm.checkpoints.restore import restore_weights
from jaxlm.compilation_cache import enable_compilation_cache
from jaxlm.config import MeshConfig
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import Blueprint, ModelFactory, Own, Params, blueprint_of
from jaxlm.errors import InputError
from jaxlm.terminal import prints_lines, progress
from jaxlm.tracking.console import format_count

_log = logging.getLogger(__name__)


@prints_lines
def load_model(
    run: str, *, mesh: Mesh | None = None, model: ModelFactory | None = None
) -> tuple[Any, Metadata]:
    """The model of `RUN@STEP`, verified, and the metadata of its checkpoint.

    Only the weights are read. If best or latest is damaged, a warning is logged and the next
    checkpoint is loaded instead.

    Args:
      run: a run folder or checkpoint folder; `@best` (the default), `@latest`, `@final` or a step
        number may follow.
      mesh: devices for the weights; any mesh, by default all devices, data-parallel.
      model: the factory that was given to `train`, if one was.

    Returns:
      An `nnx.Module` (`jaxlm.device.model.Transformer`, from int32 tokens [B, T] to float32 logits
      [B, T, V]), and the metadata.

    Raises:
      ValueError: no such run or step, the checkpoint is damaged, or it is of another model.
    """
    mesh = mesh or make_mesh(MeshConfig())
    selected, (blueprint, params) = read(run, lambda s: (s, restore_params(s, mesh, model)))
    log_selected(selected)
    return nnx.merge(blueprint.graphdef, params), selected.metadata


def load_selected(run: str, mesh: Mesh | None = None) -> tuple[Selected, Blueprint, Params]:
    """`RUN@STEP` with its blueprint and weights; uses the compilation cache of its run."""

    def load(selected: Selected) -> tuple[Selected, Blueprint, Params]:
        enable_compilation_cache(selected.metadata.run_config().data.cache_dir)
        return selected, *restore_params(selected, mesh or make_mesh(MeshConfig()))

    return read(run, load)


def restore_params(
    selected: Selected, mesh: Mesh, model: ModelFactory | None = None
) -> tuple[Blueprint, Params]:
    """The blueprint of a checkpoint's model, and its weights on a mesh, verified.

    Args:
      selected: the checkpoint.
      mesh: devices for the weights.
      model: the factory that was given to `train`, if one was.

    Raises:
      ValueError: the checkpoint is of another model, or damaged.
    """
    metadata, config = selected.metadata, selected.metadata.run_config()
    if model is None and config.model.num_layers > len(metadata.fingerprints):
        raise InputError(
            f"{selected.path}: found {config.model.num_layers:,} layers in its config, but only "
            f"{len(metadata.fingerprints)} arrays; the config was altered: restore an older copy"
        )
    blueprint = blueprint_of(config, mesh, Own(model))
    with progress("Loading the weights"):
        return blueprint, restore_weights(selected.path, metadata, blueprint.abstract.params)


def log_selected(selected: Selected) -> None:
    """Logs step and eval loss of a checkpoint, and the damaged steps that were skipped for it."""
    metadata = selected.metadata
    for step, damage in selected.passed_over.items():
        _log.warning(f"step {step} is damaged ({damage[0]}) and was passed over")
    _log.info(f"Loaded step {metadata.step} of {selected.folder}")
    _log.info(f"Best eval loss: {metadata.best_eval_loss:.4f}")
    _log.info(f"Tokens seen: {format_count(metadata.tokens_seen)}")
