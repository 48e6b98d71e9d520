"""The optional dependencies, and what is said where one is missing."""

import importlib
from types import ModuleType

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
        raise ImportError(f"{what}: needs `pip install 'jaxlm[{extra}]'` ({error})") from error
