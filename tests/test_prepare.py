import dataclasses
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxlm import __main__ as cli
from jaxlm.compilation_cache import enable_compilation_cache
from jaxlm.config import DataConfig
from jaxlm.corpus import cache, encode, formats, parallel, prepare, prepared, splits
from jaxlm.corpus.cache import clear_caches, list_caches
from jaxlm.corpus.overview import overview
from jaxlm.corpus.splits import is_held_out
from jaxlm.corpus.tokenizer import load_tokenizer, mark_eos, train_tokenizer
from jaxlm.data.dataset import checked_path, open_dataset
from jaxlm.data.run_data import Prepared, default_max_tokens
from jaxlm.files.cache import cache_root
from jaxlm.files.durable import crc32c, write_file

SHARD_TOKENS = 4500
SMALL = {"CHUNK_CHARS": 3000, "PIECE_CHARS": 400}


def documents(count=120):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=rng.randint(0, 200))) for _ in range(count)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Limits that give a small corpus several shards."""
    monkeypatch.setattr(prepare, "SHARD_TOKENS", SHARD_TOKENS)
    for name, value in SMALL.items():
        monkeypatch.setattr(encode, name, value)


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    os.utime(path, ns=(10**18, 10**18))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", documents())


def config_of(corpus, folder, **kwargs):
    return DataConfig(source=f"text:{corpus}", cache_dir=str(folder), **kwargs)


def run(config, vocab_size=300, max_tokens=10**6):
    return prepared.find_or_make(config, vocab_size=vocab_size, limits=[max_tokens])


def contents(folder):
    """Bytes of each file in the cache, by its name.

    Aside from locks, and from the progress of what is complete, which a kill may leave.
    """
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    files = [
        path for path in files if not path.name.endswith((".lock", ".checked", ".checked.tmp"))
    ]
    complete = {path.parent for path in files if path.name == "manifest.json"}
    files = [p for p in files if p.name != "progress.json" or p.parent not in complete]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def manifest_of(dataset):
    return json.loads((dataset.directory / "manifest.json").read_bytes())


def decoded(dataset, split):
    tokens = getattr(dataset, split)
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    ids = tokens.read(0, tokens.num_tokens).tolist()
    return tokenizer.decode(ids, skip_special_tokens=False).split("<|endoftext|>")


# --- what is prepared


def test_each_document_is_in_one_split_whole_and_in_order(corpus, tmp_path):
    dataset = run(config_of(corpus, tmp_path))
    texts = documents()
    assert "" in texts  # It gives no tokens.
    for split, held_out in (("train", False), ("eval", True)):
        expected = [t for i, t in enumerate(texts) if t and is_held_out(i) == held_out]
        assert decoded(dataset, split) == [*expected, ""] and len(expected) > 3
    about = manifest_of(dataset)
    assert about["exhausted"] and dataset.eos_id == 0 and about["vocab_size"] == 300
    names = sorted(path.name for path in dataset.directory.iterdir())
    assert "train-00002.bin" in names and "eval-00001.bin" in names
    assert not [name for name in names if "progress" in name or "tmp" in name]


def test_the_tokenizer_never_saw_the_held_out_documents(corpus, tmp_path):
    dataset = run(config_of(corpus, tmp_path))
    training = [text for index, text in enumerate(documents()) if not is_held_out(index)]
    found = Tokenizer.from_file(str(dataset.tokenizer_path)).to_str()
    assert found == train_tokenizer(training, 300).to_str()
    assert found != train_tokenizer(documents(), 300).to_str()  # control


def test_each_split_is_a_sample_of_all_files(tmp_path, lines):
    rng = random.Random(5)
    (tmp_path / "in").mkdir()
    for name, count in (("a_code", 300), ("b_docs", 600), ("c_talk", 100)):
        write(
            tmp_path / "in" / f"{name}.jsonl", [f"{name} {rng.random()} " * 3 for _ in range(count)]
        )
    config = config_of(tmp_path / "in" / "*.jsonl", tmp_path, eval_tokens=2500)
    dataset = run(config, max_tokens=12_000)
    for split, tolerance in (("train", 0.05), ("eval", 0.2)):
        texts = decoded(dataset, split)
        shares = {
            name: sum(name in text for text in texts) / len(texts)
            for name in ("a_code", "b_docs", "c_talk")
        }
        assert shares == pytest.approx({"a_code": 0.3, "b_docs": 0.6, "c_talk": 0.1}, abs=tolerance)
        assert len(texts) > 10
    parts = manifest_of(dataset)["parts"]
    assert sum(train for train, _ in parts.values()) == 12_000
    assert sum(held_out for _, held_out in parts.values()) == dataset.eval.num_tokens
    assert re.match(r" *\d\d\.\d%  b_docs.jsonl: [\d,]+ tokens and [\d,]+ held out", lines[-4])


def test_limits_are_met_exactly(corpus, tmp_path):
    whole = run(config_of(corpus, tmp_path))
    dataset = run(config_of(corpus, tmp_path, eval_tokens=321), max_tokens=4321)
    assert (dataset.train.num_tokens, dataset.eval.num_tokens) == (4321, 321)
    assert not manifest_of(dataset)["exhausted"]
    np.testing.assert_array_equal(dataset.eval.read(0, 321), whole.eval.read(0, 321))
    # Once the held-out set is full, all documents train.
    small = run(config_of(corpus, tmp_path, eval_tokens=10))
    assert small.eval.num_tokens == 10 and small.train.num_tokens > whole.train.num_tokens


def test_the_split_is_stable_and_spread():
    held_out = [index for index in range(20_000) if is_held_out(index)]
    assert held_out[0] == 1 and len(held_out) == 1000
    places = np.bincount(np.array(held_out[1:]) % 20, minlength=20)
    assert places.min() > 20 and places.max() < 100
    assert held_out[:6] == [1, 21, 55, 68, 96, 105]  # Golden: others would mix train and eval.


def test_the_number_of_cores_changes_nothing(corpus, tmp_path):
    script = child(corpus, tmp_path / "one", "")
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env=os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    run(config_of(corpus, tmp_path / "many"))
    assert contents(tmp_path / "one") == contents(tmp_path / "many") != {}


def test_a_special_token_in_the_text_is_text(tmp_path):
    corpus = write(tmp_path / "a.jsonl", ["one <|endoftext|> two"] * 4)
    dataset = run(config_of(corpus, tmp_path))
    tokens = dataset.train.read(0, dataset.train.num_tokens)
    assert (tokens == dataset.eos_id).sum() == 3 and tokens[-1] == dataset.eos_id


def unigram():
    pieces = {"<unk>": 0.0, "</s>": 0.0} | dict.fromkeys("\u2581abcdefgh</s>", -2.0)
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def with_plain_eos(**about):
    tokenizer = train_tokenizer(documents(), 299)
    tokenizer.add_tokens([AddedToken("</s>", special=False, **about)])
    return tokenizer


def of_words():
    words = {"<unk>": 0, "</s>": 1, "abc": 2}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [with_plain_eos(), with_plain_eos(normalized=True, lstrip=True), unigram(), of_words()],
    ids=["added", "added, normalized", "unigram", "words"],
)
def test_an_eos_that_a_text_spells_out_is_text(tmp_path, tokenizer):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["abc </s> abc</s></s>abc", "abc", "abc", "</s>"]
    corpus = write(tmp_path / "a.jsonl", texts)
    dataset = run(config_of(corpus, tmp_path, tokenizer=str(tmp_path), eos_token="</s>"))
    tokens = dataset.train.read(0, dataset.train.num_tokens)
    assert dataset.eos_id == tokenizer.token_to_id("</s>")
    assert (tokens == dataset.eos_id).sum() == 3 and tokens[-1] == dataset.eos_id
    own = load_tokenizer(dataset.tokenizer_path)
    assert own.get_added_tokens_decoder()[dataset.eos_id].special
    if tokenizer.token_to_id("<unk>") is None:
        assert own.decode(tokens.tolist()) == texts[0] + texts[2] + texts[3]  # no EOS in between
    mark_eos(own, dataset.eos_id)  # as it is already
    assert own.to_str(pretty=True).encode() == dataset.tokenizer_path.read_bytes()


def test_an_eos_that_stands_for_text_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "abc": 1}, "</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = config_of(write(tmp_path / "a.jsonl", ["abc"] * 4), tmp_path, tokenizer=str(tmp_path))
    assert run(config).eos_id == 0
    write(tmp_path / "a.jsonl", ["abc", "abc", "abc xyz"])
    with pytest.raises(
        ValueError, match="eos_token: '</s>' ends a document, and .* text 'abc x' too"
    ):
        run(config)


def test_a_tokenizer_neither_cuts_nor_pads_nor_draws_lots(corpus, tmp_path):
    tokenizer = train_tokenizer(documents(), 300)
    tokenizer.save(str(tmp_path / "plain.json"))
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=32)
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(tmp_path / "cuts.json"))
    plain, cuts = (
        run(config_of(corpus, tmp_path / name, tokenizer=str(tmp_path / f"{name}.json")))
        for name in ("plain", "cuts")
    )
    assert plain.train.num_tokens > 5000 and contents(tmp_path / "plain") == contents(
        tmp_path / "cuts"
    )


@pytest.mark.slow
def test_dtype_follows_the_vocabulary(corpus, tmp_path):
    tokenizer = train_tokenizer(documents(), 300)
    tokenizer.save(str(tmp_path / "small.json"))
    tokenizer.add_tokens([f"token {n}" for n in range(65_237)])
    tokenizer.save(str(tmp_path / "large.json"))
    found = {}
    for name in ("small", "large"):
        config = config_of(corpus, tmp_path, tokenizer=str(tmp_path / f"{name}.json"))
        found[name] = run(config, vocab_size=70_000).train
    assert found["small"].dtype == "<u2" and found["large"].dtype == "<u4"
    tokens = [shards.read(0, shards.num_tokens).tolist() for shards in found.values()]
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_embedded_with_the_real_limits(tmp_path, monkeypatch):
    monkeypatch.undo()
    config = DataConfig(cache_dir=str(tmp_path))
    start_s = time.monotonic()
    dataset = run(config, 4096, default_max_tokens(config, 1000))
    print(f"embedded, 4096 tokens: {time.monotonic() - start_s:.1f} s")
    assert dataset.train.num_tokens > 2_500_000 and dataset.eval.num_tokens > 100_000
    assert manifest_of(dataset)["exhausted"]


def test_default_max_tokens():
    assert default_max_tokens(DataConfig(), 1000) == 10_000_000
    assert 10**9 < default_max_tokens(DataConfig(), 10**9) < 1.1 * 10**9
    assert default_max_tokens(DataConfig(max_tokens=77), 10**9) == 77


# --- the cache


def test_a_second_call_takes_what_is_there(corpus, tmp_path, monkeypatch, lines):
    first = run(config_of(corpus, tmp_path))
    before = contents(tmp_path)
    monkeypatch.setattr(prepared, "make_dataset", None)
    lines.clear()
    again = run(config_of(corpus, tmp_path))
    assert again.fingerprint == first.fingerprint and lines == []
    assert contents(tmp_path) == before


def test_what_changes_the_content_changes_the_folder(corpus, tmp_path):
    base = config_of(corpus, tmp_path)
    datasets = [run(base), run(base, vocab_size=310), run(base, max_tokens=4000)]
    datasets.append(run(dataclasses.replace(base, eval_tokens=100)))
    for texts in ([*documents(), "more"], [*documents(), "even more"]):
        other = write(tmp_path / "corpus.jsonl", texts)
        datasets.append(run(config_of(other, tmp_path)))
    assert len({dataset.directory for dataset in datasets}) == 6
    assert len({dataset.fingerprint for dataset in datasets}) == 6
    assert all(dataset.directory.name.startswith("text-") for dataset in datasets)


def test_the_fingerprint_is_of_the_tokens(corpus, tmp_path):
    first = run(config_of(corpus, tmp_path))
    copy = write(tmp_path / "copy.jsonl", documents())
    os.utime(copy)
    second = run(config_of(copy, tmp_path / "elsewhere"), max_tokens=2 * 10**6)
    assert second.fingerprint == first.fingerprint and second.directory != first.directory


def test_where_the_cache_is(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JAXLM_CACHE", raising=False)
    assert cache.data_folder(None) == tmp_path / "home/.cache/jaxlm/data"
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "env"))
    assert cache.data_folder(None) == tmp_path / "env/data"
    assert run(config_of(corpus, tmp_path / "flag")).directory.parent == tmp_path / "flag/data"


@pytest.mark.parametrize("kind", ["a file", "in a file", "read-only"])
def test_a_cache_that_cannot_be_written_is_named_before_any_work(
    corpus, tmp_path, monkeypatch, kind, lines
):
    folder = tmp_path / "home/.cache/jaxlm"
    folder.parent.parent.mkdir()
    if kind == "in a file":
        folder.parent.write_text("")
    elif kind == "a file":
        folder.parent.mkdir()
        folder.write_text("")
    else:  # root may write anywhere

        def refuse(*_, **__):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JAXLM_CACHE", raising=False)
    named = r"/home/.cache/jaxlm(/data \(|, expected a folder).*--data.cache-dir or JAXLM_CACHE"
    with pytest.raises((OSError, ValueError), match=named):
        run(DataConfig(source=f"text:{corpus}"))
    assert lines == []


def test_a_cache_that_may_only_be_read_serves_what_it_has(corpus, tmp_path, monkeypatch):
    dataset = run(config_of(corpus, tmp_path))
    monkeypatch.setattr(cache, "lock_data", None)
    monkeypatch.setattr(os, "utime", Mock(side_effect=PermissionError))
    assert run(config_of(corpus, tmp_path)).fingerprint == dataset.fingerprint


def test_no_home(monkeypatch):
    monkeypatch.delenv("JAXLM_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", Mock(side_effect=RuntimeError("no home")))
    with pytest.raises(ValueError, match="no home folder for ~/.cache/jaxlm .*JAXLM_CACHE"):
        cache_root(None)
    enable_compilation_cache(None)  # does without


def test_data_of_another_version_is_listed_and_verified(corpus, tmp_path):
    folder = run(config_of(corpus, tmp_path)).directory
    (before,) = list_caches(str(tmp_path))
    path = folder / "manifest.json"
    values = json.loads(path.read_bytes())
    path.write_text(json.dumps({n: v for n, v in values.items() if n not in ("sizes", "parts")}))
    (found,) = list_caches(str(tmp_path))
    assert found["num_tokens"] == before["num_tokens"] > 0 and found["source"] == before["source"]
    assert cache.verify_cache(folder.name, str(tmp_path)) is None


def test_list_and_clear(corpus, tmp_path):
    assert list_caches(str(tmp_path)) == []
    one, two = run(config_of(corpus, tmp_path)), run(config_of(corpus, tmp_path), max_tokens=4000)
    (two.directory / "manifest.json").rename(two.directory / "progress.json")
    found = {entry["name"]: entry for entry in list_caches(str(tmp_path))}
    assert found.keys() == {one.directory.name, two.directory.name}
    entry = found[one.directory.name]
    assert entry["source"] == f"text:{corpus}" and entry["complete"]
    assert entry["num_tokens"] == one.train.num_tokens + one.eval.num_tokens
    assert entry["num_bytes"] == sum(path.stat().st_size for path in one.directory.iterdir())
    assert abs(entry["last_used_s"] - time.time()) < 60
    assert not found[two.directory.name]["complete"]
    with pytest.raises(ValueError, match=f"no nonsense in .*{one.directory.name}"):
        clear_caches(["nonsense", one.directory.name], str(tmp_path))
    assert clear_caches([], str(tmp_path)) == []
    assert clear_caches([two.directory.name], str(tmp_path)) == [two.directory.name]
    assert [entry["name"] for entry in list_caches(str(tmp_path))] == [one.directory.name]
    assert clear_caches(["data"], str(tmp_path)) == [one.directory.name]
    assert contents(tmp_path) == {} and list((tmp_path / "data").iterdir()) == []


def test_a_dataset_in_use_survives_its_clearing(corpus, tmp_path):
    dataset = run(config_of(corpus, tmp_path))
    before = dataset.train.read(0, dataset.train.num_tokens)
    clear_caches(["data"], str(tmp_path))
    np.testing.assert_array_equal(dataset.train.read(0, dataset.train.num_tokens), before)


# --- bad input


@pytest.mark.parametrize("texts", [[], [""], ["", "", ""]])
def test_an_empty_corpus(tmp_path, texts):
    train_tokenizer(documents(), 300).save(str(tmp_path / "tokenizer.json"))
    for tokenizer in ("train", str(tmp_path)):
        config = config_of(write(tmp_path / "a.jsonl", texts), tmp_path, tokenizer=tokenizer)
        for _ in range(2):  # It is no better the second time.
            with pytest.raises(ValueError, match="empty corpus"):
                run(config)
            assert list_caches(str(tmp_path)) == []


def test_two_documents_are_enough_and_one_is_not(tmp_path):
    dataset = run(config_of(write(tmp_path / "2.jsonl", ["first one", "second one"]), tmp_path))
    assert decoded(dataset, "train") == ["first one", ""]
    assert decoded(dataset, "eval") == ["second one", ""]
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be split: .* has 1 documents.*at least 2"):
            run(config_of(write(tmp_path / "1.jsonl", ["first one"]), tmp_path))


def test_a_vocabulary_larger_than_the_models(corpus, tmp_path):
    train_tokenizer(documents(), 300).save(str(tmp_path / "tokenizer.json"))
    config = config_of(corpus, tmp_path, tokenizer=str(tmp_path))
    with pytest.raises(
        ValueError, match="has 300 tokens, and the model takes 299: set --model.voc"
    ):
        run(config, vocab_size=299)
    assert not list(tmp_path.rglob("*.bin"))  # Found before the work.
    run(config, vocab_size=300)
    with pytest.raises(ValueError, match="has 300 tokens, and the model takes 299"):
        run(config, vocab_size=299)  # Found in the cache, too.


def test_a_tokenizer_without_an_end_of_text(corpus, tmp_path):
    with pytest.raises(ValueError, match="data.eos_token: the tokenizer has no <eot>"):
        run(config_of(corpus, tmp_path, eos_token="<eot>"))


def test_a_changed_tokenizer_is_another_dataset(corpus, tmp_path):
    config = config_of(corpus, tmp_path, tokenizer=str(tmp_path))
    train_tokenizer(documents(), 300).save(str(tmp_path / "tokenizer.json"))
    first = run(config)
    train_tokenizer(documents(), 290).save(str(tmp_path / "tokenizer.json"))
    assert run(config).fingerprint != first.fingerprint


def test_a_refusal_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    lines = [*documents(), "caf\udce9"]
    (tmp_path / "a.txt").write_text("\n\n".join(lines), errors="surrogateescape")
    config = DataConfig(source=f"text:{tmp_path}/a.txt", cache_dir=str(tmp_path))
    train_tokenizer(documents(), 300).save(str(tmp_path / "tokenizer.json"))
    for changes in ({}, {"tokenizer": str(tmp_path)}, {"eos_token": "<eot>"}):
        with pytest.raises(ValueError, match=r"not UTF-8|no <eot>"):
            run(dataclasses.replace(config, **changes))
        assert list_caches(str(tmp_path)) == []
    # What is of use to the same command is kept: after other errors, and from the first shard on.
    (tmp_path / "a.txt").write_text("\n\n".join(documents()))
    monkeypatch.setattr(parallel, "encode_documents", Mock(side_effect=OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        run(config)
    assert [entry["num_tokens"] for entry in list_caches(str(tmp_path))] == [0]


def test_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="b.txt: not UTF-8 at byte 3"):
        run(DataConfig(source=f"text:{tmp_path}/*.txt", cache_dir=str(tmp_path)))


def test_any_damage_is_found_and_named(corpus, tmp_path):
    dataset = run(config_of(corpus, tmp_path))
    folder, rng = dataset.directory, random.Random(0)
    files = sorted(path for path in folder.iterdir())
    assert {path.suffix for path in files} == {".bin", ".json", ".numbers"} and len(files) >= 6
    for path in files:
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        for damaged in (bytes(flipped), whole[:-2], whole + b"\0\0", b"", None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            if path.name == "manifest.json":
                if damaged is None:
                    continue  # Then it is unfinished; see the tests of kills.
                message = "manifest.json"
            else:
                message = rf"{path.name} (has [\w,]+ bytes, expected|has crc32c|is missing)"
            with pytest.raises(
                ValueError, match=f"{message}.*jaxlm cache clear {folder.name} --delete --cache_dir"
            ):
                open_dataset(folder, 300)
        path.write_bytes(whole)
    assert open_dataset(folder, 300).fingerprint == dataset.fingerprint


def test_a_file_is_read_in_full_when_new_or_changed_and_by_cache_verify(
    corpus, tmp_path, monkeypatch, capsys
):
    folder = run(config_of(corpus, tmp_path)).directory
    read = []

    def noted(path, **_):
        read.append(path.name)
        return crc32c(path)

    monkeypatch.setattr("jaxlm.data.dataset.crc32c", noted)
    open_dataset(folder, 300)
    assert read == []
    path = folder / "train-00000.bin"
    os.utime(path)
    open_dataset(folder, 300)
    assert read == [path.name]
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="train-00000.bin has crc32c"):
        open_dataset(folder, 300)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that loses a bit
    with pytest.raises(ValueError, match="train-00000.bin has crc32c"):
        open_dataset(folder, 300)
    data[7] ^= 1
    path.write_bytes(data)
    open_dataset(folder, 300)
    before = path.stat()
    data[7] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # noted as read before
    with pytest.raises(ValueError, match="train-00000.bin has crc32c"):
        open_dataset(folder, 300)
    data[7] ^= 1
    path.write_bytes(data)
    open_dataset(folder, 300)
    data[7] ^= 1
    path.write_bytes(data)
    # A disk that decays changes no time.
    stamps = json.loads(checked_path(folder).read_bytes())
    monkeypatch.setattr(
        "jaxlm.data.dataset._stamp",
        lambda _, record: next(stamp for stamp in stamps if stamp.startswith(record["name"])),
    )
    assert open_dataset(folder, 300)
    verify = ["cache", "verify", "--cache-dir", str(tmp_path)]
    assert cli.command(verify) == 1
    assert f"{folder.name}: damaged: train-00000.bin has crc32c" in capsys.readouterr().out
    with pytest.raises(ValueError, match="train-00000.bin has crc32c"):
        open_dataset(folder, 300)
    data[7] ^= 1
    path.write_bytes(data)
    assert cli.command(verify) == 0 and capsys.readouterr().out == f"{folder.name}: sound\n"


def test_a_shard_cut_short_is_found_whatever_was_noted_of_it(corpus, tmp_path):
    folder = run(config_of(corpus, tmp_path)).directory
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:100])
    found = path.stat()
    times = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"
    noted = json.loads(checked_path(folder).read_bytes())
    noted = [
        f"{path.name} {times} {stamp.split()[-1]}" if stamp.startswith(path.name) else stamp
        for stamp in noted
    ]
    checked_path(folder).write_text(json.dumps(noted))
    with pytest.raises(ValueError, match="train-00000.bin has 100 bytes, expected"):
        open_dataset(folder, 300)


def test_each_field_of_the_manifest_is_vouched_for(corpus, tmp_path):
    folder = run(config_of(corpus, tmp_path)).directory
    path = folder / "manifest.json"
    whole = json.loads(path.read_bytes())
    for name in whole.keys() - {"source", "revision", "sizes", "parts", "documents"}:
        path.write_text(json.dumps(whole | {name: None}))
        with pytest.raises(ValueError, match="manifest.json"):
            open_dataset(folder, 300)


def test_text_that_changes_while_it_is_read(tmp_path, monkeypatch):
    corpus = write(tmp_path / "a.jsonl", documents())
    original = prepare.new_tokenizer

    def touch(*args):
        os.utime(corpus)
        return original(*args)

    monkeypatch.setattr(prepare, "new_tokenizer", touch)
    with pytest.raises(ValueError, match="changed while it was read"):
        run(config_of(corpus, tmp_path))
    assert not list(tmp_path.rglob("manifest.json"))


# --- what is counted of it


@pytest.mark.parametrize("eval_tokens", [2_000_000, 700])  # 700: the last document is cut short
def test_held_out_bytes_are_those_of_the_text_that_an_eval_predicts(corpus, tmp_path, eval_tokens):
    dataset = run(config_of(corpus, tmp_path, eval_tokens=eval_tokens))
    texts = decoded(dataset, "eval")
    first = dataset.eval.read(0, 1).tolist()
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    assert dataset.eval_bytes == len("".join(texts).encode()) - len(tokenizer.decode(first))
    assert dataset.eval_bytes > 500 and (dataset.eval.num_tokens == 700) == (eval_tokens == 700)


def test_duplicates_are_dropped_through_a_kill(tmp_path, monkeypatch):
    texts = [text for text in documents(60) if text]
    corpus = write(tmp_path / "a.jsonl", [*texts, "", *texts[::2], *texts[:9]])
    config = config_of(corpus, tmp_path / "whole", drop_duplicates=True)
    whole = run(config)
    found = [*decoded(whole, "train"), *decoded(whole, "eval")]
    assert sorted(found) == ["", "", *sorted(texts)]  # "": after the last EOS
    counts = manifest_of(whole)["documents"]
    assert counts["duplicate"] == len(texts[::2]) + 9 and counts["empty"] == 1
    assert counts["train"] + counts["eval"] == len(texts)

    class StopError(Exception):
        pass

    def stop_in_the_middle(path, data):
        if path.name == "train-00003.bin":
            raise StopError
        return write_record(path, data)

    write_record = splits.write_record
    monkeypatch.setattr(splits, "write_record", stop_in_the_middle)
    config = config_of(corpus, tmp_path / "killed", drop_duplicates=True)
    with pytest.raises(StopError):
        run(config)
    monkeypatch.setattr(splits, "write_record", write_record)
    run(config)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    kept = run(config_of(corpus, tmp_path / "kept"))  # control
    assert len(decoded(kept, "train")) > len(decoded(whole, "train"))


def test_a_prepared_dataset_is_shown(tmp_path):
    texts = [f"{text} once " * 9 for text in documents(60) if text]
    corpus = write(tmp_path / "a.jsonl", [*texts, *texts, ""])
    dataset = run(config_of(corpus, tmp_path))
    said = "\n".join(overview("main", dataset, [dataset.train]))
    assert f"main: {dataset.train.num_tokens:,} training tokens in " in said
    assert f"{dataset.eval_bytes / (dataset.eval.num_tokens - 1):.2f} bytes per token" in said
    assert "dropped: 1 empty documents" in said
    counts = manifest_of(dataset)["documents"]
    assert f"⚠ {counts['eval']} of {counts['eval']} held-out documents have half" in said
    assert f"training, first: {texts[0][:40]!r}"[:-1] in said
    alone = run(config_of(write(tmp_path / "b.jsonl", texts), tmp_path))
    assert "⚠" not in "\n".join(overview("main", alone, [alone.train]))


# --- the data of a run that resumes


def resume(config, before, dataset):
    recorded = Prepared(fingerprint=dataset.fingerprint, source=before.source, limits=[10**6])
    found = prepared.find_or_make(config, vocab_size=300, limits=[10**6], recorded=recorded)
    return found.directory


def test_a_run_resumes_on_its_prepared_tokens_wherever_its_files_are(tmp_path, monkeypatch, lines):
    (tmp_path / "in").mkdir()
    files = [write(tmp_path / "in" / f"{name}.jsonl", documents()[name::2]) for name in (0, 1)]
    config = config_of(tmp_path / "in", tmp_path)
    dataset = run(config)
    monkeypatch.setattr(prepared, "make_dataset", None)  # nothing is prepared again
    lines.clear()
    assert resume(config, config, dataset) == dataset.directory and lines == []
    write(tmp_path / "in" / "2.jsonl", ["added"])
    assert resume(config, config, dataset) == dataset.directory
    assert "of its files have changed since the run began" in lines.pop()
    (tmp_path / "in" / "2.jsonl").unlink()
    (tmp_path / "in").rename(tmp_path / "moved")
    assert resume(config, config, dataset) == dataset.directory
    assert lines.pop().endswith(f"The run needs no source: its tokens are in {dataset.directory}")
    moved = config_of(tmp_path / "moved", tmp_path)
    assert resume(moved, config, dataset) == dataset.directory
    assert "the files have the sizes of those that the run began with" in lines.pop()
    for other in ("embedded", "hf:another/one"):
        with pytest.raises(ValueError, match="whose files are not those of"):
            resume(dataclasses.replace(config, source=other), config, dataset)
    manifest = dataset.directory / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_text(json.dumps(json.loads(whole) | {"sizes": ""}))  # as of a remote source
    with pytest.raises(ValueError, match="whose files are not those of"):
        resume(dataclasses.replace(config, source="hf:another/one"), config, dataset)
    manifest.write_bytes(whole)
    write(tmp_path / "moved" / files[0].name, ["another"])
    with pytest.raises(ValueError, match="moved, whose files are not those of .*/in, which"):
        resume(moved, config, dataset)
    with pytest.raises(FileNotFoundError, match="none"):
        resume(config_of(tmp_path / "none", tmp_path), config, dataset)


def test_without_its_prepared_tokens_a_run_prepares_them_again(corpus, tmp_path):
    config = config_of(corpus, tmp_path)
    dataset = run(config)
    clear_caches([dataset.directory.name], str(tmp_path))
    assert resume(config, config, dataset) == dataset.directory


# --- durable files


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "a", []
    fsync, replace = os.fsync, os.replace

    def note(what, call):
        def noted(*args):
            seen.append((what, path.exists()))
            return call(*args)

        return noted

    monkeypatch.setattr(os, "fsync", note("fsync", fsync))
    monkeypatch.setattr(os, "replace", note("replace", replace))
    write_file(path, b"content")
    assert seen == [("fsync", False), ("replace", False), ("fsync", True)]
    assert path.read_bytes() == b"content" and [p.name for p in tmp_path.iterdir()] == ["a"]


# --- kills, full disks, two at once


def child(corpus, folder, body):
    """A program that prepares as `run` does, after `body`."""
    return f"""
