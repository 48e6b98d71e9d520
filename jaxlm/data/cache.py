"""The folder of prepared data: where it is, what it holds."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import filelock

from jaxlm.files.strict import read_json

MANIFEST, PROGRESS = "manifest.json", "progress.json"


class Record(TypedDict):
    """What a file held when it was written."""

    name: str
    num_bytes: int
    crc32c: int


class Shard(Record):
    """A record of token ids."""

    num_tokens: int


class Progress(TypedDict):
    """How far a preparation has come: what PROGRESS holds, and MANIFEST besides its own."""

    source: str
    revision: str
    next_document: int
    tokenizer: Record | None
    train: list[Shard]
    eval: list[Shard]


class Manifest(TypedDict):
    """What MANIFEST holds of prepared data."""

    tokenizer: Record
    train: list[Shard]
    eval: list[Shard]
    vocab_size: int
    eos_id: int
    dtype: Literal["<u2", "<u4"]
    exhausted: bool
    fingerprint: str


def cache_root(cache_dir: str | None) -> Path:
    """What runs share is kept in `cache_dir`, else $JAXLM_CACHE, else ~/.cache/jaxlm."""
    root = cache_dir or os.environ.get("JAXLM_CACHE") or "~/.cache/jaxlm"
    return Path(root).expanduser().absolute()


def data_folder(cache_dir: str | None) -> Path:
    """Where prepared data is kept."""
    return cache_root(cache_dir) / "data"


def list_caches(cache_dir: str | None = None) -> list[dict[str, Any]]:
    """The prepared datasets, and what there is so far of others, by name, as JSON values.

    Returns:
      For each `name`, `source`, `num_tokens`, `num_bytes`, `complete`, and `last_used_s`: when it
      was last opened or written to (seconds since 1970).
    """
    return [
        _describe(folder) for folder in sorted(data_folder(cache_dir).glob("*")) if folder.is_dir()
    ]


def _describe(folder: Path) -> dict[str, Any]:
    complete = (folder / MANIFEST).exists()
    path = folder / (MANIFEST if complete else PROGRESS)
    try:
        about = read_json(path, Progress)
    except (FileNotFoundError, ValueError):
        about = {}
    files = [file for file in folder.iterdir() if file.suffix != ".tmp"]
    shards = [*about.get("train", ()), *about.get("eval", ())]
    return {
        "name": folder.name,
        "source": about.get("source", "?"),
        "num_tokens": sum(shard["num_tokens"] for shard in shards),
        "num_bytes": sum(file.stat().st_size for file in files),
        "complete": complete,
        "last_used_s": (path if path.exists() else folder).stat().st_mtime,
    }


def clear_caches(cache_dir: str | None = None, names: Sequence[str] | None = None) -> list[str]:
    """Deletes the named datasets, or all; returns their names.

    Raises:
      ValueError: a name that is not there, or one that is being prepared.
    """
    root = data_folder(cache_dir)
    there = [entry["name"] for entry in list_caches(cache_dir)]
    cleared = there if names is None else list(names)
    if unknown := sorted(set(cleared) - set(there)):
        raise ValueError(f"cache: no {', '.join(unknown)} in {root}; there is {', '.join(there)}")
    for folder in (root / name for name in cleared):
        try:
            with filelock.FileLock(f"{folder}.lock", timeout=0):
                # First, so that a kill from here on leaves unfinished data, not damaged data.
                (folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder)
                Path(f"{folder}.lock").unlink(missing_ok=True)
        except filelock.Timeout as error:
            raise ValueError(
                f"{folder.name}: another process is preparing it; wait, or stop that one first"
            ) from error
    return cleared
