"""Documents -> training and held-out tokens on disk; which documents are held out."""

import errno
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from tokenizers import Tokenizer

from jaxlm.corpus.cache import PROGRESS
from jaxlm.corpus.encode import prefix_bytes
from jaxlm.corpus.files import Document, Source
from jaxlm.data.dataset import MANIFEST, manifest_fingerprint
from jaxlm.errors import FileError
from jaxlm.files.durable import write_file

HOLD_OUT_EVERY = 20


def is_held_out(index: int) -> bool:
    """Whether document `index` is for evaluation: one of every 20, chosen by a hash.

    Of the first 20, it is the second, so that a corpus of two documents has one for each split.
    """
    block, place = divmod(index, HOLD_OUT_EVERY)
    chosen = hashlib.sha256(f"held out {block}".encode()).digest()[0] % HOLD_OUT_EVERY
    return place == (chosen if block else 1)


class Splits:
    """Tokens of both splits, on disk and still waiting for it; `progress` describes them."""

    def __init__(
        self,
        folder: Path,
        progress: dict[str, Any],
        eval_tokens: int,
        tokenizer: Tokenizer,
    ):
        self._limits = {"train": 0, "eval": eval_tokens}
        self.counts = {
            split: sum(shard["num_tokens"] for shard in progress[split]) for split in self._limits
        }
        self._waiting: dict[str, list[np.ndarray]] = {split: [] for split in self._limits}
        self._numbers: dict[str, list[int]] = {split: [] for split in self._limits}
        self._folder, self._progress, self._tokenizer = folder, progress, tokenizer

    def begin_stage(self, max_tokens: int) -> None:
        """Takes up to `max_tokens` to train on, or holds out all documents if that is 0.

        Stages after the first hold out nothing: best keeps its meaning.
        """
        self._limits["train"] = max_tokens
        if self._progress["stages"]:
            self._limits["eval"] = self.counts["eval"]

    def add(self, document: Document, ids: np.ndarray, *, is_duplicate: bool) -> None:
        """Adds the next document; one without ids is dropped.

        A held-out document is trained on if the held-out split is full. If the limit cuts a
        training document, its rest goes to the next stage.
        """
        progress, counts, number = self._progress, self.counts, self._progress["next_document"]
        held_out = not self._limits["train"] or is_held_out(number)
        split = "eval" if held_out and counts["eval"] < self._limits["eval"] else "train"
        begun, progress["begun"] = progress["begun"], 0
        left = self._limits[split] - counts[split]
        kept = ids[begun : begun + left]
        if split == "train" and begun + left < len(ids):
            progress["begun"] = begun + left
        else:
            progress["next_document"] += 1
        if not len(ids):
            progress["documents"]["duplicate" if is_duplicate else "empty"] += 1
            return
        if split == "eval":
            progress["eval_bytes"] += self._num_bytes(document, kept, len(ids))
        self._waiting[split].append(kept)
        if not begun:
            self._numbers[split].append(number)
            progress["documents"][split] += 1
        counts[split] += len(kept)
        counts_of_part = progress["parts"].setdefault(document.part, [0, 0])  # train, eval
        counts_of_part[split == "eval"] += len(kept)

    def _num_bytes(self, document: Document, kept: np.ndarray, num_ids: int) -> int:
        # Bytes of the text that an eval of the document predicts.
        num_bytes = document.num_bytes
        if len(kept) < num_ids:
            num_bytes = prefix_bytes(self._tokenizer, document, kept)
        if not self.counts["eval"]:  # no eval predicts the first token
            num_bytes -= prefix_bytes(self._tokenizer, document, kept[:1])
        return num_bytes

    def full(self) -> bool:
        """Whether the limit of training tokens is reached, or of held-out ones if none trains."""
        split = "train" if self._limits["train"] else "eval"
        return self.counts[split] >= self._limits[split]

    def num_waiting(self) -> int:
        """Number of tokens that are not on disk."""
        return sum(map(len, itertools.chain(*self._waiting.values())))

    def end_stage(self) -> None:
        """Writes what is waiting; a longer preparation begins with these tokens."""
        self.write()
        self._progress["stages"] = sorted({*self._progress["stages"], self.counts["train"]})
        write_json(self._folder / PROGRESS, self._progress)

    def write(self) -> None:
        """Writes the waiting tokens as a shard of each split, and the progress."""
        for split, arrays in self._waiting.items():
            if arrays:
                tokens = np.concatenate(arrays)
                path = self._folder / f"{split}-{len(self._progress[split]):05}.bin"
                # First the numbers: a kill in between leaves no shard without them.
                numbers = np.array(self._numbers[split], "<u8").tobytes()
                of_numbers = write_record(path.with_suffix(".numbers"), numbers)
                record = write_record(path, tokens.tobytes())
                self._progress[split].append(record | {"offset": 0, "num_tokens": len(tokens)})
                self._progress["numbers"][split].append(of_numbers)
            arrays.clear()
            self._numbers[split].clear()
        write_json(self._folder / PROGRESS, self._progress)


class Seen:
    """The documents so far, by a hash of their text: some 100 bytes of memory each."""

    def __init__(self, source: Source, num_documents: int):
        self._hashes = set[bytes]()
        for document in itertools.islice(source.documents(0), num_documents):
            self.has(document)

    def has(self, document: Document) -> bool:
        """Whether an equal document was asked for before."""
        name = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        known = name in self._hashes
        self._hashes.add(name)
        return known


def training_documents(source: Source) -> Iterator[Document]:
    """The documents of a source that are not held out."""
    for index, document in enumerate(source.documents(0)):
        if not is_held_out(index):
            yield document


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a complete dataset, with its fingerprint."""
    write_json(folder / MANIFEST, manifest | {"fingerprint": manifest_fingerprint(manifest)})


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes JSON atomically."""
    write_record(path, json.dumps(values, indent=1).encode())


def write_record(path: Path, data: bytes) -> dict[str, Any]:
    """Writes a file atomically; returns its record, for `find_shard_damage`."""
    try:
        write_file(path, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free
        raise FileError(
            error.errno,
            f"{error.strerror} while writing {len(data):,} bytes ({free:,} free): make room, or "
            "set another --data.cache-dir or JAXLM_CACHE; the same command keeps finished shards",
            str(path),
        ) from error
    return {"name": path.name, "num_bytes": len(data), "crc32c": google_crc32c.value(data)}
