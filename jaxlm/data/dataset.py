"""Prepared data in the cache: tokenizer, shards, and a manifest with their checksums."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pkgutil
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np

from jaxlm.config import Config, DataConfig
from jaxlm.data.shards import TokenShards
from jaxlm.errors import InputError
from jaxlm.files.durable import crc32c, write_file
from jaxlm.files.strict import read_json, shown

MANIFEST = "manifest.json"
# Kind of source -> function that makes its dataset, imported when a run has such a source.
_MAKERS: dict[str, str] = dict.fromkeys(
    ("embedded", "text", "hf", "tfds", "tfds_dir"), "jaxlm.corpus.prepared:find_or_make"
)


class Record(TypedDict):
    """Name, size and checksum of a file when it was written."""

    name: str
    num_bytes: int
    crc32c: int


class Shard(Record):
    """A record of token ids."""

    num_tokens: int


class Manifest(TypedDict):
    """Content of MANIFEST, of a complete dataset."""

    tokenizer: Record
    train: list[Shard]
    eval: list[Shard]
    vocab_size: int
    eos_id: int
    dtype: Literal["<u2", "<u4"]
    exhausted: bool
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Prepared data."""

    directory: Path
    train: TokenShards
    eval: TokenShards
    fingerprint: str
    """Identity of the tokens: equal for equal tokens of any source."""
    tokenizer_path: Path
    eos_id: int


def default_max_tokens(config: DataConfig, num_tokens: int) -> int:
    """Training tokens to prepare: `config.max_tokens`, else 1% more than the run, at least 10 M."""
    return config.max_tokens or max(num_tokens + num_tokens // 100, 10_000_000)


class Recorded(NamedTuple):
    """The data of a run, as a checkpoint of the run records it."""

    fingerprint: str
    config: DataConfig


def load_dataset(
    config: Config, recorded: Recorded | None = None, *, all_held_out: bool = False
) -> tuple[Config, Dataset]:
    """The config with `data.max_tokens` filled in, and its data: from the cache, or made now.

    Args:
      config: of a run. `vocab_size` of the model is the size of a trained tokenizer, and the limit
        for a given one.
      recorded: of a run that resumes: its prepared data is found by the fingerprint, even if the
        source has moved or is gone.
      all_held_out: hold out every document, to evaluate on all of a source.

    Raises:
      ValueError: the corpus or the tokenizer does not fit, or a file of the cache is damaged.
      FileNotFoundError, ImportError, ConnectionError: source or tokenizer is not available.
      OSError: the disk is full.
    """
    max_tokens = default_max_tokens(config.data, config.num_steps * config.tokens_per_step)
    data = dataclasses.replace(config.data, max_tokens=max_tokens)
    make = pkgutil.resolve_name(_MAKERS[data.source.partition(":")[0]])
    dataset = make(
        data,
        vocab_size=config.model.vocab_size,
        max_tokens=max_tokens,
        recorded=recorded,
        all_held_out=all_held_out,
    )
    return dataclasses.replace(config, data=data), dataset


def digest(values: Any) -> str:
    """16 hex digits of a hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def manifest_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Fingerprint of the tokens, whatever their source: copied or touched files give the same."""
    about = ("fingerprint", "source", "revision", "sizes", "parts")
    return digest({name: value for name, value in manifest.items() if name not in about})


def open_dataset(folder: Path, vocab_size: int) -> Dataset:
    """Opens a prepared dataset; a file is read in full if it is new or has another size or time.

    Raises:
      ValueError: a file is damaged, or the model's `vocab_size` is too small.
    """
    try:
        manifest = read_json(folder / MANIFEST, Manifest)
        _check(folder, manifest)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"prepared data in {folder} is damaged: {error}. Delete it with "
            f"`jaxlm cache clear {folder.name} --delete`; the next run then prepares it anew"
        ) from error
    tokenizer_path = folder / manifest["tokenizer"]["name"]
    check_vocabulary(str(tokenizer_path), manifest["vocab_size"], vocab_size)
    with contextlib.suppress(OSError):  # A read-only cache cannot record the time of use.
        os.utime(folder / MANIFEST)
    train, held_out = (
        TokenShards([folder / shard["name"] for shard in manifest[split]], manifest["dtype"])
        for split in ("train", "eval")
    )
    return Dataset(
        folder, train, held_out, manifest["fingerprint"], tokenizer_path, manifest["eos_id"]
    )


