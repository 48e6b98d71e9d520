"""Text -> token shards: resumable at any instant, published at once, checked at each use.

A dataset is a folder of the cache, named after its source and a hash of everything that determines
its content. It holds `tokenizer.json`, the shards and, written last, `manifest.json`: a folder
without one is unfinished, and its preparation resumes from `progress.json`.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from tokenizers import Tokenizer

from jaxlm.config import DataConfig
from jaxlm.corpus import tokenizer as tokenizer_lib
from jaxlm.corpus.cache import PROGRESS, Progress
from jaxlm.corpus.files import Document, Source
from jaxlm.corpus.sources import open_source
from jaxlm.data.dataset import (
    MANIFEST,
    check_vocabulary,
    find_shard_damage,
    manifest_fingerprint,
)
from jaxlm.errors import FileError, InputError
from jaxlm.files.durable import write_file
from jaxlm.files.strict import read_json
from jaxlm.terminal import can_draw, progress

_log = logging.getLogger(__name__)

FORMAT = 1
TOKENS_VERSION = 4
"""Part of the cache key: bump when the same source yields other tokens."""
SHARD_TOKENS = 2**25  # 64 MB of uint16; a kill loses the work on one shard at most
CHUNK_CHARS = 4_000_000
"""Text tokenized at once, on all cores."""
PIECE_CHARS = 500_000
"""A longer document is tokenized in pieces, on several cores; a cut may split a word."""
HOLD_OUT_EVERY = 20


def is_held_out(index: int) -> bool:
    """Whether document `index` is for evaluation: one of each 20, chosen by a hash.

    Of the first 20 it is the second, so that a corpus of two documents has one of each.
    """
    block, place = divmod(index, HOLD_OUT_EVERY)
    chosen = hashlib.sha256(f"held out {block}".encode()).digest()[0] % HOLD_OUT_EVERY
    return place == (chosen if block else 1)


def make_dataset(
    folder: Path,
    source: Source,
    config: DataConfig,
    vocab_size: int,
    max_tokens: int,
    all_held_out: bool,
) -> None:
    """Prepares the missing part of a dataset, and publishes it; arguments as of `Make`."""
    progress = _progress(folder, source)
    tokenizer_path = folder / "tokenizer.json"
    if not progress["tokenizer"]:
        new = _new_tokenizer(source, config, vocab_size)
        progress["tokenizer"] = _write(tokenizer_path, new.to_str(pretty=True).encode())
        _write_json(folder / PROGRESS, progress)
    tokenizer = tokenizer_lib.load_tokenizer(tokenizer_path)
    num_ids = tokenizer_lib.num_ids(tokenizer)
    eos_id = tokenizer_lib.find_eos(tokenizer, config.eos_token)
    # Special tokens in a document are encoded as text: they would act as control tokens.
    tokenizer.encode_special_tokens = True
    dtype = np.dtype("<u2" if num_ids <= 2**16 else "<u4")
    limits = {"train": max_tokens, "eval": config.eval_tokens}
    counts = {split: sum(shard["num_tokens"] for shard in progress[split]) for split in limits}
    waiting: dict[str, list[np.ndarray]] = {split: [] for split in limits}
    with _progress_bar(max_tokens) as show:
        # After a kill before the manifest, the limit may be reached already: read nothing.
        chunks = _chunks(source.documents(progress["next_document"]))
        while counts["train"] < max_tokens and (chunk := next(chunks, None)):
            texts = [document.text for document in chunk]
            for document, ids in zip(chunk, _encode(tokenizer, texts, eos_id, dtype), strict=True):
                held_out = all_held_out or is_held_out(progress["next_document"])
                split = "eval" if held_out and counts["eval"] < limits["eval"] else "train"
                kept = ids[: limits[split] - counts[split]]
                if split == "eval" and len(kept):
                    num_bytes = document.num_bytes
                    if len(kept) < len(ids):
                        num_bytes = prefix_bytes(tokenizer, document.text, len(kept))
                    if not counts["eval"]:  # no eval predicts the first token
                        num_bytes -= prefix_bytes(tokenizer, document.text, 1)
                    progress["eval_bytes"] += num_bytes
                waiting[split].append(kept)
                counts[split] += len(kept)
                of_part = progress["parts"].setdefault(document.part, [0, 0])
                of_part[split == "eval"] += len(kept)
                progress["next_document"] += 1
            show(counts["train"], source.share())
            if sum(map(len, itertools.chain(*waiting.values()))) >= SHARD_TOKENS:
                _write_shards(folder, progress, waiting)
    _check_corpus(config, source, progress["next_document"], all_held_out, **counts)
    _write_shards(folder, progress, waiting)
    manifest = progress | {
        "vocab_size": num_ids,
        "eos_id": eos_id,
        "dtype": dtype.str,
        "exhausted": counts["train"] < max_tokens,
    }
    _write_json(folder / MANIFEST, manifest | {"fingerprint": manifest_fingerprint(manifest)})
    (folder / PROGRESS).unlink()
    _log_parts(progress["parts"], None if manifest["exhausted"] else source.share())


def _log_parts(parts: dict[str, list[int]], share: float | None) -> None:
    total = sum(map(sum, parts.values()))
    for name, (train, held_out) in sorted(parts.items(), key=lambda part: -sum(part[1])):
        if len(parts) > 1:
            fraction = (train + held_out) / total
            _log.info(f"{fraction:6.1%}  {name}: {train:,} tokens and {held_out:,} held out")
    if share is not None:
        sample = f"a sample of the files was read, {share:.0%} of their bytes"
        read = sample if share else "the source was not read to its end"
        _log.info(f"{read}; a higher --data.max_tokens takes more")


def _progress(folder: Path, source: Source) -> dict[str, Any]:
    """Progress of an interrupted preparation if all of it is sound; else that of a new one."""
    fresh = {"source": source.name, "revision": source.revision, "format": FORMAT}
    fresh |= {"sizes": source.sizes, "next_document": 0, "parts": {}, "tokenizer": None}
    fresh |= {"train": [], "eval": [], "eval_bytes": 0}
    try:
        found = {**read_json(folder / PROGRESS, Progress)}
        shards = [*found["train"], *found["eval"]]
        problem = find_shard_damage(folder, filter(None, [found["tokenizer"], *shards]))
        if found["revision"] != fresh["revision"]:
            problem = f"the source was {found['revision']}, is {fresh['revision']}"
        counted = found["next_document"], found["eval_bytes"]
        if min([*counted, *(shard["num_tokens"] for shard in shards)]) < 0:
            problem = f"{PROGRESS} was altered"
        if problem is None:
            _log.info(f"Going on with the preparation, from document {found['next_document']:,}")
            return found
    except FileNotFoundError:
        return fresh
    except ValueError as error:
        problem = str(error)
    _log.info(f"Starting the preparation over: {problem}")
    shutil.rmtree(folder)
    folder.mkdir()
    return fresh


def _new_tokenizer(source: Source, config: DataConfig, vocab_size: int) -> Tokenizer:
    name = config.tokenizer
    if name != "train":
        tokenizer = tokenizer_lib.load_tokenizer(name)
        check_vocabulary(name, tokenizer_lib.num_ids(tokenizer), vocab_size)
        tokenizer_lib.mark_eos(tokenizer, tokenizer_lib.find_eos(tokenizer, config.eos_token))
        return tokenizer
    _log.info(f"Training a tokenizer of {vocab_size:,} tokens on {source.name}")
    return tokenizer_lib.train_tokenizer((d.text for d in training_documents(source)), vocab_size)


def training_documents(source: Source) -> Iterator[Document]:
    """The documents of a source that are not held out."""
    for index, document in enumerate(source.documents(0)):
        if not is_held_out(index):
            yield document


def _write_shards(
    folder: Path, progress: dict[str, Any], waiting: dict[str, list[np.ndarray]]
) -> None:
    for split, arrays in waiting.items():
        if any(map(len, arrays)):
            tokens = np.concatenate(arrays)
            path = folder / f"{split}-{len(progress[split]):05}.bin"
            record = _write(path, tokens.tobytes())
            progress[split].append(record | {"num_tokens": len(tokens)})
        arrays.clear()
    _write_json(folder / PROGRESS, progress)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    _write(path, json.dumps(values, indent=1).encode())


def _write(path: Path, data: bytes) -> dict[str, Any]:
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


def _check_corpus(
    config: DataConfig,
    source: Source,
    num_documents: int,
    all_held_out: bool,
    train: int,
    eval: int,
) -> None:
    if open_source(config).key != source.key:
        raise InputError(f"data.source {source.name}: changed while it was read; try again")
    if not (eval and (train or all_held_out)):
        raise InputError(
            f"{'corpus cannot be split' if train or eval else 'empty corpus'}: {source.name} has "
            f"{num_documents:,} documents, which gave {train:,} training and {eval:,} held-out "
            "tokens; expected at least 2 with text, since whole documents are held out: divide "
            "the text among .txt files, or lines of a .jsonl"
        )


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.text) + 1
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(
    tokenizer: Tokenizer, documents: list[str], eos_id: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The tokens of each document, with EOS at the end; an empty document has none."""
    pieces = [
        (number, text[start : start + PIECE_CHARS])
        for number, text in enumerate(documents)
        for start in range(0, len(text), PIECE_CHARS)
    ]
    texts = [piece for _, piece in pieces]
    ids = [[] for _ in documents]
    for (number, _), own in zip(
        pieces, tokenizer_lib.encode(tokenizer, texts, eos_id), strict=True
    ):
        ids[number] += own
    for own in ids:
        yield np.array([*own, eos_id] if own else [], dtype)


