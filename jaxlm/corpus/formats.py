"""Readers of one file of documents: plain text, jsonl, parquet, compressed too."""

import codecs
import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from io import BufferedReader
from typing import Any, BinaryIO, NamedTuple, cast

from jaxlm.corpus.stores import File, opened
from jaxlm.errors import InputError
from jaxlm.extras import needs


class Block(NamedTuple):
    """A part of a file: the lines that begin in a range of bytes, or a row group of a .parquet."""

    path: str
    start: int
    """First byte, or number of the row group."""
    stop: int | None
    """End of the range of bytes; None for the end of the file."""
    num_bytes: int
    """Size in the file."""


ReadTexts = Callable[[BinaryIO, str, Block], Iterator[str]]
"""An open file, the field that holds the text, and a block -> the documents of the block."""

SECTION_CHARS = 20_000
"""Longer plain text is split into several documents, at blank lines."""
BLOCK_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 20
_BATCH_ROWS = 64
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
_NO_TEXT = frozenset(
    ".7z .a .arrow .avi .bin .bmp .bz .class .ckpt .db .dll .doc .docx .epub .exe .feather .gif "
    ".h5 .hdf5 .ico .jar .jpeg .jpg .lz4 .mkv .mov .mp3 .mp4 .npy .npz .o .odt .ogg .orc .otf .pdf "
    ".pickle .pkl .png .ppt .pptx .pt .pth .pyc .rar .safetensors .so .sqlite .tar .tfrecord .tgz "
    ".tif .tiff .ttf .wav .webm .webp .whl .woff .woff2 .xls .xlsx .xz .zip".split()
)
_ROWS = (".csv", ".json", ".tsv")
_UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def kind_of(path: str) -> str:
    """The suffix of a file's kind, without that of its compression."""
    stem, suffix = os.path.splitext(path.lower())
    return os.path.splitext(stem)[1] if suffix in _COMPRESSED else suffix


def reader_of(path: str) -> ReadTexts:
    """The reader of a file, by its name: of rows, or of plain text.

    Raises:
      ValueError: the name is of another kind of file.
    """
    kind, packed = kind_of(path), os.path.splitext(path.lower())[1] in _COMPRESSED
    if packed and kind in (".parquet", *_COMPRESSED):
        problem = f"is {kind} compressed once more; unpack it"
    elif kind in _NO_TEXT:
        problem = f"holds no text by its name ({kind}); convert it to .txt or .jsonl"
    elif kind in _ROWS:
        problem = f"holds rows in {kind}; make it .jsonl (one object a line) or .parquet"
    else:
        return READERS.get(kind, _read_sections)
    raise InputError(
        f"data.source: {path} {problem}, or leave it out by a pattern such as *.txt. Expected are "
        f"{', '.join(READERS)} or other files of plain text, all but .parquet perhaps with "
        f"{', '.join(_COMPRESSED)} after it"
    )


