"""The folder of prepared data: where it is, who may write there, what it holds."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypedDict

import filelock

from jaxlm.data.shards import Record, Shard
from jaxlm.strict import read_json

MANIFEST, PROGRESS = "manifest.json", "progress.json"


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


def data_folder(cache_dir: str | None) -> Path:
    """Where prepared data is kept: in `cache_dir`, else $JAXLM_CACHE, else ~/.cache/jaxlm."""
    root = cache_dir or os.environ.get("JAXLM_CACHE") or "~/.cache/jaxlm"
    return Path(root).expanduser().absolute() / "data"


@contextlib.contextmanager
def locked(folder: Path, log: Callable[[str], object] | None) -> Iterator[None]:
    """Holds the lock of a folder, which ends with the process however that ends.

    Args:
      folder: what to lock; the lock is beside it.
      log: told if another process has the lock, before waiting for it.

    Raises:
      ValueError: another process has it, and `log` is None.
    """
    lock = filelock.FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        if log is None:
            raise ValueError(
                f"{folder.name}: another process is preparing it; wait, or stop that one first"
            ) from error
        log(f"Another process is preparing {folder.name}: waiting for it")
        lock.acquire(poll_interval=0.1)
    try:
        yield
    finally:
        lock.release()


@dataclasses.dataclass(frozen=True)
class CacheEntry:
    """A prepared dataset, or what there is so far of one."""

    name: str
    source: str
    num_tokens: int
    num_bytes: int
    complete: bool
    last_used_s: float
    """When it was last opened or written to (seconds since 1970)."""


def list_caches(cache_dir: str | None = None) -> list[CacheEntry]:
    """What is in the cache, by name."""
    return [
        _entry(folder) for folder in sorted(data_folder(cache_dir).glob("*")) if folder.is_dir()
    ]


def _entry(folder: Path) -> CacheEntry:
    complete = (folder / MANIFEST).exists()
    path = folder / (MANIFEST if complete else PROGRESS)
    try:
        about = read_json(path, Progress)
    except (FileNotFoundError, ValueError):
        about = None
    files = [file for file in folder.iterdir() if file.suffix != ".tmp"]
    return CacheEntry(
        name=folder.name,
        source=about["source"] if about else "?",
        num_tokens=sum(s["num_tokens"] for s in about["train"] + about["eval"]) if about else 0,
        num_bytes=sum(file.stat().st_size for file in files),
        complete=complete,
        last_used_s=(path if path.exists() else folder).stat().st_mtime,
    )


def clear_caches(cache_dir: str | None = None, names: Sequence[str] | None = None) -> list[str]:
    """Deletes the named datasets, or all; returns their names.

    Raises:
      ValueError: a name that is not there, or one that is being prepared.
    """
    root = data_folder(cache_dir)
    there = [entry.name for entry in list_caches(cache_dir)]
    cleared = there if names is None else list(names)
    if unknown := sorted(set(cleared) - set(there)):
        raise ValueError(f"cache: no {', '.join(unknown)} in {root}; there is {', '.join(there)}")
    for folder in (root / name for name in cleared):
        with locked(folder, None):
            # First, so that a kill from here on leaves unfinished data, not damaged data.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)
            Path(f"{folder}.lock").unlink(missing_ok=True)
    return cleared