import os, signal, sys
from jaxlm.config import DataConfig
from jaxlm.corpus import encode, prepare, prepared
from jaxlm.corpus.prepared import find_or_make
prepare.SHARD_TOKENS = {SHARD_TOKENS}
for name, value in {SMALL!r}.items():
    setattr(encode, name, value)
def run(folder={str(folder)!r}):
    config = DataConfig(source="text:{corpus}", cache_dir=folder)
    find_or_make(config, vocab_size=300, limits=[10**6])
{body}
run()
"""


# Forks a process per kill, since to start one takes longer than to prepare: process n kills itself
# as it is about to make step n durable.
KILLS = """
for n in range(1000):
    pid = os.fork()
    if pid == 0:
        steps = iter(range(1000))
        def killing(call):
            def step(*args):
                if next(steps) == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)
            return step
        os.replace, os.fsync = killing(os.replace), killing(os.fsync)
        run(sys.argv[1] + "/" + str(n))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if status == 0:
        sys.exit(0)
    assert os.WTERMSIG(status) == signal.SIGKILL
"""


@pytest.mark.slow
def test_a_kill_at_any_step_changes_no_byte(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1200)
    corpus = write(tmp_path / "corpus.jsonl", documents(24))
    run(config_of(corpus, tmp_path / "straight"))
    straight = contents(tmp_path / "straight")
    script = child(corpus, tmp_path, KILLS)
    script = script.replace("SHARD_TOKENS = 4500", "SHARD_TOKENS = 1200")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "killed")], check=True)
    folders = sorted((tmp_path / "killed").iterdir(), key=lambda path: int(path.name))
    assert len(folders) > 20
    unfinished = [not list(folder.rglob("manifest.json")) for folder in folders]
    assert sum(unfinished) > 20
    lines.clear()
    for folder, killed in zip(folders, unfinished, strict=True):
        assert killed == (contents(folder) != straight)
        run(config_of(corpus, folder))
        assert contents(folder) == straight, folder
    # Most of them had shards to go on from.
    assert sum("reading on from document" in line and line[-2:] != " 0" for line in lines) > 15
    assert not any("over" in line for line in lines)


def test_control_of_kills(corpus, tmp_path):
    # Losing the place to go on from must be seen by the comparison above.
    run(config_of(corpus, tmp_path / "straight"))
    folder = run(config_of(corpus, tmp_path / "killed")).directory
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").unlink()
    manifest["next_document"] -= 20
    (folder / "progress.json").write_text(json.dumps(manifest))
    run(config_of(corpus, tmp_path / "killed"))
    assert contents(tmp_path / "killed") != contents(tmp_path / "straight")


@pytest.mark.parametrize("what", ["shard", "revision"])
def test_unfinished_data_that_cannot_be_trusted_is_made_anew(corpus, tmp_path, what, lines):
    dataset = run(config_of(corpus, tmp_path))
    straight = contents(tmp_path)
    manifest = manifest_of(dataset)
    (dataset.directory / "manifest.json").unlink()
    if what == "revision":
        manifest["revision"] = "older"
    else:
        with open(dataset.directory / "train-00001.bin", "r+b") as file:
            file.write(b"\xff")
    (dataset.directory / "progress.json").write_text(json.dumps(manifest))
    lines.clear()
    run(config_of(corpus, tmp_path))
    assert "Starting the preparation over: " + (
        "the source was older" if what == "revision" else "train-00001.bin has crc32c"
    ) in "\n".join(lines)
    assert contents(tmp_path) == straight


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (@LIMIT, resource.RLIM_INFINITY))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is POSIX")
@pytest.mark.parametrize("limit, name", [(2000, "tokenizer.json"), (30_000, "train-00000.bin")])
def test_a_full_disk(corpus, tmp_path, limit, name, monkeypatch):
    straight = run(config_of(corpus, tmp_path / "straight"))
    assert 2000 < (straight.directory / "tokenizer.json").stat().st_size < 30_000
    script = child(corpus, tmp_path / "full", FULL.replace("@LIMIT", str(limit)))
    script = script.replace("SHARD_TOKENS = 4500", "SHARD_TOKENS = 10**9")
    failed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    error = "jaxlm.errors.FileError: [Errno 27] File too large while writing"
    assert last.startswith(error) and name in last
    assert "make room, or set another --data.cache-dir" in last
    left = {path.name for path in (tmp_path / "full").rglob("*") if path.is_file()}
    assert not [file for file in left if file.endswith((".tmp", ".bin"))]
    assert ("progress.json" in left) == (name != "tokenizer.json")
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 10**9)
    assert run(config_of(corpus, tmp_path / "full")).train.num_tokens == straight.train.num_tokens


# Says that it has the lock, and waits for a word before it goes on.
HOLDS = """
original = prepared.make_dataset
def waiting(*args):
    print("locked", flush=True)
    sys.stdin.readline()
    original(*args)
