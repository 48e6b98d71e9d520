"""Datasets of token files that exist already: checked once, linked, and never copied."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from tokenizers import Tokenizer

from jaxlm.config import DataConfig
from jaxlm.corpus import tokenizer as tokenizer_lib
from jaxlm.corpus.cache import data_folder, find_caches, label, make_once
from jaxlm.corpus.files import Source, files_revision, find_files
from jaxlm.corpus.prepare import FORMAT, TOKENS_VERSION, new_tokenizer
from jaxlm.corpus.splits import HOLD_OUT_EVERY, write_manifest, write_record
from jaxlm.corpus.token_files import (
    Kind,
    TokenFile,
    chunks,
    read_token_file,
    write_token_file,
)
from jaxlm.data.dataset import Dataset, digest, open_dataset
from jaxlm.data.shards import TokenShards, map_tokens
from jaxlm.errors import InputError
from jaxlm.files.publish import check_free, published
from jaxlm.terminal import prints_lines, progress

_log = logging.getLogger(__name__)


@prints_lines
def link_tokens(
    config: DataConfig,
    *,
    vocab_size: int,
    max_tokens: int,
    all_held_out: bool = False,
    recorded: tuple[str, str] | None = None,
) -> Dataset:
    """The dataset of `tokens:GLOB`; `Make` in data/run_data.py describes the arguments.

    All tokens are trained on but for the last documents of each file, which are held out: about one
    token of 20, and `data.eval_tokens` at most.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a file is of no known format, or its ids are not those of the tokenizer.
    """
    if config.tokenizer == "train":
        refuse_text(config)
    found = find_files(config.source, (".bin", ".npy"))
    paths = [Path(path) for path in found if not path.endswith(".idx")]
    tokenizer = new_tokenizer(None, config, vocab_size)
    recipe = [files_revision(map(str, paths)), config.eval_limit, all_held_out, TOKENS_VERSION]
    recipe += [tokenizer_lib.content_hash(tokenizer)]
    folder = data_folder(config.cache_dir) / f"{label(config.source)}-{digest(recipe)}"

    def make() -> None:
        _log.info(f"Checking the tokens of {config.source}, once")
        files = [read_token_file(path, tokenizer_lib.num_ids(tokenizer)) for path in paths]
        _link(folder, files, tokenizer, config, all_held_out)

    make_once(folder, make)
    return open_dataset(folder, vocab_size)


def refuse_text(config: DataConfig) -> Source:
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
    num_documents: int


def _link(
    folder: Path,
    files: Sequence[TokenFile],
    tokenizer: Tokenizer,
    config: DataConfig,
    all_held_out: bool,
) -> None:
    eos_id = tokenizer_lib.find_eos(tokenizer, config.eos_token)
    num_ids = tokenizer_lib.num_ids(tokenizer)
    if empty := [str(file.path) for file in files if not file.num_tokens]:
        raise InputError(f"data.source tokens: {empty[0]}: found no tokens; leave it out")
    if len(kinds := sorted({str(file.dtype) for file in files})) > 1:
        found = ", ".join(kinds)
        raise InputError(f"data.source {config.source}: found dtypes {found}, expected one")
    total = sum(file.num_tokens for file in files)
    with progress("Checking tokens", total) as advance:
        checked = [_check(file, eos_id, num_ids, advance) for file in files]
    limit = min(config.eval_limit, total if all_held_out else total // HOLD_OUT_EVERY)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for number, (file, crc32c, _) in enumerate(checked):
        (folder / f"{number:05}.bin").symlink_to(file.path.absolute())
        record = {"name": f"{number:05}.bin", "crc32c": crc32c}
        record |= {"num_bytes": file.path.stat().st_size}
        share = -(-limit * file.num_tokens // total)
        border = _border(file, share, eos_id)
        ranges = {"train": (0, border), "eval": (border, min(border + share, file.num_tokens))}
        for split, (start, stop) in ranges.items():
            if stop > start:
                offset = file.offset + start * file.dtype.itemsize
                splits[split].append(record | {"offset": offset, "num_tokens": stop - start})
    held_out = _shards(folder, splits["eval"], files[0].dtype)
    if not held_out.num_tokens:
        raise InputError(
            f"data.source {config.source}: found one document of {total:,} tokens, expected "
            f"several, each ended by {tokenizer.id_to_token(eos_id)}, since whole ones are held out"
        )
    num_documents = sum(file.num_documents for file in checked)
    num_held_out = sum(int((chunk == eos_id).sum()) for chunk in chunks(held_out))
    text = tokenizer.to_str(pretty=True).encode()
    manifest = {
        **{"source": config.source, "format": FORMAT, "revision": "", "sizes": ""},
        "tokenizer": write_record(folder / "tokenizer.json", text),
        "train": [] if all_held_out else splits["train"],
        "eval": splits["eval"],
        "numbers": {},
        "eval_bytes": _num_bytes(held_out, tokenizer, eos_id),
        "documents": {"train": num_documents - num_held_out, "eval": num_held_out},
        **{"vocab_size": num_ids, "eos_id": eos_id, "dtype": files[0].dtype.str},
        "exhausted": True,
    }
    write_manifest(folder, manifest)
    _log.info(f"{total:,} tokens in {num_documents:,} documents, in {len(files)} file(s)")


def _check(file: TokenFile, eos_id: int, num_ids: int, advance: Any) -> _Checked:
    tokens = TokenShards([map_tokens(*file[:4])])
    most, least, num_documents = -1, 0, 0
    for chunk in chunks(tokens):
        most, least = max(most, int(chunk.max())), min(least, int(chunk.min()))
        num_documents += int((chunk == eos_id).sum())
        advance(len(chunk))
    if least < 0 or most >= num_ids:
        raise InputError(
            f"data.source tokens: {file.path}: found the ids {least} to {most} as "
            f"{file.dtype.name}, expected 0 to {num_ids - 1}, those of data.tokenizer; name the "
            "tokenizer that made the file"
        )
    if not num_documents:
        raise InputError(
            f"data.source tokens: {file.path}: found no id {eos_id}, expected one at the end of "
            "each document; name the token that ends them with --data.eos_token"
        )
    if file.ends is not None and not (tokens_at(tokens, file.ends - 1) == eos_id).all():
        raise InputError(
            f"data.source tokens: {file.path}: found a document that does not end at id {eos_id}, "
            "expected each to; prepare it with the append-eod flag"
        )
    crc = google_crc32c.Checksum()
    with open(file.path, "rb") as data:
        while part := data.read(1 << 24):
            crc.update(part)
    return _Checked(file, int.from_bytes(crc.digest()), num_documents)


def tokens_at(tokens: TokenShards, places: np.ndarray) -> np.ndarray:
    """The tokens at these positions."""
    return tokens.windows(places, 1)[:, 0]


def _border(file: TokenFile, num_held_out: int, eos_id: int) -> int:
    # The first start of a document in the last `num_held_out` tokens, or that of the last document
    # if it is longer; the end of a file of one document.
    start = file.num_tokens - num_held_out
    if start <= 0:
        return 0
    is_end = map_tokens(*file[:4]) == eos_id
    starts = np.flatnonzero(is_end[:-1]) + 1
    later = starts[starts >= start]
    return int(later[0]) if len(later) else int(starts[-1]) if len(starts) else file.num_tokens


def _shards(folder: Path, records: Sequence[dict[str, Any]], dtype: np.dtype) -> TokenShards:
    return TokenShards(
        [map_tokens(folder / r["name"], dtype, r["offset"], r["num_tokens"]) for r in records]
    )


def _num_bytes(tokens: TokenShards, tokenizer: Tokenizer, eos_id: int) -> int:
    # Of the text of all tokens but the first, which no eval predicts.
    ids = np.concatenate([*chunks(tokens)])
    documents = np.split(ids[1:], np.flatnonzero(ids[1:] == eos_id) + 1)
    texts = tokenizer.decode_batch([document.tolist() for document in documents if len(document)])
    return sum(len(text.encode()) for text in texts)


def export_dataset(
    name: str, out: str, kind: Kind, cache_dir: str | None = None
) -> dict[Path, int]:
    """Writes prepared tokens to a new folder, as `train` and `val`, with the tokenizer.

    Returns:
      Path of each file of tokens -> number of tokens in it.

    Raises:
      ValueError: there is no such dataset, or `out` exists.
    """
    (found,) = find_caches([name], cache_dir)
    dataset = open_dataset(data_folder(cache_dir) / found, 2**31)
    target, written = check_free(out), dict[Path, int]()
    with published(target) as folder:
        shutil.copy(dataset.tokenizer_path, folder / "tokenizer.json")
        for split, tokens in {"train": dataset.train, "val": dataset.eval}.items():
            path = write_token_file(tokens, folder / split, kind, dataset.eos_id)
            written[target / path.name] = tokens.num_tokens
    return written