def verify_dataset(folder: Path) -> None:
    """Reads every byte of a dataset.

    Raises:
      FileNotFoundError: the dataset is unfinished.
      ValueError: a file is damaged.
    """
    _check(folder, read_json(folder / MANIFEST, Manifest), read_all=True)


def _check(folder: Path, manifest: Manifest, *, read_all: bool = False) -> None:
    shards = [*manifest["train"], *manifest["eval"]]
    itemsize = np.dtype(manifest["dtype"]).itemsize
    fit = [shard["num_bytes"] == shard["num_tokens"] * itemsize > 0 for shard in shards]
    if manifest["fingerprint"] != manifest_fingerprint(manifest) or not (
        all(fit) and manifest["eval"]
    ):
        raise InputError(f"{MANIFEST} was altered")
    known, records = list[str](), [manifest["tokenizer"], *shards]
    if not read_all:
        with contextlib.suppress(OSError, ValueError):
            known = read_json(checked_path(folder), list[str])
    stamps = {record["name"]: _stamp(folder, record) for record in records}
    unread = [record for record in records if stamps[record["name"]] not in known]
    if damage := find_shard_damage(folder, unread):
        with contextlib.suppress(OSError):
            checked_path(folder).unlink()
        raise InputError(damage)
    if unread:
        with contextlib.suppress(OSError):  # a read-only cache
            write_file(checked_path(folder), json.dumps([*stamps.values()]).encode())


def checked_path(folder: Path) -> Path:
    """The file that says which files of a dataset were read in full, with their sizes and times."""
    return Path(f"{folder}.checked")


def _stamp(folder: Path, record: Record) -> str | None:
    # What changes with the file or its record; None for a file that is damaged at a glance.
    if _glance(folder, record):
        return None
    found = (folder / record["name"]).stat()
    # Inode and change time: a copy keeps the other times, and may have lost a bit.
    stamps = found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
    return f"{record['name']} {' '.join(map(str, stamps))} {record['crc32c']:08x}"


def _glance(folder: Path, record: Record) -> str | None:
    # The difference between a file and its record, as far as it shows without reading.
    if not re.fullmatch(r"[\w-][\w.-]{,99}", record["name"]):
        return f"{shown(record['name'])} is not the name of a file in it"
    path = folder / record["name"]
    if not path.is_file():
        return f"{path.name} is missing"
    if (found := path.stat().st_size) != record["num_bytes"]:
        return f"{path.name} has {found:,} bytes, expected {record['num_bytes']:,}"
    return None


def find_shard_damage(folder: Path, records: Iterable[Record]) -> str | None:
    """The first difference between a file and its record, or None; reads every byte."""
    for record in records:
        if problem := _glance(folder, record):
            return problem
        crc = crc32c(folder / record["name"])
        if crc != record["crc32c"]:
            return f"{record['name']} has crc32c {crc:08x}, expected {record['crc32c']:08x}"
    return None


def check_vocabulary(what: str, found: int, vocab_size: int) -> None:
    """Refuses a tokenizer with more ids than the model's vocabulary.

    Raises:
      ValueError: the tokenizer has more ids.
    """
    if found > vocab_size:
        raise InputError(
            f"data.tokenizer {what}: has {found:,} tokens, and the model takes {vocab_size:,}: set "
            f"--model.vocab-size {found} or more, or choose another tokenizer"
        )
