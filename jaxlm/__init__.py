"""Pretrain language models in JAX, with checkpoints you can trust."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxlm.extras import VERSION as __version__

if TYPE_CHECKING:
    from jaxlm.checkpoints.folder import select as select
    from jaxlm.config import Config as Config
    from jaxlm.device.state import model_of as model_of
    from jaxlm.evaluation.score import score as score
    from jaxlm.inference.load import load_model as load_model
    from jaxlm.inference.sample import sample as sample
    from jaxlm.tracking.trackers import Tracker as Tracker
    from jaxlm.training.loop import Hook as Hook
    from jaxlm.training.train import train as train

# Loaded on first use: `jaxlm --help` needs none of them, and JAX takes a second to import.
_HOMES = {
    "Config": "jaxlm.config",
    "Hook": "jaxlm.training.loop",
    "load_model": "jaxlm.inference.load",
    "model_of": "jaxlm.device.state",
    "Tracker": "jaxlm.tracking.trackers",
    "sample": "jaxlm.inference.sample",
    "score": "jaxlm.evaluation.score",
    "select": "jaxlm.checkpoints.folder",
    "train": "jaxlm.training.train",
}
__all__ = [
    "Config",
    "Hook",
    "Tracker",
    "__version__",
    "load_model",
    "model_of",
    "sample",
    "score",
    "select",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