def prefix_bytes(tokenizer: Tokenizer, text: str, num_ids: int) -> int:
    """Bytes of the text that the first ids of its document stand for."""
    num_bytes = 0
    for start in range(0, len(text), PIECE_CHARS):
        piece = text[start : start + PIECE_CHARS]
        ends = [end for _, end in tokenizer.encode(piece, add_special_tokens=False).offsets]
        if num_ids <= len(ends):
            return num_bytes + len(piece[: ends[num_ids - 1]].encode())
        num_ids, num_bytes = num_ids - len(ends), num_bytes + len(piece.encode())
    return num_bytes


@contextlib.contextmanager
def _progress_bar(limit: int) -> Iterator[Callable[[int, float], None]]:
    """A bar in a terminal, else a line every 10 s.

    Yields:
      A function of tokens so far and fraction of the source read (0 to 1); the bar shows the larger
      share.
    """
    last_s, before = time.monotonic(), 0.0
    with progress("Preparing tokens", 1) as advance:

        def show(num_tokens: int, of_source: float) -> None:
            nonlocal last_s, before
            share = max(num_tokens / limit, of_source)
            advance(share - before)
            before = share
            if not can_draw(sys.stderr) and time.monotonic() - last_s >= 10:
                last_s = time.monotonic()
                _log.info(
                    f"Preparing tokens: {num_tokens:,} of at most {limit:,} ({share:.0%} done)"
                )

        yield show
