"""Text -> token shards: resumable at any instant, published at once, checked at each use.

A dataset is a folder of the cache, named after its source and a hash of all that determines its
content. It holds `tokenizer.json`, the shards and, written last, `manifest.json`: a folder
without one is unfinished, and goes on from its `progress.json`.
"""

import contextlib
import hashlib
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rich.progress
from tokenizers import Tokenizer

from jaxlm.config import DataConfig
from jaxlm.data import tokenizer as tokenizer_lib
from jaxlm.data.cache import MANIFEST, PROGRESS, Progress, data_folder, locked
from jaxlm.data.dataset import (
    Dataset,
    check_vocabulary,
    digest,
    manifest_fingerprint,
    open_dataset,
)
from jaxlm.data.shards import damage, write_durably
from jaxlm.data.sources import Source, open_source
from jaxlm.strict import read_json

FORMAT = 1
SHARD_TOKENS = 2**25
"""Tokens that make a shard (64 MB of uint16); a kill loses the work on one at most."""
CHUNK_CHARS = 4_000_000
"""Text tokenized at once, on all cores."""
PIECE_CHARS = 500_000
"""A longer document is tokenized in pieces, to spread it over the cores; a cut splits one word."""
HOLD_OUT_EVERY = 20

Log = Callable[[str], object]


def default_max_tokens(config: DataConfig, num_tokens: int) -> int:
    """Training tokens to prepare for a run of `num_tokens`: 1% more, and at least 10 M."""
    return config.max_tokens or max(num_tokens + num_tokens // 100, 10_000_000)


def prepare(config: DataConfig, *, vocab_size: int, max_tokens: int, log: Log = print) -> Dataset:
    """The dataset of `config`, from the cache or made now.

    What is in the cache stays as it is: a remote source is not asked again.

    Args:
      config: what to read, and how to tokenize it.
      vocab_size: the model's; the size to train a tokenizer to, or the most that another may have.
      max_tokens: training tokens at most.
      log: takes lines for the user.

    Raises:
      ValueError: the corpus or the tokenizer does not fit, or a file of the cache is damaged.
      FileNotFoundError, ImportError, ConnectionError: source or tokenizer cannot be had.
      OSError: the disk is full.
    """
    source = open_source(config)
    recipe = _recipe(config, source, vocab_size, max_tokens)
    kind, _, rest = source.name.partition(":")
    label = re.sub(r"[^A-Za-z0-9]+", "-", f"{kind}-{rest[-30:]}").strip("-")
    folder = data_folder(config.cache_dir) / f"{label}-{digest(recipe)}"
    if not (folder / MANIFEST).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder, log):
            if not (folder / MANIFEST).exists():
                folder.mkdir(exist_ok=True)
                _Preparation(folder, source, config, vocab_size, max_tokens, log).run()
    return open_dataset(folder, vocab_size)


def _recipe(config: DataConfig, source: Source, vocab_size: int, max_tokens: int) -> dict[str, Any]:
    """All that determines the content, as far as it can be known without a network."""
    tokenizer = config.tokenizer
    if tokenizer == "train":
        tokenizer = f"train {vocab_size}"
    elif tokenizer_lib.local_tokenizer(tokenizer):
        tokenizer = tokenizer_lib.fingerprint(tokenizer_lib.load_tokenizer(tokenizer))
    fields = ("source", "split", "text_field", "eos_token", "eval_tokens")
    recipe = {name: getattr(config, name) for name in fields}
    return recipe | {
        "format": FORMAT, "key": source.key, "tokenizer": tokenizer, "max_tokens": max_tokens
    }  # fmt: skip


def is_held_out(index: int) -> bool:
    """Whether document `index` is for evaluation: one of each 20, chosen by a hash.

    Of the first 20 it is the second, so that a corpus of two documents has one of each.
    """
    block, place = divmod(index, HOLD_OUT_EVERY)
    chosen = hashlib.sha256(f"held out {block}".encode()).digest()[0] % HOLD_OUT_EVERY
    return place == (chosen if block else 1)


