"""Tokens that exist already: checked, linked, held out by document; and the way out."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import tiny_config

from jaxlm.cli.cache import export
from jaxlm.config import DataConfig, ModelConfig
from jaxlm.corpus import overlap, prepared
from jaxlm.corpus.cache import clear_caches, list_caches
from jaxlm.corpus.token_files import read_token_file, write_token_file
from jaxlm.corpus.tokenizer import train_tokenizer
from jaxlm.corpus.tokens import link_tokens
from jaxlm.data.dataset import Dataset
from jaxlm.data.shards import TokenShards, map_tokens
from jaxlm.training.train import train

KINDS: Any = ["nanogpt", "llm.c", "megatron", "npy"]
EOS = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["to be or not to be, that is the question " * 9], 280).save(str(path))
    return path


def documents(count: int = 60, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(1, 280, rng.integers(1, 90)).tolist(), EOS] for _ in range(count)]


def shards(of: list[list[int]], dtype: str = "<u2") -> TokenShards:
    return TokenShards([np.concatenate(of).astype(dtype)])


def link(pattern: object, tokenizer: Path, cache: Path, **options: Any) -> Dataset:
    config = DataConfig(
        source=f"tokens:{pattern}", tokenizer=str(tokenizer), cache_dir=str(cache), **options
    )
    return link_tokens(config, vocab_size=300, max_tokens=1)


def all_of(tokens: TokenShards) -> list[int]:
    return tokens.read(0, tokens.num_tokens).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_each_kind_of_file_is_read_as_written(kind, dtype, tmp_path):
    tokens = shards(documents(), dtype)
    path = write_token_file(tokens, tmp_path / "a", kind, EOS)
    found = read_token_file(path, 300 if dtype == "<u2" else 100_000)
    raw = path.read_bytes()[found.offset :]
    assert np.frombuffer(raw, found.dtype).tolist() == all_of(tokens)
    assert found.num_tokens == tokens.num_tokens and found.dtype.itemsize == int(dtype[-1])
    if kind == "npy":
        np.testing.assert_array_equal(np.load(path), all_of(tokens))
    if kind == "llm.c":
        header = np.frombuffer(path.read_bytes(), "<i4", 256)
        magic, version = {"<u2": (20240520, 1), "<u4": (20240801, 7)}[dtype]
        assert header[:3].tolist() == [magic, version, tokens.num_tokens]


def test_a_megatron_index_has_its_documents(tmp_path):
    of = documents(9)
    path = write_token_file(shards(of), tmp_path / "a", "megatron", EOS)
    index = path.with_suffix(".idx").read_bytes()
    magic, version, code, num_sequences, num_documents = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version, code, num_sequences, num_documents) == (b"MMIDIDX\0\0", 1, 8, 9, 10)
    lengths = np.frombuffer(index, "<i4", 9, 34)
    assert lengths.tolist() == list(map(len, of))
    assert np.frombuffer(index, "<i8", 9, 34 + 36).tolist() == [
        2 * sum(map(len, of[:number])) for number in range(9)
    ]
    assert np.frombuffer(index, "<i8", 10, 34 + 36 + 72).tolist() == list(range(10))
    found = read_token_file(path, 300)
    assert found.ends is not None and found.ends.tolist() == np.cumsum(lengths).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_documents_of_each_file_are_held_out_whole(kind, tmp_path, tokenizer):
    of = [documents(80), documents(200, seed=1)]
    (tmp_path / "in").mkdir()
    for name, each in zip("ab", of, strict=True):
        write_token_file(shards(each), tmp_path / "in" / name, kind, EOS)
    dataset = link(tmp_path / "in", tokenizer, tmp_path / "cache")
    train, held_out = (split_at_eos(all_of(split)) for split in (dataset.train, dataset.eval))
    # A document that the limit cuts short is the last of its file.
    counts = [sum(each[: len(part)] == part for part in held_out) for each in of[0] + of[1]]
    assert train == [each for each, count in zip(of[0] + of[1], counts, strict=True) if not count]
    first, second = counts[:80], counts[80:]
    assert first == sorted(first) and second == sorted(second) and first[-1] == second[-1] == 1
    share = dataset.eval.num_tokens / (dataset.train.num_tokens + dataset.eval.num_tokens)
    assert 0.02 < share < 0.06
    shard_files = [path for path in dataset.directory.iterdir() if path.suffix == ".bin"]
    assert shard_files and all(path.is_symlink() for path in shard_files)
    (entry,) = list_caches(str(tmp_path / "cache"))
    assert entry["num_bytes"] < 100_000 and entry["complete"]  # nothing was copied


def split_at_eos(ids: list[int]) -> list[list[int]]:
    parts = np.split(np.array(ids), np.flatnonzero(np.array(ids) == EOS) + 1)
    return [part.tolist() for part in parts if len(part)]


def test_held_out_bytes_are_those_of_the_text(tmp_path, tokenizer):
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    of = [[*loaded.encode(f"to be {n}, that is é the question").ids, EOS] for n in range(60)]
    write_token_file(shards(of), tmp_path / "a", "nanogpt", EOS)
    dataset = link(tmp_path / "a.bin", tokenizer, tmp_path)
    text = loaded.decode(all_of(dataset.eval))
    first = loaded.decode(all_of(dataset.eval)[:1])
    assert len(text.encode()) > 60
    assert dataset.eval_bytes == len(text.encode()) - len(first.encode())


def test_moved_files_are_the_same_data_and_changed_ones_are_not(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    path = write_token_file(shards(documents()), tmp_path / "in" / "a", "nanogpt", EOS)
    first = link(tmp_path / "in", tokenizer, tmp_path)
    assert link(tmp_path / "in", tokenizer, tmp_path).directory == first.directory
    (tmp_path / "in").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        link(tmp_path / "in", tokenizer, tmp_path)
    moved = link(tmp_path / "moved", tokenizer, tmp_path)
    assert moved.fingerprint == first.fingerprint and moved.directory != first.directory
    path = tmp_path / "moved" / path.name
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    changed = link(tmp_path / "moved", tokenizer, tmp_path)
    assert changed.fingerprint != first.fingerprint
    data[102] ^= 1  # behind the back of the clock
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"damaged: 00000.bin has crc32c"):
        link(tmp_path / "moved", tokenizer, tmp_path)
    clear_caches([moved.directory.name], str(tmp_path))
    assert path.exists()  # the links alone are deleted


def write_llmc(path: Path, magic: int, count: int) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, count
    path.write_bytes(header.tobytes() + bytes(200))


def write_index(path: Path, **changes: Any) -> None:
    write_token_file(shards(documents(9)), path, "megatron", EOS)
    index = path.with_suffix(".idx")
    data = bytearray(index.read_bytes())
    if "code" in changes:
        data[17] = changes["code"]
    if "start" in changes:
        struct.pack_into("<q", data, 34 + 36 + 8, changes["start"])
    if "magic" in changes:
        data[0] = 0
    index.write_bytes(data[: changes.get("size")])


BAD: dict[str, tuple[Any, str]] = {
    "odd size": (
        lambda path: path.write_bytes(bytes(7)),
        "found 7 bytes, expected a multiple of 2",
    ),
    "other ids": (
        lambda path: np.arange(500, dtype="<u2").tofile(path),
        "found the ids 0 to 499 as uint16, expected 0 to 279, those of data.tokenizer",
    ),
    "negative ids": (
        lambda path: np.save(path.with_suffix(".npy"), np.arange(-5, 50)),
        "found the ids -5 to 49 as int64",
    ),
    "no EOS": (
        lambda path: np.full(99, 7, "<u2").tofile(path),
        "found no id 0, expected one at the end of each document",
    ),
    "one document": (
        lambda path: np.array([*[7] * 99, EOS], "<u2").tofile(path),
        "found one document of 100 tokens",
    ),
    "no tokens": (lambda path: path.write_bytes(b""), "found no tokens"),
    "short llm.c": (
        lambda path: write_llmc(path, 20240520, 101),
        "found 1,224 bytes, expected the 101 tokens it names",
    ),
    "floats": (
        lambda path: np.save(path.with_suffix(".npy"), np.ones(9)),
        r"found <f8 \[9\], expected one dim of little-endian integers",
    ),
    "two dims": (
        lambda path: np.save(path.with_suffix(".npy"), np.ones((3, 3), int)),
        r"found <i8 \[3, 3\], expected one dim",
    ),
    "big endian": (
        lambda path: np.save(path.with_suffix(".npy"), np.ones(9, ">i4")),
        r"found >i4 \[9\], expected one dim",
    ),
    "a pickle": (
        lambda path: np.save(path.with_suffix(".npy"), np.array([{}])),
        "expected an array of numpy.save",
    ),
    "two dtypes": (
        lambda path: (
            np.save(path.with_suffix(".npy"), np.array([1, EOS] * 9)),
            np.array([1, EOS] * 9, "<u2").tofile(path),
        ),
        "found dtypes int64, uint16, expected one",
    ),
    "index of floats": (lambda path: write_index(path, code=6), "found dtype code 6, expected one"),
    "index with gaps": (lambda path: write_index(path, start=2), "sequences with gaps"),
    "other index": (lambda path: write_index(path, magic=0), "expected an index of Megatron-LM"),
    "short index": (lambda path: write_index(path, size=50), "found 50 bytes, expected a whole"),
    "other bin": (
        lambda path: (write_index(path), path.write_bytes(bytes(10))),
        "found 10 bytes, expected the .* tokens of its index",
    ),
    "index without EOS": (
        lambda path: write_token_file(shards([[1, 2], [3, EOS]]), path, "megatron", 2),
        "found a document that does not end at id 0",
    ),
    "a text": (
        lambda path: path.with_suffix(".txt").write_text("x"),
        "found a file .txt, expected .bin or .npy",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_do_not_fit_are_refused_by_name(name, tmp_path, tokenizer):
    make, message = BAD[name]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / "a.bin")
    with pytest.raises(ValueError, match=message):
        link(tmp_path / "in", tokenizer, tmp_path / "cache")
    assert list_caches(str(tmp_path / "cache")) == []


def test_tokens_need_the_tokenizer_that_made_them(tmp_path, tokenizer):
    write_token_file(shards(documents()), tmp_path / "a", "nanogpt", EOS)
    with pytest.raises(ValueError, match="found train, expected the tokenizer that made tokens:"):
        link_tokens(DataConfig(source=f"tokens:{tmp_path}/a.bin"), vocab_size=300, max_tokens=1)
    (tmp_path / "t.txt").write_text("to be " * 99)
    mixed = DataConfig(
        sources={"a": f"tokens:{tmp_path}/a.bin", "b": f"text:{tmp_path}/t.txt"},
        cache_dir=str(tmp_path),
    )
    model = ModelConfig(vocab_size=300, num_layers=1)
    with pytest.raises(ValueError, match="found train, expected the tokenizer that made tokens:"):
        train(tiny_config(tmp_path / "run", model=model, data=mixed))


def test_prepared_text_goes_out_and_comes_back(tmp_path, capsys):
    lines = [json.dumps({"text": f"to be {n} or not " * 9}) for n in range(80)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(source=f"text:{tmp_path}/a.jsonl", cache_dir=str(tmp_path))
    dataset = prepared.find_or_make(config, vocab_size=300, max_tokens=10**6)
    name, capsys_before = dataset.directory.name, capsys.readouterr()
    assert capsys_before.err == ""
    assert export(name, out=str(tmp_path / "out"), format="llm.c", cache_dir=str(tmp_path)) == 0
    assert f"val.bin: {dataset.eval.num_tokens} tokens" in capsys.readouterr().out
    for split, tokens in {"train": dataset.train, "val": dataset.eval}.items():
        path = tmp_path / "out" / f"{split}.bin"
        found = read_token_file(path, 300)
        assert all_of(TokenShards([map_tokens(*found[:4])])) == all_of(tokens)
        assert link(path, tmp_path / "out" / "tokenizer.json", tmp_path).eos_id == dataset.eos_id
    with pytest.raises(ValueError, match="found something there"):
        export(name, out=str(tmp_path / "out"), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="no other in"):
        export("other", out=str(tmp_path / "new"), cache_dir=str(tmp_path))


# --- held-out text in the training tokens


def leaks(held_out: list[list[int]], training: list[list[int]]) -> overlap.Leaks:
    return overlap.count_leaks(shards(held_out), shards(training), EOS)


def test_a_held_out_document_that_was_trained_on_by_half_is_counted(monkeypatch):
    monkeypatch.setattr(overlap, "_CHUNK_TOKENS", 50)  # n-grams cross chunks
    rng = np.random.default_rng(0)
    of = [rng.integers(1, 280, 60).tolist() for _ in range(12)]
    training = [rng.integers(1, 280, 60).tolist() for _ in range(20)]
    parts = [of[0], of[1][:40], of[2][:30], [*of[3][:10], *of[3][-10:]], of[4][20:]]
    for at, part in zip((3, 5, 8, 11, 14), parts, strict=True):
        training[at] = [*training[at][:7], *part, *training[at][7:]]
    ended, trained = ([[*each, EOS] for each in docs] for docs in (of, training))
    assert leaks(ended, trained) == (3, 12)  # 0, 1 and 4: at least half of their n-grams
    assert leaks(ended, ended) == (12, 12)
    assert leaks([[1, 2, EOS]], [[1, 2, EOS]]) == (0, 0)  # too short to tell
    # An n-gram over the border of two documents is none.
    assert leaks([[*of[0][:8], EOS], [*of[0][8:17], EOS]], ended) == (0, 0)