prepared.make_dataset = waiting
"""


@pytest.mark.parametrize("killed", [False, True])
def test_two_at_once(corpus, tmp_path, killed, lines):
    straight = run(config_of(corpus, tmp_path / "straight"))
    config = config_of(corpus, tmp_path / "both")
    script = child(corpus, tmp_path / "both", HOLDS)
    found = []
    lines.clear()
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process is preparing it"):
            clear_caches(["data"], config.cache_dir)
        thread = threading.Thread(target=lambda: found.append(run(config)))
        thread.start()
        deadline_s = time.monotonic() + 10
        while not lines and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert len(lines) == 1 and "Another process is preparing" in lines[0] and not found
        if killed:
            other.send_signal(signal.SIGKILL)
        else:
            other.communicate("go\n")
        thread.join(30)
    assert [dataset.fingerprint for dataset in found] == [straight.fingerprint]
    assert any("Training a tokenizer" in line for line in lines) == killed
    assert other.returncode == (-signal.SIGKILL if killed else 0)


WAITING_WRITER = """
from jaxlm.corpus import parallel
parallel._WAIT_S = 0.3
original = parallel.Writer.encode
def encode(self, first, texts):
    found = original(self, first, texts)
    if not first:
        print("begun", flush=True)
        sys.stdin.readline()
    return found