def blocks_of(file: File) -> list[Block]:
    """The blocks of a file, which together hold each of its documents once.

    Raises:
      ValueError: the file is damaged.
    """
    path, size, _ = file
    if os.path.splitext(path.lower())[1] in _COMPRESSED:  # can be read from its beginning alone
        return [Block(path, 0, None, size)]
    if kind_of(path) == ".parquet":
        with opened(path) as stream, _parquet(stream, path) as table:
            count = table.num_row_groups
        return [Block(path, group, None, size // count) for group in range(count)]
    starts = range(0, size, BLOCK_BYTES)
    ranges = ((start, min(start + BLOCK_BYTES, size)) for start in starts)
    return [Block(path, start, stop, stop - start) for start, stop in ranges]


def _lines(file: BinaryIO, block: Block) -> Iterator[tuple[int, bytes]]:
    # Offset and line, of the lines that begin in the block.
    path, stream = block.path, cast(Any, file)
    if codec := _COMPRESSED.get(os.path.splitext(path.lower())[1]):
        # Not fsspec, which takes a truncated .zst for a complete one.
        stream = needs("pyarrow", path).input_stream(file, compression=codec)
    with BufferedReader(stream, _BUFFER_BYTES) as lines:
        try:
            offset = block.start
            if block.start:  # The line across the start belongs to the block before.
                lines.seek(block.start - 1)
                offset += len(lines.readline(BLOCK_BYTES + 1)) - 1
            while block.stop is None or offset < block.stop:
                if not (line := lines.readline()):
                    return
                yield offset, line
                offset += len(line)
        except OSError as error:
            raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> ValueError:
    return InputError(f"{path}: damaged or cut short ({error}); get it anew")


def _read_sections(file: BinaryIO, field: str, block: Block) -> Iterator[str]:
    del field  # all of the file is text
    lines = list(_lines(file, block))
    if not lines:
        return
    data = b"".join(line for _, line in lines)
    text, start = _text(data, block.path, lines[0][0]), 0
    for blank in re.finditer(r"\n\s*\n", text):
        if blank.start() - start >= SECTION_CHARS and len(text) - blank.end() >= SECTION_CHARS:
            yield text[start : blank.start()]
            start = blank.end()
    yield text[start:]


def _read_jsonl(file: BinaryIO, field: str, block: Block) -> Iterator[str]:
    path = block.path
    for number, (offset, line) in enumerate(_lines(file, block), 1):
        if text := _text(line, path, offset).strip():
            line_at = f"line {number}" if not block.start else f"line at byte {offset}"
            where = f"{path} {line_at}"
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not JSON ({error}); mend it") from error
            yield text_of(row, field, where)


def _read_parquet(file: BinaryIO, field: str, block: Block) -> Iterator[str]:
    path = block.path
    with _parquet(file, path) as table:
        names = [table.schema.column(index).path for index in range(len(table.schema))]
        if field not in names:
            raise _no_field(path, field, names)
        batches = table.iter_batches(
            _BATCH_ROWS, row_groups=[block.start], columns=[field], use_threads=False
        )
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, row in enumerate(rows):
            yield text_of(row, field, f"{path} row group {block.start}, row {number}")


@contextlib.contextmanager
def _parquet(file: BinaryIO, path: str) -> Iterator[Any]:
    parquet = needs("pyarrow.parquet", path)
    # None of these names the file.
    damage = OSError, UnicodeDecodeError, needs("pyarrow", path).ArrowInvalid
    try:
        # A buffer and small batches: a row group may be larger than the memory.
        with parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
            yield table
    except damage as error:
        raise _damaged(path, error) from error


READERS: dict[str, ReadTexts] = {
    ".txt": _read_sections,
    ".md": _read_sections,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
}
"""Kind -> reader, of files that a folder may hold; a pattern may name files of other kinds."""


def text_of(row: Any, field: str, where: str) -> str:
    """The text of a row; a null is an empty document.

    Args:
      row: names -> values.
      field: a name, or a path such as meta.text through rows within it.
      where: place of the row, for the message.

    Raises:
      ValueError: there is no such field, or its value is no text.
    """
    try:
        text = _value(row, field)
    except KeyError as error:
        raise _no_field(where, field, _names(row)) from error
    if isinstance(text, bytes):
        return _decode(text, where, 0)
    text = "" if text is None else text
    if not isinstance(text, str):
        raise InputError(f"{where}: field {field!r} holds {text!r:.80}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may hold a lone surrogate
        raise InputError(
            f"{where}: field {field!r} holds half of a character, "
            f"\\u{ord(text[error.start]):x}, at {error.start}; mend that row, or leave it out"
        ) from error
    return text


def _value(row: Any, field: str) -> Any:
    if isinstance(row, dict):
        if field in row:
            return row[field]
        name, _, rest = field.partition(".")
        if rest and name in row:
            return None if row[name] is None else _value(row[name], rest)
    raise KeyError(field)


def _names(row: Any) -> Any:
    if not isinstance(row, dict):
        return row
    inner = [[f"{k}.{name}" for name in v] if isinstance(v, dict) else [k] for k, v in row.items()]
    return [*itertools.chain.from_iterable(inner)]


def _no_field(where: str, field: str, found: Any) -> ValueError:
    return InputError(
        f"{where}: no field {field!r}; found {found!r:.300}. Name the one that holds the text "
        "with --data.text-field"
    )


def _text(data: bytes, path: str, offset: int) -> str:
    """The text of bytes at `offset` of a file, without the byte order mark."""
    text = _decode(data, path, offset)
    if "\0" in text:  # UTF-16 without a byte order mark is often valid UTF-8
        raise InputError(
            f"{path}: NUL at byte {offset + data.index(0)}, which text does not hold; {_mend(data)}"
        )
    return text if offset else text.removeprefix("\ufeff")


def _decode(data: bytes, where: str, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 at byte {offset + error.start} (0x{data[error.start]:02x}); "
            f"{_mend(data)}"
        ) from error


def _mend(data: bytes) -> str:
    """Advice for converting these bytes to UTF-8; a wrong encoding would give wrong text."""
    encoding = "latin1"
    if data.startswith(_UTF_32):
        encoding = "UTF-32"
    elif data.startswith(_UTF_16):
        encoding = "UTF-16"
    elif num_nuls := data.count(0):
        high_bytes = data[1::2].count(0)
        if 8 * num_nuls < len(data):
            return "it is binary or damaged: get it anew, or leave it out"
        encoding = "UTF-16LE" if 2 * high_bytes > num_nuls else "UTF-16BE"
    elif not data.decode(errors="ignore").isascii():
        return "the rest is UTF-8, so it is damaged there: mend it, or leave it out"
    return f"if it is {encoding}, convert it with `iconv -f {encoding} -t UTF-8`"
