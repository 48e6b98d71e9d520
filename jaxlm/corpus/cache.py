"""The cache of prepared data: its locks, listing and deletion."""

import contextlib
import glob
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import filelock

from jaxlm.data.dataset import (
    MANIFEST,
    Dataset,
    Record,
    Shard,
    open_dataset,
    verify_dataset,
)
from jaxlm.data.run_data import Prepared
from jaxlm.errors import FileError, InputError
from jaxlm.files.cache import ELSEWHERE, cache_root
from jaxlm.files.strict import read_json

_log = logging.getLogger(__name__)

PROGRESS = "progress.json"
DATA = "data"
"""Stands for all prepared datasets in a list of names."""


class Origin(TypedDict):
    """What a dataset was made of, as in MANIFEST."""

    source: str
    revision: str
    sizes: str
    """`Source.sizes`."""
    fingerprint: str


class _Counted(TypedDict):
    num_tokens: int


class _Listed(TypedDict):
    """What a list shows of a dataset, of another version too."""

    source: str
    train: list[_Counted]
    eval: list[_Counted]


class Progress(TypedDict):
    """Progress of a preparation, as in the file PROGRESS; MANIFEST has these fields too."""

    train: list[Shard]
    eval: list[Shard]
    revision: str
    next_document: int
    begun: int
    """Tokens of document `next_document` that are taken: a limit cut it."""
    stages: list[int]
    """Training tokens after each limit so far."""
    parts: dict[str, list[int]]
    """Part of the corpus -> its training and held-out tokens."""
    numbers: dict[str, list[Record]]
    """Split -> for each shard, the numbers of its documents in the source (uint64)."""
    documents: dict[str, int]
    """train, eval, empty or duplicate -> number of such documents."""
    eval_bytes: int
    tokenizer: Record | None


def data_folder(cache_dir: str | None) -> Path:
    """The folder of prepared data."""
    return cache_root(cache_dir) / DATA


def find_prepared(fingerprint: str, source: str, cache_dir: str | None = None) -> list[Path]:
    """The folders of complete datasets with this fingerprint, those of `source` first."""
    found = []
    for path in sorted(data_folder(cache_dir).glob(f"*/{MANIFEST}")):
        with contextlib.suppress(OSError, ValueError):
            origin = read_json(path, Origin)
            if origin["fingerprint"] == fingerprint:
                found.append((origin["source"] != source, path.parent))
    return [path for _, path in sorted(found)]


def open_recorded(
    recorded: Prepared, vocab_size: int, cache_dir: str | None = None
) -> Dataset | None:
    """The dataset of a run, if it is in the cache.

    Raises:
      ValueError: each such dataset is damaged.
    """
    damage = None
    for folder in find_prepared(recorded["fingerprint"], recorded["source"], cache_dir):
        try:
            return open_dataset(folder, vocab_size)
        except InputError as error:
            damage = damage or error
    if damage:
        raise damage
    return None


def list_caches(cache_dir: str | None = None) -> list[dict[str, Any]]:
    """The prepared datasets, unfinished ones included, sorted by name.

    Returns:
      For each `name`, `source`, `num_tokens`, `num_bytes`, `complete`, and `last_used_s`: the time
      of its last opening or write (seconds since 1970).
    """
    return [
        _describe(folder) for folder in sorted(data_folder(cache_dir).glob("*")) if folder.is_dir()
    ]


def _describe(folder: Path) -> dict[str, Any]:
    complete = (folder / MANIFEST).exists()
    path = folder / (MANIFEST if complete else PROGRESS)
    try:
        about = read_json(path, _Listed)
    except (FileNotFoundError, ValueError):
        about = {}
    files = [file for file in folder.iterdir() if file.suffix != ".tmp" and not file.is_dir()]
    shards = [*about.get("train", ()), *about.get("eval", ())]
    return {
        "name": folder.name,
        "source": about.get("source", "?"),
        "num_tokens": sum(shard["num_tokens"] for shard in shards),
        "num_bytes": sum(file.lstat().st_size for file in files),
        "complete": complete,
        "last_used_s": (path if path.exists() else folder).stat().st_mtime,
    }


