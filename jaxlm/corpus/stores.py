"""Files of text by pattern: on this machine, or by fsspec in an object store (s3://, gs://)."""

import contextlib
import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from typing import Any, BinaryIO, NamedTuple, cast

from jaxlm.errors import FileError, InputError, JaxlmError, MissingFileError
from jaxlm.extras import MODULES, needs
from jaxlm.files.durable import expand

_STORES = ("s3", "gs")
_READ_BYTES = 8 << 20
"""Bytes of one request."""


class File(NamedTuple):
    """A file that was found."""

    path: str
    num_bytes: int
    stamp: str
    """Changes with the content: the time of the last change, or the ETag of an object."""


def is_remote(path: str) -> bool:
    """Whether a path is in an object store."""
    return "://" in path


def find_files(source: str, suffixes: Iterable[str]) -> list[File]:
    """The files of KIND:PATH, sorted; the path is that of a file or folder, or a pattern.

    Raises:
      FileNotFoundError: no file matches.
      ImportError: the package of the store is not installed.
      OSError: the store cannot be read.
    """
    pattern = source.partition(":")[2]
    found, problem = (_in_store if is_remote(pattern) else _on_disk)(pattern)
    if not found:
        raise MissingFileError(
            f"data.source {source}: {problem}; expected files such as "
            f"{', '.join(suffixes)}. Check the path, and quote a pattern"
        )
    return sorted(found)


def _on_disk(pattern: str) -> tuple[list[File], str]:
    path = expand(pattern, "data.source")
    below = ["**", "*"] if os.path.isdir(path) else []
    names = glob.iglob(os.path.join(_literal(path, os.path.exists), *below), recursive=True)
    # Deduplicated: with two `**`, glob finds a file several times.
    paths = {os.path.abspath(name) for name in names if os.path.isfile(name)}
    problem = "no file in that folder" if below else f"no file matches in {os.getcwd()}"
    return [describe(path) for path in paths], problem


def _in_store(pattern: str) -> tuple[list[File], str]:
    with _reading(pattern):
        system, path = _system_of(pattern)
        below = "/**" if system.isdir(path) else ""
        literal = _literal(path.rstrip("/"), system.exists)
        entries = system.glob(literal + below, detail=True)
        scheme = pattern.partition("://")[0]
        files = [
            File(f"{scheme}://{name.removeprefix('/')}", about["size"], _stamp(about))
            for name, about in entries.items()
            if about["type"] == "file"
        ]
    return files, "no object matches"


def _system_of(path: str) -> tuple[Any, str]:
    # The file system of fsspec, and the path in it.
    import fsspec

    scheme = path.partition("://")[0]
    if scheme in _STORES:
        needs(MODULES["stores"], f"data.source {path}")
        for name in ("gcsfs", "s3fs", "aiobotocore", "asyncio"):  # The error below says it all.
            logging.getLogger(name).setLevel(logging.CRITICAL)
    elif scheme != "memory":  # fsspec's own, for tests
        raise InputError(f"data.source: found {path}, expected s3:// or gs://, or a local path")
    return fsspec.core.url_to_fs(path)


def _stamp(about: dict[str, Any]) -> str:
    names = ("etag", "ETag", "mtime", "LastModified", "created")
    return str(next(about[name] for name in names if about.get(name)))


def describe(path: str) -> File:
    """A file on this machine."""
    stat = os.stat(path)
    return File(path, stat.st_size, str(stat.st_mtime_ns))


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The file, open for reading at any place.

    Raises:
      FileNotFoundError: the file is gone.
      OSError: the object cannot be read.
    """
    if not is_remote(path):
        try:
            file = FileIO(path)
        except FileNotFoundError as error:
            raise MissingFileError(f"data.source: {path} is gone since it was listed") from error
        with file:
            yield cast(BinaryIO, file)
        return
    with _reading(path):
        system, name = _system_of(path)
        with system.open(name, "rb", block_size=_READ_BYTES) as file:
            yield file


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    # s3fs and gcsfs raise errors of many types.
    try:
        yield
    except (JaxlmError, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"data.source: {path}: no such object or bucket") from error
    except Exception as error:
        raise FileError(
            f"data.source: {path} cannot be read ({type(error).__name__}: {error}); look at its "
            "name, at the credentials (of AWS: `aws configure`; of Google: `gcloud auth "
            "application-default login`) and at the network"
        ) from error


def _literal(path: str, exists: Callable[[str], bool]) -> str:
    """The path as a glob pattern, with existing parts escaped: `[v1] set/*.jsonl`."""
    head, tail = path, ""
    while head and not exists(head):
        head, slash, name = head.rpartition("/")
        tail = f"{slash}{name}{tail}"
    return glob.escape(head) + tail
