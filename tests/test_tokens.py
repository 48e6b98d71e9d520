"""Tokens that exist already: checked, linked, held out by document; and the way out."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import tiny_config

from jaxlm.cli.cache import export
from jaxlm.config import DataConfig, ModelConfig
from jaxlm.corpus import overlap, prepared, tokens
from jaxlm.corpus.cache import clear_caches, list_caches
from jaxlm.corpus.token_files import map_file, read_token_file, write_token_file
from jaxlm.corpus.tokenizer import train_tokenizer
from jaxlm.corpus.tokens import link_tokens
from jaxlm.data import shards as shards_lib
from jaxlm.data.dataset import Dataset
from jaxlm.data.shards import TokenShards
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
    return link_tokens(config, vocab_size=300, limits=[1])


def all_of(tokens: TokenShards) -> list[int]:
    return tokens.read(0, tokens.num_tokens).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_each_kind_of_file_is_read_as_written(kind, dtype, tmp_path):
    tokens = shards(documents(), dtype)
    vocab_size = 300 if dtype == "<u2" else 100_000
    path = write_token_file(tokens, tmp_path / "a", kind, EOS, vocab_size)
    found = read_token_file(path, vocab_size)
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
    path = write_token_file(shards(of), tmp_path / "a", "megatron", EOS, 300)
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
        write_token_file(shards(each), tmp_path / "in" / name, kind, EOS, 300)
    dataset = link(tmp_path / "in", tokenizer, tmp_path / "cache")
    train, held_out = (split_at_eos(all_of(split)) for split in (dataset.train, dataset.eval))
    is_held_out = [each in held_out for each in of[0] + of[1]]
    assert held_out == [
        each for each, is_so in zip(of[0] + of[1], is_held_out, strict=True) if is_so
    ]
    assert train == [
        each for each, is_so in zip(of[0] + of[1], is_held_out, strict=True) if not is_so
    ]
    assert any(is_held_out[70:80]) and any(is_held_out[-12:]) and not any(is_held_out[:60])
    share = dataset.eval.num_tokens / (dataset.train.num_tokens + dataset.eval.num_tokens)
    assert 0.02 < share < 0.06
    shard_files = [path for path in dataset.directory.iterdir() if path.suffix == ".bin"]
    assert shard_files and all(path.is_symlink() for path in shard_files)
    (entry,) = list_caches(str(tmp_path / "cache"))
    assert entry["num_bytes"] < 100_000 and entry["complete"]  # nothing was copied


def test_no_token_is_lost_whatever_the_lengths(tmp_path, tokenizer):
    long = [[7] * 3000 + [EOS], [8] * 20 + [EOS]]
    for of, held_out in (
        ([*documents(40), *long], [long[1]]),  # a long one is passed over
        ([*documents(40), *long[::-1]], None),
        ([[7] * 400 + [EOS], [8] * 500 + [EOS]], [[8] * 45]),  # all are longer than the share
    ):
        write_token_file(shards(of), tmp_path / "a", "nanogpt", EOS, 300)
        dataset = link(tmp_path / "a.bin", tokenizer, tmp_path)
        found = split_at_eos(all_of(dataset.eval))
        if held_out is None:
            assert found and all(each in of for each in found)
        else:
            assert found[-1:] == held_out
        lengths = dataset.train.num_tokens + dataset.eval.num_tokens
        assert lengths == sum(map(len, of)) and dataset.eval.num_tokens <= lengths // 20
    counts = json.loads((dataset.directory / "manifest.json").read_text())["documents"]
    assert counts == {"train": 2, "eval": 0}


def test_files_of_wider_ids_are_read_as_such(tmp_path, tokenizer):
    of = documents()
    for dtype in ("<u4", "<i8"):
        np.concatenate(of).astype(dtype).tofile(tmp_path / "a.bin")
        found = link(tmp_path / "a.bin", tokenizer, tmp_path)
        assert found.train.num_tokens + found.eval.num_tokens == sum(map(len, of))
        assert all_of(found.train)[:50] == np.concatenate(of)[:50].tolist()


def test_a_kill_while_files_are_linked_costs_nothing(tmp_path, tokenizer, monkeypatch):
    write_token_file(shards(documents()), tmp_path / "a", "nanogpt", EOS, 300)
    write = tokens.write_manifest

    class KilledError(BaseException):
        pass

    def kill(*args: Any) -> None:
        raise KilledError

    monkeypatch.setattr(tokens, "write_manifest", kill)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a kill cleans up nothing
    with pytest.raises(KilledError):
        link(tmp_path / "a.bin", tokenizer, tmp_path)
    monkeypatch.undo()
    assert tokens.write_manifest is write
    assert link(tmp_path / "a.bin", tokenizer, tmp_path).train.num_tokens > 100


def test_another_eos_is_another_dataset(tmp_path):
    text = ["to be or not to be, that is the question " * 9]
    made = train_tokenizer(text, 280)
    made.add_special_tokens(["<|end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (other,) = (made.token_to_id("<|end|>"),)
    of = [[*each[:-1], other if number % 2 else EOS] for number, each in enumerate(documents())]
    write_token_file(shards(of), tmp_path / "a", "nanogpt", EOS, 300)
    first = link(tmp_path / "a.bin", tmp_path, tmp_path)
    second = link(tmp_path / "a.bin", tmp_path, tmp_path, eos_token="<|end|>")
    assert (first.eos_id, second.eos_id) == (EOS, other)
    assert first.fingerprint != second.fingerprint


def split_at_eos(ids: list[int]) -> list[list[int]]:
    parts = np.split(np.array(ids), np.flatnonzero(np.array(ids) == EOS) + 1)
    return [part.tolist() for part in parts if len(part)]


def test_held_out_bytes_are_those_of_the_text(tmp_path, tokenizer):
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    of = [[*loaded.encode(f"to be {n}, that is é the question").ids, EOS] for n in range(60)]
    write_token_file(shards(of), tmp_path / "a", "nanogpt", EOS, 300)
    dataset = link(tmp_path / "a.bin", tokenizer, tmp_path)
    text = loaded.decode(all_of(dataset.eval))
    first = loaded.decode(all_of(dataset.eval)[:1])
    assert len(text.encode()) > 60
    assert dataset.eval_bytes == len(text.encode()) - len(first.encode())


def test_moved_files_are_the_same_data_and_changed_ones_are_not(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    path = write_token_file(shards(documents()), tmp_path / "in" / "a", "nanogpt", EOS, 300)
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
    write_token_file(shards(documents(9)), path, "megatron", EOS, 300)
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
        "found one document a file, 100 tokens in all",
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
            np.save(path.with_suffix(".npy"), np.array([1, 2, EOS] * 9)),
            np.array([1, 2, EOS] * 9, "<u2").tofile(path),
        ),
        "found dtypes int64, uint16, expected one",
    ),
    "index of floats": (lambda path: write_index(path, code=6), "found dtype code 6, expected one"),
    "index with gaps": (lambda path: write_index(path, start=2), "sequences with gaps"),
    "other index": (lambda path: write_index(path, magic=0), "found no MMIDIDX header"),
    "short index": (lambda path: write_index(path, size=50), "found 50 bytes, expected a whole"),
    "other bin": (
        lambda path: (write_index(path), path.write_bytes(bytes(10))),
        "found 10 bytes, expected the .* tokens of its index",
    ),
    "index without EOS": (
        lambda path: write_token_file(shards([[1, 2], [3, EOS]]), path, "megatron", 2, 300),
        "found a document that does not end at id 0",
    ),
    "a text": (
        lambda path: path.with_suffix(".txt").write_text("x"),
        "found a .txt file, expected .bin or .npy",
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
    write_token_file(shards(documents()), tmp_path / "a", "nanogpt", EOS, 300)
    with pytest.raises(ValueError, match="found train, expected the tokenizer that made tokens:"):
        link_tokens(DataConfig(source=f"tokens:{tmp_path}/a.bin"), vocab_size=300, limits=[1])
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
    dataset = prepared.find_or_make(config, vocab_size=300, limits=[10**6])
    name, capsys_before = dataset.directory.name, capsys.readouterr()
    assert capsys_before.err == ""
    assert export(name, out=str(tmp_path / "out"), format="llm.c", cache_dir=str(tmp_path)) == 0
    assert f"val.bin: {dataset.eval.num_tokens} tokens" in capsys.readouterr().out
    for split, expected in {"train": dataset.train, "val": dataset.eval}.items():
        path = tmp_path / "out" / f"{split}.bin"
        found = read_token_file(path, 300)
        assert all_of(TokenShards([map_file(found)])) == all_of(expected)
        assert link(path, tmp_path / "out" / "tokenizer.json", tmp_path).eos_id == dataset.eos_id
    with pytest.raises(ValueError, match="found something there"):
        export(name, out=str(tmp_path / "out"), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="no other in"):
        export("other", out=str(tmp_path / "new"), cache_dir=str(tmp_path))


# --- held-out text in the training tokens


def leaks(held_out: list[list[int]], training: list[list[int]]) -> overlap.Leaks:
    return overlap.count_leaks(shards(held_out), [shards(training)], EOS)


def test_a_held_out_document_that_was_trained_on_by_half_is_counted(monkeypatch):
    monkeypatch.setattr(shards_lib, "_CHUNK_TOKENS", 50)  # n-grams cross chunks
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
