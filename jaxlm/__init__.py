"""Pretrain language models in JAX, with checkpoints you can trust."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm.config import Config as Config
    from jaxlm.load import load_model as load_model
    from jaxlm.train import train as train

# Loaded on first use: `jaxlm --help` needs none of them, and JAX takes a second to import.
_HOMES = {"Config": "jaxlm.config", "load_model": "jaxlm.load"}
__all__ = ["Config", "load_model", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _Package(types.ModuleType):
    # Whoever imports the module jaxlm.train makes Python set it as `jaxlm.train`, which is to stay
    # the function.
    @property
    def train(self) -> Any:
        return importlib.import_module("jaxlm.train").train

    @train.setter
    def train(self, module: types.ModuleType) -> None:
        del module


sys.modules[__name__].__class__ = _Package
