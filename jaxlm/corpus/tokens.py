"""Datasets of token files that exist already: checked once, linked, and never copied."""

import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from tokenizers import Tokenizer

from jaxlm.config import DataConfig
from jaxlm.corpus import tokenizer as tokenizer_lib
from jaxlm.corpus.cache import data_folder, label, make_once, open_recorded
from jaxlm.corpus.encode import bytes_of_ids
from jaxlm.corpus.files import files_revision
from jaxlm.corpus.prepare import FORMAT, TOKENS_VERSION, new_tokenizer
from jaxlm.corpus.splits import HOLD_OUT_EVERY, write_manifest, write_record
from jaxlm.corpus.stores import find_files, is_remote
from jaxlm.corpus.token_files import (
    TokenFile,
    map_file,
    read_token_file,
)
from jaxlm.data.dataset import Dataset, digest, open_dataset
from jaxlm.data.run_data import Prepared
from jaxlm.data.shards import TokenShards, map_tokens
from jaxlm.errors import InputError
from jaxlm.files.durable import crc32c
from jaxlm.terminal import prints_lines, progress

_log = logging.getLogger(__name__)

Ranges = list[tuple[int, int]]
"""Token positions of a file: (first, last plus one) each, ascending."""
_MAX_LOOK = 100_000
"""Documents of a file that may be looked at for holding out."""


@prints_lines
def link_tokens(
    config: DataConfig,
    *,
    vocab_size: int,
    limits: Sequence[int],
    recorded: Prepared | None = None,
    known: Dataset | None = None,
) -> Dataset:
    """The dataset of `tokens:GLOB`; `Make` in data/run_data.py describes the arguments.

    Of each file, the last documents that fit into its share are held out: one token of 20 in all,
    and `data.eval_tokens` at most. All others are trained on, whatever the limits are.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a file is of no known format, or its ids are not those of the tokenizer.
    """
    del known  # nothing is left to add
    if is_remote(config.source):
        raise InputError(
            f"data.source {config.source}: found files in a store, expected files on this machine, "
            "which are mapped; copy them to its disk"
        )
    if recorded and recorded["source"] == config.source:
        with contextlib.suppress(InputError):  # a file has moved or changed: see below
            if found := open_recorded(recorded, vocab_size, config.cache_dir):
                return found
    if config.tokenizer == "train":
        refuse_text(config)
    found = [f for f in find_files(config.source, (".bin", ".npy")) if not f.path.endswith(".idx")]
    paths = [Path(file.path) for file in found]
    if not paths:
        raise InputError(f"data.source {config.source}: found .idx alone, expected the .bin too")
    tokenizer = new_tokenizer(None, config, vocab_size)
    eos_id = tokenizer_lib.find_eos(tokenizer, config.eos_token)
    recipe = [files_revision(found), config.eval_limit, limits[-1] == 0, TOKENS_VERSION]
    recipe += [tokenizer_lib.content_hash(tokenizer), eos_id]
    folder = data_folder(config.cache_dir) / f"{label(config.source)}-{digest(recipe)}"

    def make() -> None:
        _log.info(f"Checking the tokens of {config.source}, once")
        files = [read_token_file(path, tokenizer_lib.num_ids(tokenizer)) for path in paths]
        _link(folder, files, tokenizer, config, eos_id, all_held_out=limits[-1] == 0)

    make_once(folder, make)
    return open_dataset(folder, vocab_size)


def refuse_text(config: DataConfig) -> NoReturn:
    """Refuses to read tokens as the text that a tokenizer is trained on.

    Raises:
      ValueError: always.
    """
    raise InputError(
        f"data.tokenizer: found {config.tokenizer}, expected the tokenizer that made "
        f"{config.source}: a tokenizer.json, or its name on the Hugging Face Hub"
    )


class _Checked(NamedTuple):
    file: TokenFile
    crc32c: int
    ends: np.ndarray
    """Position after the EOS of each document: int64."""


