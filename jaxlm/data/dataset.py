"""Prepared data in the cache: tokenizer, shards, and the manifest that vouches for them."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.cache import MANIFEST, Manifest
from jaxlm.data.shards import TokenShards, damage
from jaxlm.strict import read_json


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Prepared data."""

    directory: Path
    train: TokenShards
    eval: TokenShards
    fingerprint: str
    """Identity of the tokens: the same tokens have the same, wherever they came from."""
    tokenizer_path: Path
    vocab_size: int
    """Ids of the tokenizer."""
    eos_id: int
    exhausted: bool
    """The source ended before max_tokens."""


def digest(values: Mapping[str, Any]) -> str:
    """16 hex digits of a hash of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def manifest_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Of the tokens, not of where they came from: copied or touched files give the same."""
    about = ("fingerprint", "source", "revision")
    return digest({name: value for name, value in manifest.items() if name not in about})


def open_dataset(folder: Path, vocab_size: int) -> Dataset:
    """A prepared dataset, each byte of it checked.

    Raises:
      ValueError: a file is damaged, or the model's `vocab_size` is too small.
    """
    manifest = None
    try:
        manifest = read_json(folder / MANIFEST, Manifest)
        problem = _find_problem(manifest, folder)
    except (FileNotFoundError, ValueError) as error:
        problem = f"{MANIFEST} was altered ({error})"
    if manifest is None or problem:
        raise ValueError(
            f"prepared data in {folder} is damaged: {problem}. Delete it with "
            f"`jaxlm cache clear {folder.name}`; the next run then prepares it anew"
        )
    tokenizer_path = folder / manifest["tokenizer"]["name"]
    check_vocabulary(str(tokenizer_path), manifest["vocab_size"], vocab_size)
    with contextlib.suppress(OSError):  # A cache that we may only read keeps no time of use.
        os.utime(folder / MANIFEST)
    splits = {
        split: TokenShards([folder / shard["name"] for shard in manifest[split]], manifest["dtype"])
        for split in ("train", "eval")
    }
    return Dataset(
        directory=folder,
        tokenizer_path=tokenizer_path,
        **splits,
        fingerprint=manifest["fingerprint"],
        vocab_size=manifest["vocab_size"],
        eos_id=manifest["eos_id"],
        exhausted=manifest["exhausted"],
    )


def _find_problem(manifest: Manifest, folder: Path) -> str | None:
    if manifest["fingerprint"] != manifest_fingerprint(manifest):
        return f"{MANIFEST} was altered"
    itemsize = np.dtype(manifest["dtype"]).itemsize
    for split in (manifest["train"], manifest["eval"]):
        if not split or not all(s["num_bytes"] == s["num_tokens"] * itemsize > 0 for s in split):
            return f"{MANIFEST} was altered (the sizes of the shards)"
    records = [manifest["tokenizer"], *manifest["train"], *manifest["eval"]]
    return next(filter(None, (damage(folder, record) for record in records)), None)


def check_vocabulary(what: str, found: int, vocab_size: int) -> None:
    """Refuses a tokenizer that has more ids than the model takes.

    Raises:
      ValueError: it has.
    """
    if found > vocab_size:
        raise ValueError(
            f"data.tokenizer {what}: has {found:,} tokens, and the model takes {vocab_size:,}: set "
            f"--model.vocab-size {found} or more, or choose another tokenizer"
        )
