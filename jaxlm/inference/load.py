"""A trained model back from disk, for evals and for use."""

import logging
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jaxlm.checkpoints.folder import Selected
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.reading import read
from jaxlm.checkpoints.restore import restore_weights
from jaxlm.compilation_cache import keep_compiled
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
    """The model of `RUN@STEP`, verified, and what its checkpoint says of itself.

    Only the weights are read. A damaged best or latest is said, and passed over for the next.

    Args:
      run: a run folder or checkpoint folder; `@best` (the default), `@latest`, `@final` or a step
        number may follow.
      mesh: where to put it; by default all devices, data-parallel. Any will do.
      model: the factory that was given to `train`, if one was.

    Returns:
      An `nnx.Module` (`jaxlm.device.model.Transformer`, from int32 tokens [B, T] to float32 logits
      [B, T, V]), and the metadata.

    Raises:
      ValueError: no such run or step, it is damaged, or it is of another model.
    """
    mesh = mesh or make_mesh(MeshConfig())
    selected, (blueprint, params) = read(run, lambda s: (s, restore_params(s, mesh, model)))
    log_selected(selected)
    return nnx.merge(blueprint.graphdef, params), selected.metadata


def load_selected(run: str, mesh: Mesh | None = None) -> tuple[Selected, Blueprint, Params]:
    """`RUN@STEP`, and what `restore_params` gives of it; its run's compiled programs are used."""

    def load(selected: Selected) -> tuple[Selected, Blueprint, Params]:
        keep_compiled(selected.metadata.run_config().data.cache_dir)
        return selected, *restore_params(selected, mesh or make_mesh(MeshConfig()))

    return read(run, load)


def restore_params(
    selected: Selected, mesh: Mesh, model: ModelFactory | None = None
) -> tuple[Blueprint, Params]:
    """The weights alone of a checkpoint on a mesh, verified, and the blueprint of their model.

    Args:
      selected: the checkpoint.
      mesh: where to put them.
      model: the factory that was given to `train`, if one was.

    Raises:
      ValueError: it is of another model, or damaged.
    """
    metadata, config = selected.metadata, selected.metadata.run_config()
    if model is None and config.model.num_layers > len(metadata.fingerprints):
        raise InputError(
            f"{selected.path}: its config has {config.model.num_layers:,} layers, and it holds "
            f"{len(metadata.fingerprints)} arrays; it was altered, so take a copy from before"
        )
    blueprint = blueprint_of(config, mesh, Own(model))
    with progress("Loading the weights"):
        return blueprint, restore_weights(selected.path, metadata, blueprint.abstract.params)


def log_selected(selected: Selected) -> None:
    """Which checkpoint it is, and what it was passed over for."""
    metadata = selected.metadata
    for step, damage in selected.passed_over.items():
        _log.warning(f"step {step} is damaged ({damage[0]}) and was passed over")
    _log.info(f"Loaded step {metadata.step} of {selected.folder}")
    _log.info(f"Best eval loss: {metadata.best_eval_loss:.4f}")
    _log.info(f"Tokens seen: {format_count(metadata.tokens_seen)}")
