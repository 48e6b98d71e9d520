"""Text -> token shards: resumable at any instant, published atomically, checked when opened.

A dataset is a folder of the cache, named after its source and a hash of everything that determines
its content. It holds `tokenizer.json`, the shards and, written last, `manifest.json`: a folder
without one is unfinished, and its preparation resumes from `progress.json`.
"""

import contextlib
import itertools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jaxlm.config import DataConfig
from jaxlm.corpus import tokenizer as tokenizer_lib
from jaxlm.corpus.cache import PROGRESS, Progress
from jaxlm.corpus.encode import chunks
from jaxlm.corpus.files import Document, Source
from jaxlm.corpus.parallel import Writer
from jaxlm.corpus.sources import open_source
from jaxlm.corpus.splits import (
    Seen,
    Splits,
    training_documents,
    write_json,
    write_manifest,
    write_record,
)
from jaxlm.data.dataset import MANIFEST, Dataset, check_vocabulary, find_shard_damage
from jaxlm.errors import InputError
from jaxlm.files.strict import read_json
from jaxlm.terminal import can_draw, progress

_log = logging.getLogger(__name__)

FORMAT = 1
TOKENS_VERSION = 5
"""Part of the cache key: bump when the same source yields other tokens."""
SHARD_TOKENS = 2**25  # 64 MB of uint16; a kill loses the work on one shard at most


def make_dataset(
    folder: Path,
    source: Source,
    config: DataConfig,
    vocab_size: int,
    limits: Sequence[int],
) -> None:
    """Prepares the missing part of a dataset, and publishes it; arguments as of `Make`.

    The tokens of each limit are the first of the next; all held-out tokens are of the first limit.
    """
    progress = _progress(folder, source)
    tokenizer_path = folder / "tokenizer.json"
    if not progress["tokenizer"]:
        new = new_tokenizer(source, config, vocab_size)
        progress["tokenizer"] = write_record(tokenizer_path, new.to_str(pretty=True).encode())
        write_json(folder / PROGRESS, progress)
    tokenizer = tokenizer_lib.load_encoder(tokenizer_path)
    num_ids = tokenizer_lib.num_ids(tokenizer)
    eos_id = tokenizer_lib.find_eos(tokenizer, config.eos_token)
    dtype = tokenizer_lib.dtype_of(tokenizer)
    splits, max_tokens = Splits(folder, progress, config.eval_limit, tokenizer), limits[-1]
    share = 0.0
    with (
        _progress_bar(max_tokens or config.eval_limit) as show,
        contextlib.closing(
            Writer(folder, tokenizer, eos_id, dtype, progress["revision"])
        ) as writer,
    ):
        for limit in limits:
            splits.begin_stage(limit)
            seen = Seen(source, progress["next_document"]) if config.drop_duplicates else None
            for chunk in _next_chunks(source, splits, writer, progress):
                first = progress["next_document"]
                again = [seen is not None and seen.has(document) for document in chunk]
                all_ids = writer.encode(first, [document.text for document in chunk])
                for document, ids, old in zip(chunk, all_ids, again, strict=True):
                    if not splits.full():
                        splits.add(document, ids[:0] if old else ids, is_duplicate=old)
                share = _share(source, share, first, progress["next_document"], len(chunk))
                show(splits.counts["train" if max_tokens else "eval"], share)
                if splits.num_waiting() >= SHARD_TOKENS:
                    splits.write()
            splits.end_stage()
    _check_corpus(config, source, progress["next_document"], not max_tokens, **splits.counts)
    manifest = progress | {
        "vocab_size": num_ids,
        "eos_id": eos_id,
        "dtype": dtype.str,
        "exhausted": not splits.full(),
    }
    write_manifest(folder, manifest)
    (folder / PROGRESS).unlink()
    _log_parts(progress["parts"])
    if not manifest["exhausted"]:
        field = "max_tokens" if max_tokens else "eval_tokens"
        of_bytes = f", some {share:.1%} of its bytes" if share else ""
        _log.info(
            f"{source.name}: data.{field} ended the preparation after "
            f"{progress['next_document']:,} documents{of_bytes}; a higher limit takes more"
        )


