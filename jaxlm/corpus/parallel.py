"""Several processes prepare one dataset: one of them writes it, the others tokenize for it.

The writer holds the lock of the dataset. In the folder `parts` of the dataset, `position.json` says
where the writer is. `N.claim` marks the chunk whose first document is N as taken by a process, and
`N.ids` holds its tokens, of a helper. The processes may be on several hosts with a shared disk.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import google_crc32c
import numpy as np
from tokenizers import Tokenizer

from jaxlm.corpus import tokenizer as tokenizer_lib
from jaxlm.corpus.encode import chunks, encode_documents
from jaxlm.corpus.files import Source
from jaxlm.files.durable import write_file
from jaxlm.files.strict import read_json

PARTS = "parts"
_MAX_AHEAD = 32
"""Chunks that may wait for the writer."""
_WAIT_S = 60.0
"""Time that the writer waits, once, for a helper that may have died."""
_POLL_S = 0.02


class _Position(TypedDict):
    begin: int
    """First document of the first chunk of this writer."""
    at: int
    """First document of its chunk."""
    tokenizer: str
    """Hash of the tokenizer."""
    revision: str
    """Of the source."""


class Writer:
    """The tokens of chunks, tokenized here or by a helper.

    Args:
      folder: of the dataset.
      tokenizer: special tokens of a document are encoded as text.
      eos_id: ends each document.
      dtype: of the tokens.
      revision: of the source.
    """

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, eos_id: int, dtype: np.dtype, revision: str
    ):
        self._revision = revision
        self._parts = folder / PARTS
        self._tokenizer, self._eos_id, self._dtype = tokenizer, eos_id, dtype
        self._begin, self._patient = 0, True
        self._identity = tokenizer_lib.content_hash(tokenizer)
        shutil.rmtree(self._parts, ignore_errors=True)  # of a writer that was killed
        self._parts.mkdir(exist_ok=True)  # a helper may still write to it

    def begin(self, document: int) -> None:
        """Chunks are counted from this document on."""
        self._begin = document

    def encode(self, first: int, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each document of the chunk that begins with document `first`."""
        position = _Position(
            begin=self._begin, at=first, tokenizer=self._identity, revision=self._revision
        )
        write_file(self._parts / "position.json", json.dumps(position).encode())
        path, until_s = self._parts / f"{first}.ids", time.monotonic() + _WAIT_S
        claimed = not _claim(path)
        while claimed and self._patient and not path.exists():
            self._patient = time.monotonic() < until_s
            _idle()
        found = _read(path, len(texts), self._dtype) if claimed else None
        path.unlink(missing_ok=True)
        path.with_suffix(".claim").unlink(missing_ok=True)
        if found is None:
            found = [*encode_documents(self._tokenizer, texts, self._eos_id, self._dtype)]
        return found

    def close(self) -> None:
        """Tells the helpers to stop."""
        shutil.rmtree(self._parts, ignore_errors=True)


def help_writer(folder: Path, source: Source, eos_token: str | None) -> Iterator[None]:
    """Tokenizes chunks for the writer of a dataset, as long as one is at work.

    Yields:
      None after each chunk, and while there is nothing to do; never returns.
    """
    parts = folder / PARTS
    while True:
        while (position := _position(parts)) is None:
            yield _idle()
        yield from _help(folder, source, eos_token, position)
        while (now := _position(parts)) and now["begin"] == position["begin"]:
            yield _idle()


def _help(
    folder: Path, source: Source, eos_token: str | None, position: _Position
) -> Iterator[None]:
    parts, first = folder / PARTS, position["begin"]
    try:
        tokenizer = tokenizer_lib.load_encoder(folder / "tokenizer.json")
    except (OSError, ValueError):  # the writer has failed and removed it
        return
    found = tokenizer_lib.content_hash(tokenizer), source.revision
    if found != (position["tokenizer"], position["revision"]):
        return
    eos_id, dtype = tokenizer_lib.find_eos(tokenizer, eos_token), tokenizer_lib.dtype_of(tokenizer)
    for chunk in chunks(source.documents(first)):
        while (now := _position(parts)) and len([*parts.glob("*.ids")]) >= _MAX_AHEAD:
            yield _idle()
        if now is None or now["begin"] != position["begin"]:
            return
        path = parts / f"{first}.ids"
        if first > now["at"] and _claim(path):
            texts = [document.text for document in chunk]
            _write(path, [*encode_documents(tokenizer, texts, eos_id, dtype)])
        first += len(chunk)
        yield


def _idle() -> None:
    time.sleep(_POLL_S)


def _position(parts: Path) -> _Position | None:
    with contextlib.suppress(OSError, ValueError):  # not written yet, or removed already
        return read_json(parts / "position.json", _Position)
    return None


def _claim(path: Path) -> bool:
    # Whether this process got the claim.
    try:
        path.with_suffix(".claim").touch(exist_ok=False)
    except OSError:  # it is there, or the writer has ended
        return False
    return True


def _write(path: Path, documents: list[np.ndarray]) -> None:
    sizes = np.array([len(ids) for ids in documents], "<i8").tobytes()
    data = sizes + b"".join(ids.tobytes() for ids in documents)
    with contextlib.suppress(OSError):  # the writer has ended, or tokenizes the chunk itself
        write_file(path, data + google_crc32c.value(data).to_bytes(4, "little"))


def _read(path: Path, count: int, dtype: np.dtype) -> list[np.ndarray] | None:
    # None if the file is missing, damaged or of other documents.
    try:
        data = path.read_bytes()
    except OSError:
        return None
    data, checksum = data[:-4], data[-4:]
    if google_crc32c.value(data).to_bytes(4, "little") != checksum or len(data) < 8 * count:
        return None
    sizes = np.frombuffer(data, "<i8", count)
    ids = np.frombuffer(data, dtype, offset=8 * count)
    return np.split(ids, np.cumsum(sizes)[:-1]) if sizes.sum() == len(ids) else None