parallel.Writer.encode = encode
"""


@pytest.mark.parametrize("helper", ["sound", "killed", "damaged", "of another tokenizer"])
def test_a_helper_changes_no_byte(corpus, tmp_path, monkeypatch, helper):
    run(config_of(corpus, tmp_path / "straight"))
    script = child(corpus, tmp_path / "both", WAITING_WRITER)
    helped, original = [], parallel._write

    def write_parts(path, found):
        helped.append(path)
        if helper == "sound":
            original(path, found)
        elif helper == "damaged":
            original(path, found)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(parallel, "_write", write_parts)
    if helper == "of another tokenizer":
        monkeypatch.setattr(parallel.tokenizer_lib, "content_hash", lambda _: "other")
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert "begun\n" in iter(writer.stdout.readline, "")
        thread = threading.Thread(target=lambda: run(config_of(corpus, tmp_path / "both")))
        thread.start()
        if helper != "of another tokenizer":
            deadline_s = time.monotonic() + 10
            while not helped and time.monotonic() < deadline_s:
                time.sleep(0.01)
        writer.communicate("\n")
        thread.join(30)
    assert writer.returncode == 0 and bool(helped) == (helper != "of another tokenizer")
    assert contents(tmp_path / "both") == contents(tmp_path / "straight")


# --- what the user sees


def test_lines_in_a_pipe(corpus, tmp_path, monkeypatch, lines):
    clock = iter(range(0, 10**6, 6))
    monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))
    dataset = run(config_of(corpus, tmp_path))
    assert lines[0].startswith("Training a tokenizer of 300 tokens on text:")
    assert len(lines) > 1 and all(line.startswith("Preparing tokens: ") for line in lines[1:])
    # The corpus ends before the limit; the end of the progress is that of the corpus.
    last = re.search(r"of at most 1,000,000 \((\d+)% done\)$", lines[-1])
    assert dataset.train.num_tokens < 10**5 and last and int(last[1]) > 90


def test_progress_ends_at_the_limit_too(corpus, tmp_path, monkeypatch, lines):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(formats, "_BUFFER_BYTES", 1000)  # read ahead
    run(config_of(corpus, tmp_path), max_tokens=4000)
    shares = [int(line.rpartition("(")[2].split("%")[0]) for line in lines[1:-1]]
    assert shares == sorted(shares) and 10 < shares[0] < 60 and shares[-1] == 100
    assert re.fullmatch(
        r"text:.*: data.max_tokens ended the preparation after 16 documents, some 1\d\.\d% of .*",
        lines[-1],
    )


def test_a_bar_in_a_terminal(corpus, tmp_path, monkeypatch, capsys, lines):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(config_of(corpus, tmp_path))
    assert "Preparing tokens" in capsys.readouterr().err
    assert len(lines) == 1