def _link(
    folder: Path,
    files: Sequence[TokenFile],
    tokenizer: Tokenizer,
    config: DataConfig,
    eos_id: int,
    *,
    all_held_out: bool,
) -> None:
    num_ids = tokenizer_lib.num_ids(tokenizer)
    total = sum(file.num_tokens for file in files)
    checked = _check_all(files, config, eos_id, num_ids, all_held_out)
    held_out_of = _hold_out(checked, total, config, all_held_out)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    documents = {"train": 0, "eval": 0}
    for number, (of, held_out) in enumerate(zip(checked, held_out_of, strict=True)):
        link = folder / f"{number:05}.bin"
        link.unlink(missing_ok=True)  # left by a kill
        link.symlink_to(of.file.path.absolute())
        record = {"name": link.name, "crc32c": of.crc32c, "num_bytes": os.path.getsize(link)}
        rest = [] if all_held_out else _others(held_out, of.file.num_tokens)
        for split, ranges in {"train": rest, "eval": held_out}.items():
            for start, stop in ranges:
                offset = of.file.offset + start * of.file.dtype.itemsize
                splits[split].append(record | {"offset": offset, "num_tokens": stop - start})
                first, last = np.searchsorted(of.ends, [start, stop], side="right").tolist()
                documents[split] += last - first
    held_out = _shards(folder, splits["eval"], files[0].dtype)
    record = write_record(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    manifest = {
        "source": config.source,
        "format": FORMAT,
        "revision": "",
        "sizes": "",
        "tokenizer": record,
        **splits,
        "numbers": {},
        "eval_bytes": _num_bytes(held_out, tokenizer, eos_id),
        "documents": documents,
        "stages": [sum(record["num_tokens"] for record in splits["train"])],
        "vocab_size": num_ids,
        "eos_id": eos_id,
        "dtype": files[0].dtype.str,
        "exhausted": True,
    }
    write_manifest(folder, manifest)
    ends = sum(len(of.ends) for of in checked)
    _log.info(f"{total:,} tokens in {ends:,} documents, in {len(files)} file(s)")


def _check_all(
    files: Sequence[TokenFile],
    config: DataConfig,
    eos_id: int,
    num_ids: int,
    all_held_out: bool,
) -> list[_Checked]:
    if empty := [str(file.path) for file in files if not file.num_tokens]:
        raise InputError(f"data.source tokens: {empty[0]}: found no tokens; leave it out")
    if len(kinds := sorted({str(file.dtype) for file in files})) > 1:
        found = ", ".join(kinds)
        raise InputError(f"data.source {config.source}: found dtypes {found}, expected one")
    with progress("Checking tokens", sum(file.num_tokens for file in files)) as advance:
        checked = [_check(file, eos_id, num_ids, advance) for file in files]
    lacking = [str(of.file.path) for of in checked if not len(of.ends)]
    if lacking and not all_held_out:
        raise InputError(
            f"data.source tokens: {lacking[0]}: found no id {eos_id}, expected one at the end of "
            "each document; name the token that ends them with --data.eos_token"
        )
    return checked


def _hold_out(
    checked: Sequence[_Checked], total: int, config: DataConfig, everything: bool
) -> list[Ranges]:
    """The held-out tokens of each file: the last documents that fit into its share."""
    limit = min(config.eval_limit, total if everything else total // HOLD_OUT_EVERY)
    borders = np.cumsum([0, *(of.file.num_tokens for of in checked)]) * limit // total
    shares = np.diff(borders).tolist()
    if everything:
        return [[(0, share)] for share in shares]
    found = [_last_documents(of, share) for of, share in zip(checked, shares, strict=True)]
    if not any(found):
        # All documents are longer: of the last one that is not the first of its file, a part.
        several = [number for number, of in enumerate(checked) if len(of.ends) > 1]
        if not several:
            raise InputError(
                f"data.source {config.source}: found one document a file, {total:,} tokens in all, "
                "expected several, since whole ones are held out"
            )
        ends = checked[several[-1]].ends
        start = int(ends[-2])
        found[several[-1]] = [(start, min(start + max(limit, 2), int(ends[-1])))]
        _log.info(
            f"data.source {config.source}: all documents are longer than the {limit:,} tokens to "
            "hold out; the last is trained on but for that many"
        )
    return found


def _last_documents(of: _Checked, share: int) -> Ranges:
    # From the end, each document that fits into what is left, until nine tenths are filled. The
    # first document of a file is trained on.
    found, left = [], share
    for number in range(len(of.ends) - 1, 0, -1)[:_MAX_LOOK]:
        start, stop = int(of.ends[number - 1]), int(of.ends[number])
        if stop - start <= left:
            found.append((start, stop))
            left -= stop - start
        if 10 * left < share:
            break
    return _merged(found[::-1])


def _merged(ranges: Ranges) -> Ranges:
    merged: Ranges = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = merged[-1][0], stop
        else:
            merged.append((start, stop))
    return merged


def _others(ranges: Ranges, num_tokens: int) -> Ranges:
    # The ranges between these.
    edges = [0, *(edge for both in ranges for edge in both), num_tokens]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


def _check(file: TokenFile, eos_id: int, num_ids: int, advance: Any) -> _Checked:
    # Reads the file twice: its ids, and its bytes for the checksum.
    tokens = TokenShards([map_file(file)])
    most, least, ends, start = -1, 0, [np.empty(0, np.int64)], 0
    for chunk in tokens.chunks():
        most, least = max(most, int(chunk.max())), min(least, int(chunk.min()))
        ends.append(np.flatnonzero(chunk == eos_id) + start + 1)
        start += len(chunk)
        advance(len(chunk))
    if least < 0 or most >= num_ids:
        raise InputError(
            f"data.source tokens: {file.path}: found the ids {least} to {most} as "
            f"{file.dtype.name}, expected 0 to {num_ids - 1}, those of data.tokenizer; name the "
            "tokenizer that made the file"
        )
    checked = _Checked(file, crc32c(file.path), np.concatenate(ends))
    # The last document may be cut.
    if file.ends is not None and not np.isin(file.ends[:-1], checked.ends).all():
        raise InputError(
            f"data.source tokens: {file.path}: found a document that does not end at id {eos_id}, "
            "expected each to; prepare it with Megatron's --append-eod"
        )
    return checked


def _shards(folder: Path, records: Sequence[dict[str, Any]], dtype: np.dtype) -> TokenShards:
    return TokenShards(
        [map_tokens(folder / r["name"], dtype, r["offset"], r["num_tokens"]) for r in records]
    )


def _num_bytes(tokens: TokenShards, tokenizer: Tokenizer, eos_id: int) -> int:
    # Of the text of all tokens but the first, which no eval predicts.
    ids = np.concatenate([*tokens.chunks()])[1:]
    if (sizes := bytes_of_ids(tokenizer)) is not None:
        return int(sizes[ids].sum())
    documents = np.split(ids, np.flatnonzero(ids == eos_id) + 1)
    texts = tokenizer.decode_batch([document.tolist() for document in documents if len(document)])
    return sum(len(text.encode()) for text in texts)