def _next_chunks(
    source: Source, splits: Splits, writer: Writer, progress: dict[str, Any]
) -> Iterator[list[Document]]:
    # The remaining chunks. Reads nothing if the limit is reached: a kill may come between the last
    # shard and the manifest.
    if not splits.full():
        writer.begin(progress["next_document"])
        for chunk in chunks(source.documents(progress["next_document"])):
            yield chunk
            if splits.full():
                return


def _share(source: Source, before: float, first: int, now: int, count: int) -> float:
    # Share of the source up to document `now`; the chunk from document `first` is read to its end.
    if not before:  # the documents before the first chunk were read with it
        before = source.share() * first / (first + count)
    return before + (source.share() - before) * (now - first) / count


def take_over(folder: Path, known: Dataset, source: Source) -> None:
    """Hard-links the files of a dataset as the beginning of a new preparation.

    If the files of the source have moved or were written again, nothing is linked: only the tokens
    can show whether their text is the same.

    Raises:
      ValueError: the files have other sizes.
    """
    if (folder / PROGRESS).exists():
        return
    progress = {**read_json(known.directory / MANIFEST, Progress)}
    if progress["revision"] != source.revision:
        if progress["sizes"] != source.sizes or not source.sizes:
            raise InputError(f"data.source {source.name}: its text has changed since")
        _log.info(
            f"{source.name}: its files have moved or were written again, so they are prepared from "
            "the beginning and compared"
        )
        return
    for name in known.stamps:
        target = folder / name
        target.unlink(missing_ok=True)  # left by a kill
        try:
            target.hardlink_to(known.directory / name)
        except OSError:  # a file system without hard links
            shutil.copy(known.directory / name, target)
    write_json(folder / PROGRESS, progress)


def _log_parts(parts: dict[str, list[int]]) -> None:
    total = sum(map(sum, parts.values()))
    for name, (train, held_out) in sorted(parts.items(), key=lambda part: -sum(part[1])):
        if len(parts) > 1:
            fraction = (train + held_out) / total
            _log.info(f"{fraction:6.1%}  {name}: {train:,} tokens and {held_out:,} held out")


def _progress(folder: Path, source: Source) -> dict[str, Any]:
    """Progress of an interrupted preparation if all of it is sound; else that of a new one."""
    fresh = {"source": source.name, "revision": source.revision, "format": FORMAT}
    fresh |= {"sizes": source.sizes, "next_document": 0, "begun": 0, "stages": [], "parts": {}}
    fresh |= {
        "tokenizer": None,
        "train": [],
        "eval": [],
        "numbers": {"train": [], "eval": []},
        "eval_bytes": 0,
    }
    fresh |= {"documents": dict.fromkeys(("train", "eval", "empty", "duplicate"), 0)}
    try:
        found = {**read_json(folder / PROGRESS, Progress)}
        shards = [*found["train"], *found["eval"]]
        numbers = itertools.chain.from_iterable(found["numbers"].values())
        problem = find_shard_damage(folder, filter(None, [found["tokenizer"], *shards, *numbers]))
        if found["revision"] != fresh["revision"]:
            problem = f"the source was {found['revision']}, is {fresh['revision']}"
        counted = found["next_document"], found["begun"], found["eval_bytes"], *found["stages"]
        if min([*counted, *(shard["num_tokens"] for shard in shards)]) < 0:
            problem = f"{PROGRESS} was altered"
        if problem is None:
            _log.info(f"{source.name}: reading on from document {found['next_document']:,}")
            return found
    except FileNotFoundError:
        return fresh
    except ValueError as error:
        problem = str(error)
    _log.info(f"Starting the preparation over: {problem}")
    shutil.rmtree(folder, ignore_errors=True)  # a helper may write to it
    folder.mkdir(exist_ok=True)
    return fresh


def new_tokenizer(source: Source | None, config: DataConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer of a config; without a source, `data.tokenizer` must name one."""
    name = config.tokenizer
    if name != "train" or source is None:
        tokenizer = tokenizer_lib.load_tokenizer(name)
        check_vocabulary(name, tokenizer_lib.num_ids(tokenizer), vocab_size)
        tokenizer_lib.mark_eos(tokenizer, tokenizer_lib.find_eos(tokenizer, config.eos_token))
        return tokenizer
    _log.info(f"Training a tokenizer of {vocab_size:,} tokens on {source.name}")
    return tokenizer_lib.train_tokenizer((d.text for d in training_documents(source)), vocab_size)


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
