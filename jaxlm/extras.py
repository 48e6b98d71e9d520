"""Installed versions, and the message for an optional dependency that is missing."""

import functools
import importlib
import importlib.metadata
import json
import subprocess
from pathlib import Path
from types import ModuleType

from jaxlm.errors import MissingPackageError

VERSION = "0.6.0"
"""The version in pyproject.toml, for a clone that is not installed."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
MODULES = {
    "wandb": "wandb",
    "tensorboard": "tensorboardX",
    "hf": "datasets",
    "tfds": "tensorflow_datasets",
    "text": "pyarrow",
    "stores": "s3fs",
    "gcs": "google.cloud.storage",
    "lm-eval": "lm_eval",
    "report": "vl_convert",
    "tpu": "libtpu",
    "cuda-plan": "jax_cuda13_plugin",
}
"""Extra of pyproject.toml -> a module that it installs."""


@functools.cache
def version() -> str:
    """The version of jaxlm, with the commit if known: `0.4.0 (commit 1a2b…)`."""
    commit = _checked_out(Path(__file__).parent.parent) or _installed_from()
    return f"{VERSION} (commit {commit})" if commit else VERSION


def _checked_out(root: Path) -> str | None:
    # Check this folder only: a virtual environment may lie in the checkout of another project.
    if not (root / ".git").exists():
        return None
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        command = ["git", "--no-optional-locks", "-C", str(root), *describe]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or git does not trust the folder
        return None


def _installed_from() -> str | None:
    # pip records the commit of an install from a repository (PEP 610).
    try:
        text = importlib.metadata.distribution("jaxlm").read_text("direct_url.json") or "{}"
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(text).get("vcs_info", {}).get("commit_id")


def versions() -> dict[str, str]:
    """The versions of jaxlm and of the packages that a run depends on."""
    return {"jaxlm": version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def needs(module: str, feature: str) -> ModuleType:
    """Imports a module of an extra for `feature`.

    Raises:
      ImportError: the extra is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        extra = next(extra for extra, name in MODULES.items() if name in (module, package))
        raise MissingPackageError(
            f"{feature}: needs the extra {extra} ({error}): `uv run --extra {extra} …`, or "
            f"`pip install '.[{extra}]'` in jaxlm's folder"
        ) from error
