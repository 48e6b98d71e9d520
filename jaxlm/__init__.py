"""Pretrain language models in JAX, with checkpoints you can trust."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxlm.extras import VERSION as __version__

if TYPE_CHECKING:
    from jaxlm.config import Config as Config
    from jaxlm.inference.load import load_model as load_model
    from jaxlm.training.train import train as train

# Loaded on first use: `jaxlm --help` needs none of them, and JAX takes a second to import.
_HOMES = {
    "Config": "jaxlm.config",
    "load_model": "jaxlm.inference.load",
    "train": "jaxlm.training.train",
}
__all__ = ["Config", "__version__", "load_model", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
