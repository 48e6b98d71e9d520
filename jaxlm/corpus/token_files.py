"""Files of token ids: nanoGPT and llm.c (.bin), Megatron-LM (.bin with .idx), NumPy (.npy)."""

import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from jaxlm.corpus.cache import data_folder, find_caches
from jaxlm.data.dataset import MANIFEST, Manifest, open_dataset
from jaxlm.data.shards import TokenShards, map_tokens
from jaxlm.errors import InputError
from jaxlm.files.publish import check_free, published
from jaxlm.files.strict import read_json

Kind = Literal["nanogpt", "llm.c", "megatron", "npy"]

_LLMC_INTS = 256
_LLMC = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
"""Magic number of llm.c's header (dev/data/data_common.py) -> dtype."""
_LLMC_VERSIONS = {np.dtype("<u2"): 1, np.dtype("<u4"): 7}
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Code in an .idx (megatron/core/datasets/indexed_dataset.py) -> dtype."""
_LOOK_TOKENS = 1 << 23


class TokenFile(NamedTuple):
    """Where the token ids of a file lie."""

    path: Path
    dtype: np.dtype
    offset: int
    """Bytes before the first id."""
    num_tokens: int
    ends: np.ndarray | None = None
    """Number of tokens up to the end of each document, if the format says; int64."""


def map_file(file: TokenFile) -> np.ndarray:
    """The ids of a file, which stay on disk."""
    return map_tokens(file.path, file.dtype, file.offset, file.num_tokens)


def read_token_file(path: Path, vocab_size: int) -> TokenFile:
    """The layout of a file; `vocab_size` decides the dtype of a .bin that does not say it.

    Raises:
      ValueError: the file is of no known format, cut short, or not of integers.
    """
    if path.suffix == ".npy":
        return _read_npy(path)
    if path.with_suffix(".idx").is_file():
        return _read_megatron(path)
    if path.suffix != ".bin":
        raise _refused(path, f"a {path.suffix or 'nameless'} file", ".bin or .npy")
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", min(_LLMC_INTS, size // 4))
    if len(header) == _LLMC_INTS and int(header[0]) in _LLMC:
        dtype, offset = _LLMC[int(header[0])], 4 * _LLMC_INTS
        found = TokenFile(path, dtype, offset, int(header[2]))
        if offset + found.num_tokens * dtype.itemsize != size:
            raise _refused(path, f"{size:,} bytes", f"the {found.num_tokens:,} tokens it names")
        return found
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    if size % dtype.itemsize:
        raise _refused(path, f"{size:,} bytes", f"a multiple of {dtype.itemsize} ({dtype.name})")
    return _widened(TokenFile(path, dtype, 0, size // dtype.itemsize))


def _widened(file: TokenFile) -> TokenFile:
    # Every second word of a file of wider ids is 0: it was read as ids of half their size.
    if file.num_tokens % 2 or file.dtype.itemsize == 8 or file.num_tokens < 2:
        return file
    words = map_file(file)[:_LOOK_TOKENS]
    if words[1::2].any() or not words.any():
        return file
    wider = np.dtype(f"<u{2 * file.dtype.itemsize}")
    return _widened(TokenFile(file.path, wider, 0, file.num_tokens // 2))


def _read_npy(path: Path) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OverflowError, zipfile.BadZipFile) as error:
        raise _refused(path, str(error), "an array of numpy.save") from error
    if not isinstance(array, np.ndarray):
        raise _refused(path, "several arrays", "an array of numpy.save")
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.dtype.str.startswith(">"):
        raise _refused(
            path, f"{array.dtype.str} {list(array.shape)}", "one dim of little-endian integers"
        )
    return TokenFile(path, array.dtype, getattr(array, "offset", 0), len(array))


def _read_megatron(path: Path) -> TokenFile:
    data = path.with_suffix(".idx").read_bytes()
    head = struct.calcsize("<9sQBQQ")
    if len(data) < head or not data.startswith(_MEGATRON):
        raise _refused(path.with_suffix(".idx"), "no MMIDIDX header", "an index of Megatron-LM")
    _, version, code, num_sequences, num_documents = struct.unpack("<9sQBQQ", data[:head])
    if version != 1:
        raise _refused(path.with_suffix(".idx"), f"version {version}", "version 1")
    if code not in _MEGATRON_DTYPES:
        raise _refused(path.with_suffix(".idx"), f"dtype code {code}", "one of integers")
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    if len(data) < head + 12 * num_sequences + 8 * num_documents:
        raise _refused(path.with_suffix(".idx"), f"{len(data):,} bytes", "a whole index")
    lengths = np.frombuffer(data, "<i4", num_sequences, head).astype(np.int64)
    starts = np.frombuffer(data, "<i8", num_sequences, head + 4 * num_sequences)
    documents = np.frombuffer(data, "<i8", num_documents, head + 12 * num_sequences)
    ends = np.cumsum(lengths)
    sound = num_documents > 1 and documents[0] == 0 and documents[-1] == num_sequences
    if not sound or (lengths <= 0).any() or (np.diff(documents) <= 0).any():
        raise _refused(path.with_suffix(".idx"), "no ascending documents", "those of its sequences")
    if not np.array_equal(starts, (ends - lengths) * dtype.itemsize):
        raise _refused(path, "sequences with gaps between them", "consecutive ones")
    num_tokens = int(ends[-1]) if num_sequences else 0
    if (size := path.stat().st_size) != num_tokens * dtype.itemsize:
        raise _refused(path, f"{size:,} bytes", f"the {num_tokens:,} tokens of its index")
    return TokenFile(path, dtype, 0, num_tokens, ends[documents[1:] - 1])


def _refused(path: Path, found: str, expected: str) -> InputError:
    return InputError(f"data.source tokens: {path}: found {found}, expected {expected}")


def write_token_file(
    tokens: TokenShards, path: Path, kind: Kind, eos_id: int, vocab_size: int
) -> Path:
    """Writes tokens to `path`, with the suffix of the kind; documents end at `eos_id`."""
    path = path.with_suffix(".npy" if kind == "npy" else ".bin")
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    _WRITERS[kind](tokens, path, dtype, eos_id)
    return path


def _write_nanogpt(tokens: TokenShards, path: Path, dtype: np.dtype, eos_id: int) -> None:
    with open(path, "wb") as file:
        _write_ids(file, tokens, dtype)


def _write_llmc(tokens: TokenShards, path: Path, dtype: np.dtype, eos_id: int) -> None:
    header = np.zeros(_LLMC_INTS, "<i4")
    magic = next(magic for magic, of in _LLMC.items() if of == dtype)
    header[:3] = magic, _LLMC_VERSIONS[dtype], tokens.num_tokens
    with open(path, "wb") as file:
        file.write(header.tobytes())
        _write_ids(file, tokens, dtype)


def _write_megatron(tokens: TokenShards, path: Path, dtype: np.dtype, eos_id: int) -> None:
    if dtype.itemsize == 4:
        dtype = np.dtype("<i4")
    with open(path, "wb") as file:
        ends = _write_ids(file, tokens, dtype, eos_id)
    if ends[-1:] != [tokens.num_tokens]:
        ends.append(tokens.num_tokens)
    lengths = np.diff([0, *ends])
    code = next(code for code, name in _MEGATRON_DTYPES.items() if np.dtype(name) == dtype)
    head = struct.pack("<9sQBQQ", _MEGATRON, 1, code, len(ends), len(ends) + 1)
    starts = (np.cumsum(lengths) - lengths) * dtype.itemsize
    parts = lengths.astype("<i4"), starts.astype("<i8"), np.arange(len(ends) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(head + b"".join(part.tobytes() for part in parts))


def _write_npy(tokens: TokenShards, path: Path, dtype: np.dtype, eos_id: int) -> None:
    with open(path, "wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (tokens.num_tokens,)}
        np.lib.format.write_array_header_1_0(file, header)
        _write_ids(file, tokens, dtype)


_WRITERS: dict[Kind, Callable[[TokenShards, Path, np.dtype, int], None]] = {
    "nanogpt": _write_nanogpt,
    "llm.c": _write_llmc,
    "megatron": _write_megatron,
    "npy": _write_npy,
}


def _write_ids(
    file: BinaryIO, tokens: TokenShards, dtype: np.dtype, eos_id: int | None = None
) -> list[int]:
    # Returns the end of each document that `eos_id` ends.
    ends, start = list[int](), 0
    for chunk in tokens.chunks():
        file.write(chunk.astype(dtype).tobytes())
        ends += (start + 1 + np.flatnonzero(chunk == eos_id)).tolist() if eos_id is not None else []
        start += len(chunk)
    return ends


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
    directory = data_folder(cache_dir) / found
    vocab_size = read_json(directory / MANIFEST, Manifest)["vocab_size"]
    dataset = open_dataset(directory, vocab_size)
    target, written = check_free(out), dict[Path, int]()
    with published(target) as folder:
        shutil.copy(dataset.tokenizer_path, folder / "tokenizer.json")
        for split, tokens in {"train": dataset.train, "val": dataset.eval}.items():
            path = write_token_file(tokens, folder / split, kind, dataset.eos_id, vocab_size)
            written[target / path.name] = tokens.num_tokens
    return written
