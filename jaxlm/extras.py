"""What is installed: versions, and what is said where an optional dependency is missing."""

import importlib
import importlib.metadata
from types import ModuleType

VERSION = "0.1.0"
"""That of pyproject.toml: a clone that is not installed has no other."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
MODULES = {
    "wandb": "wandb",
    "tensorboard": "tensorboardX",
    "hf": "datasets",
    "tfds": "tensorflow_datasets",
    "text": "pyarrow",
    "gcs": "google.cloud.storage",
    "lm-eval": "lm_eval",
    "report": "vl_convert",
    "tpu": "libtpu",
    "cuda-plan": "jax_cuda13_plugin",
}
"""Extra of pyproject.toml -> the package that it installs."""


def versions() -> dict[str, str]:
    """Of jaxlm, and of the packages that a run depends on."""
    return {"jaxlm": VERSION} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def needs(module: str, what: str) -> ModuleType:
    """Imports a module of an extra for `what`.

    Raises:
      ImportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        extra = next(extra for extra, name in MODULES.items() if name in (module, package))
        raise ImportError(
            f"{what}: needs the extra {extra} ({error}): `uv run --extra {extra} …`, or "
            f"`pip install '.[{extra}]'` in jaxlm's folder"
        ) from error