def label(source: str) -> str:
    """The beginning of the name of a dataset's folder."""
    kind, _, rest = source.partition(":")
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{kind}-{rest[-30:]}").strip("-")


def make_once(
    folder: Path,
    make: Callable[[], None],
    meanwhile: Callable[[], Iterator[None]] = lambda: iter(()),
) -> None:
    """Makes a dataset that is not complete, while no other process does.

    If another process does, goes through `meanwhile` until that one ends.
    """
    if not (folder / MANIFEST).exists():
        with lock_data(folder, meanwhile):
            if not (folder / MANIFEST).exists():
                with started(folder):
                    make()


def lock_data(
    folder: Path, meanwhile: Callable[[], Iterator[None]]
) -> contextlib.AbstractContextManager[object]:
    """The lock beside a dataset, which ends with the process however that ends.

    Raises:
      OSError: the folder cannot be written; names the folder and the settings.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{folder}.lock").touch()
    except OSError as error:
        raise FileError(
            f"cache: cannot write to {folder.parent} ({error.strerror}); {ELSEWHERE}"
        ) from error
    lock = filelock.FileLock(f"{folder}.lock", poll_interval=0.1)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        _log.info(f"Another process is preparing {folder.name}: helping it, or waiting for it")
        for _ in meanwhile():
            with contextlib.suppress(filelock.Timeout):
                return lock.acquire(timeout=0)
        return lock.acquire()


@contextlib.contextmanager
def started(folder: Path) -> Iterator[None]:
    """Makes the folder of a dataset; an error removes the folder unless it has progress."""
    folder.mkdir(exist_ok=True)
    try:
        yield
    except ValueError:
        if not any(folder.glob("*.bin")):
            # A retry needs another source or other settings, and so another folder.
            (folder / PROGRESS).unlink(missing_ok=True)
        raise
    finally:
        if not ((folder / MANIFEST).exists() or (folder / PROGRESS).exists()):
            shutil.rmtree(folder, ignore_errors=True)


def find_caches(names: Sequence[str], cache_dir: str | None = None) -> list[str]:
    """The names of these datasets, each once; all for `DATA`.

    Raises:
      ValueError: there is no dataset of a name.
    """
    there = [entry["name"] for entry in list_caches(cache_dir)]
    if unknown := sorted({*names} - {*there, DATA}):
        raise InputError(
            f"cache: no {', '.join(unknown)} in {data_folder(cache_dir)}; there is "
            f"{', '.join(there) or 'nothing'}"
        )
    return there if DATA in names else sorted({*names})


def verify_cache(name: str, cache_dir: str | None = None) -> str | None:
    """What is wrong with a dataset, every byte of which is read; None for a sound one."""
    try:
        verify_dataset(data_folder(cache_dir) / name)
    except FileNotFoundError:
        return "unfinished, and so not verified"
    except (ValueError, OSError) as error:
        return f"damaged: {error}"
    return None


def clear_caches(names: Sequence[str], cache_dir: str | None = None) -> list[str]:
    """Deletes the datasets that `find_caches` finds; returns their names.

    Raises:
      ValueError: there is no dataset of a name, or one is being prepared.
    """
    found = find_caches(names, cache_dir)
    for folder in (data_folder(cache_dir) / name for name in found):
        try:
            with filelock.FileLock(f"{folder}.lock", timeout=0):
                # The manifest first: a kill then leaves unfinished data, not damaged data.
                (folder / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(folder)
                for beside in folder.parent.glob(f"{glob.escape(folder.name)}.*"):
                    beside.unlink(missing_ok=True)
        except filelock.Timeout as error:
            raise InputError(
                f"{folder.name}: another process is preparing it; wait, or stop that one first"
            ) from error
    return found