class _Preparation:
    """A dataset on its way to its manifest."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        config: DataConfig,
        vocab_size: int,
        max_tokens: int,
        log: Log,
    ) -> None:
        self.folder, self.source, self.config, self.log = folder, source, config, log
        self.vocab_size = vocab_size
        self.limits = {"train": max_tokens, "eval": config.eval_tokens}
        self.progress = self._resume()
        self.counts = {
            split: sum(shard["num_tokens"] for shard in self.progress[split])
            for split in self.limits
        }
        self.waiting: dict[str, list[np.ndarray]] = {split: [] for split in self.limits}

    def _resume(self) -> dict[str, Any]:
        """What an earlier preparation finished before it was stopped, if all of it is sound."""
        fresh = {"source": self.source.name, "revision": self.source.revision, "format": FORMAT}
        fresh |= {"next_document": 0, "tokenizer": None, "train": [], "eval": []}
        try:
            found = {**read_json(self.folder / PROGRESS, Progress)}
            shards = [*found["train"], *found["eval"]]
            records = filter(None, [found["tokenizer"], *shards])
            problem = next(filter(None, (damage(self.folder, each) for each in records)), None)
            if found["revision"] != fresh["revision"]:
                problem = f"the source was {found['revision']}, is {fresh['revision']}"
            if min([found["next_document"], *(shard["num_tokens"] for shard in shards)]) < 0:
                problem = f"{PROGRESS} was altered"
            if problem is None:
                self.log(f"Going on with the preparation, from document {found['next_document']:,}")
                return found
        except FileNotFoundError:
            return fresh
        except ValueError as error:
            problem = str(error)
        self.log(f"Starting the preparation over: {problem}")
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        return fresh

    def run(self) -> None:
        """Prepares what is not yet, and publishes."""
        tokenizer = self._tokenizer()
        eos_id = tokenizer_lib.find_eos(tokenizer, self.config.eos_token)
        # A special token spelled out in a document is text, never a boundary.
        tokenizer.encode_special_tokens = True
        dtype = np.dtype("<u2" if tokenizer_lib.num_ids(tokenizer) <= 2**16 else "<u4")
        with _progress_bar(self.limits["train"], self.log) as show:
            # Stopped between the last shard and the manifest: there is nothing left to read.
            chunks = _chunks(self.source.documents(self.progress["next_document"]))
            while not self._full() and (chunk := next(chunks, None)):
                for ids in _encode(tokenizer, chunk, eos_id, dtype):
                    self._take(ids)
                show(self.counts["train"])
                if sum(len(ids) for ids in itertools.chain(*self.waiting.values())) >= SHARD_TOKENS:
                    self._write_shards()
        self._check_corpus()
        self._write_shards()
        manifest = self.progress | {
            "vocab_size": tokenizer_lib.num_ids(tokenizer),
            "eos_id": eos_id,
            "dtype": dtype.str,
            "exhausted": not self._full(),
        }
        manifest["fingerprint"] = manifest_fingerprint(manifest)
        self._save(MANIFEST, manifest)
        (self.folder / PROGRESS).unlink()
        train, held_out = self.counts["train"], self.counts["eval"]
        self.log(f"Prepared {train:,} training and {held_out:,} held-out tokens in {self.folder}")

    def _full(self) -> bool:
        return self.counts["train"] >= self.limits["train"]

    def _save(self, name: str, values: dict[str, Any]) -> None:
        write_durably(self.folder / name, json.dumps(values, indent=1).encode())

    def _tokenizer(self) -> Tokenizer:
        path = self.folder / "tokenizer.json"
        if self.progress["tokenizer"]:
            return tokenizer_lib.load_tokenizer(path)
        name = self.config.tokenizer
        if name == "train":
            self.log(f"Training a tokenizer of {self.vocab_size:,} tokens on {self.source.name}")
            documents = enumerate(self.source.documents())
            training = (document for index, document in documents if not is_held_out(index))
            tokenizer = tokenizer_lib.train_tokenizer(training, self.vocab_size)
        else:
            tokenizer = tokenizer_lib.load_tokenizer(name)
            check_vocabulary(name, tokenizer_lib.num_ids(tokenizer), self.vocab_size)
        self.progress["tokenizer"] = write_durably(path, tokenizer.to_str(pretty=True).encode())
        self._save(PROGRESS, self.progress)
        return tokenizer

    def _take(self, ids: np.ndarray) -> None:
        """Adds the next document to its split, or what of it there is room for."""
        held_out = is_held_out(self.progress["next_document"])
        split = "eval" if held_out and self.counts["eval"] < self.limits["eval"] else "train"
        ids = ids[: self.limits[split] - self.counts[split]]
        self.waiting[split].append(ids)
        self.counts[split] += len(ids)
        self.progress["next_document"] += 1

    def _write_shards(self) -> None:
        for split, arrays in self.waiting.items():
            if any(map(len, arrays)):
                tokens = np.concatenate(arrays)
                name = f"{split}-{len(self.progress[split]):05}.bin"
                record = write_durably(self.folder / name, tokens.tobytes())
                self.progress[split].append(record | {"num_tokens": len(tokens)})
            arrays.clear()
        self._save(PROGRESS, self.progress)

    def _check_corpus(self) -> None:
        if open_source(self.config).key != self.source.key:
            raise ValueError(
                f"data.source {self.source.name}: changed while it was read; try again"
            )
        train, held_out = self.counts["train"], self.counts["eval"]
        if not (train and held_out):
            raise ValueError(
                f"{'corpus cannot be split' if train or held_out else 'empty corpus'}: "
                f"{self.source.name} has {self.progress['next_document']:,} documents, which gave "
                f"{train:,} training and {held_out:,} held-out tokens; expected at least 2 with "
                "text, since whole documents are held out: divide the text among .txt files, or "
                "lines of a .jsonl"
            )


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document) + 1
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(
    tokenizer: Tokenizer, documents: list[str], eos_id: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The tokens of each document, EOS at the end; none for one without text."""
    pieces = [
        [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]
        for text in documents
    ]
    flat = list(itertools.chain(*pieces))
    encodings = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    for own in pieces:
        ids = list(itertools.chain(*(next(encodings).ids for _ in own)))
        yield np.array([*ids, eos_id] if ids else [], dtype)


@contextlib.contextmanager
def _progress_bar(total: int, log: Log) -> Iterator[Callable[[int], None]]:
    """Gives what to call with the tokens so far: a bar in a terminal, else a line now and then."""
    if sys.stdout.isatty():
        with rich.progress.Progress(transient=True) as bar:
            task = bar.add_task("Preparing tokens", total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    last_s = time.monotonic()

    def show(done: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= 10:
            last_s = time.monotonic()
            log(f"Preparing tokens: {done:,} of at most {total:,} ({done / total:.0%})")

    yield show
