"""Prepared data in the cache: tokenizer, shards, and a manifest with their checksums."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from jaxlm.data.shards import TokenShards, map_tokens
from jaxlm.errors import InputError
from jaxlm.files.durable import crc32c, write_file
from jaxlm.files.strict import read_json, shown

MANIFEST = "manifest.json"


class Record(TypedDict):
    """Name, size and checksum of a file when it was written."""

    name: str
    num_bytes: int
    crc32c: int


class Shard(Record):
    """Token ids in a file, which may hold more."""

    offset: int
    """Bytes of the file before the first id."""
    num_tokens: int


class Manifest(TypedDict):
    """Content of MANIFEST, of a complete dataset."""

    source: str
    tokenizer: Record
    train: list[Shard]
    eval: list[Shard]
    numbers: dict[str, list[Record]]
    """Split -> files with the numbers of its documents in the source (uint64), one a shard."""
    eval_bytes: int
    """Bytes of the text of the held-out tokens, but for the first, which no eval predicts."""
    stages: list[int]
    """Training tokens after each limit: the data of a run grows with its plan."""
    vocab_size: int
    eos_id: int
    dtype: Literal["|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8"]
    exhausted: bool
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Prepared data."""

    directory: Path
    source: str
    train: TokenShards
    eval: TokenShards
    stages: list[int]
    """Training tokens after each limit of the preparation."""
    exhausted: bool
    """Whether the source has no more text."""
    eval_bytes: int
    """Bytes of text that an eval of `eval` predicts."""
    fingerprint: str
    """Identity of the tokens: equal for equal tokens of any source."""
    eval_fingerprint: str
    """Identity of the held-out tokens, which stay as they are when the others grow."""
    stamps: Mapping[str, str]
    """Name of a file -> its size and time when it was opened."""
    tokenizer_path: Path
    eos_id: int


def digest(values: Any) -> str:
    """16 hex digits of a hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def manifest_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Fingerprint of the tokens, whatever their source: copied or touched files give the same."""
    about = ("fingerprint", "source", "revision", "sizes", "parts", "documents")
    return digest({name: value for name, value in manifest.items() if name not in about})


def open_dataset(folder: Path, vocab_size: int) -> Dataset:
    """Opens a prepared dataset; a file is read in full if it is new or has another size or time.

    Raises:
      ValueError: a file is damaged, or the model's `vocab_size` is too small.
    """
    try:
        manifest = read_json(folder / MANIFEST, Manifest)
        names = _check(folder, manifest)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(
            f"prepared data in {folder} is damaged: {error}. Delete it with `jaxlm cache clear "
            f"{folder.name} --delete --cache_dir {folder.parents[1]}`; the next run then prepares "
            "it anew"
        ) from error
    tokenizer_path = folder / manifest["tokenizer"]["name"]
    check_vocabulary(str(tokenizer_path), manifest["vocab_size"], vocab_size)
    with contextlib.suppress(OSError):  # A read-only cache cannot record the time of use.
        os.utime(folder / MANIFEST)
    train, held_out = (
        TokenShards(
            [
                map_tokens(folder / of["name"], manifest["dtype"], of["offset"], of["num_tokens"])
                for of in manifest[split]
            ]
        )
        for split in ("train", "eval")
    )
    return Dataset(
        directory=folder,
        source=manifest["source"],
        train=train,
        eval=held_out,
        stages=manifest["stages"],
        exhausted=manifest["exhausted"],
        eval_bytes=manifest["eval_bytes"],
        fingerprint=manifest["fingerprint"],
        eval_fingerprint=digest([manifest["tokenizer"], manifest["eval"], manifest["eval_bytes"]]),
        stamps={name: _file_stamp(folder / name) for name in names},
        tokenizer_path=tokenizer_path,
        eos_id=manifest["eos_id"],
    )


def begins_with(dataset: Dataset, known: Dataset) -> bool:
    """Whether a dataset has the tokens of another one, and only training tokens after them."""
    more, less = (read_json(of.directory / MANIFEST, Manifest) for of in (dataset, known))
    same = dataset.eval_fingerprint == known.eval_fingerprint
    return same and more["train"][: len(less["train"])] == less["train"]


def verify_dataset(folder: Path) -> None:
    """Reads every byte of a dataset.

    Raises:
      FileNotFoundError: the dataset is unfinished.
      ValueError: a file is damaged.
    """
    _check(folder, read_json(folder / MANIFEST, Manifest), read_all=True)


def find_change(dataset: Dataset) -> Path | None:
    """A file that has changed since the dataset was opened: batches are read from the files."""
    for name, stamp in dataset.stamps.items():
        path = dataset.directory / name
        if not path.is_file() or _file_stamp(path) != stamp:
            return path.resolve()
    return None


def _file_stamp(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"


def _check(folder: Path, manifest: Manifest, *, read_all: bool = False) -> list[str]:
    # Returns the names of its files.
    shards = [*manifest["train"], *manifest["eval"]]
    itemsize = np.dtype(manifest["dtype"]).itemsize
    fit = [
        of["num_tokens"] > 0 <= of["offset"] <= of["num_bytes"] - of["num_tokens"] * itemsize
        for of in shards
    ]
    total = sum(shard["num_tokens"] for shard in manifest["train"])
    stages = manifest["stages"]
    grows = stages == sorted({*stages}) and stages[-1:] == [total]
    if manifest["fingerprint"] != manifest_fingerprint(manifest) or not (
        all(fit) and manifest["eval"] and grows
    ):
        raise InputError(f"{MANIFEST} was altered")
    records = records_of(manifest)
    known = list[str]()
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
    return [*stamps]


def records_of(manifest: Manifest) -> list[Record]:
    """The files of a dataset, each once: a file of tokens may hold a part of both splits."""
    shards = [*manifest["train"], *manifest["eval"]]
    named = [manifest["tokenizer"], *shards, *itertools.chain(*manifest["numbers"].values())]
    return [*{record["name"]: record for record in named}.values()]


def checked_path(folder: Path) -> Path:
    """The file that says which files of a dataset were read in full, with their sizes and times."""
    return Path(f"{folder}.checked")


def _stamp(folder: Path, record: Record) -> str | None:
    # What changes with the file or its record; None for a file that is damaged at a glance.
    if _glance(folder, record):
        return None
    path = folder / record["name"]
    # Inode and change time: a copy keeps the other times, and may have lost a bit.
    times = f"{_file_stamp(path)} {path.stat().st_ctime_ns}"
    return f"{record['name']} {times} {record['crc32c']:08x}"


def _glance(folder: Path, record: Record) -> str | None:
    # The difference between a file and its record, as far as it shows without reading.
    if not re.fullmatch(r"[\w-][\w.-]{,99}", record["name"]):
        return f"{shown(record['name'])} is not the name of a file in it"
    path = folder / record["name"]
    if not path.is_file():
        return f"{os.path.realpath(path) if path.is_symlink() else path.name} is missing"
    if (found := path.stat().st_size) != record["num_bytes"]:
        return f"{path.name} has {found:,} bytes, expected {record['num_bytes']:,}"
    return None


def find_shard_damage(
    folder: Path, records: Iterable[Record], rest: Callable[[float], None] = lambda _: None
) -> str | None:
    """The first difference between a file and its record, or None; reads every byte.

    `rest` is as in `crc32c`.
    """
    for record in records:
        if problem := _glance(folder, record):
            return problem
        crc = crc32c(folder / record["name"], rest=rest)
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
