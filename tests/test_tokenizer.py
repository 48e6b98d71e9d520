import json
import random
import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxlm.corpus import remote
from jaxlm.corpus import tokenizer as tokenizer_lib
from jaxlm.corpus.tokenizer import (
    content_hash,
    find_eos,
    load_tokenizer,
    num_ids,
    train_tokenizer,
)


def documents(count=200, seed=0):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=60)) for _ in range(count)]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(documents(), 400)


def test_training_is_reproducible_to_the_byte(trained):
    again = train_tokenizer(iter(documents()), 400)
    assert again.to_str() == trained.to_str()
    other = train_tokenizer(documents(seed=1), 400)
    assert other.to_str() != trained.to_str()  # control


@pytest.mark.parametrize("text", ["abc  de\n\n\tf", "naïve 日本語 🎯 ‮", "\x00\x7f\r\n", " a", "a "])
def test_any_text_survives(trained, text):
    assert trained.decode(trained.encode(text).ids) == text


def test_vocabulary(trained):
    assert num_ids(trained) == trained.get_vocab_size() == 400
    assert find_eos(trained, None) == 0
    assert num_ids(train_tokenizer(["tiny"], 5000)) < 300


def test_only_the_sample_is_read(monkeypatch, trained):
    monkeypatch.setattr(tokenizer_lib, "_SAMPLE_BYTES", 20_000)
    read = []

    def source():
        for document in documents():
            read.append(document)
            yield document

    tokenizer = train_tokenizer(source(), 400)
    assert 20_000 <= sum(map(len, read)) < 21_000
    assert tokenizer.to_str() == train_tokenizer(read, 400).to_str() != trained.to_str()


@pytest.mark.parametrize("text", [[], [""], ["", ""]])
def test_training_on_nothing_is_refused(text):
    with pytest.raises(ValueError, match="empty corpus"):
        train_tokenizer(text, 400)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="model.vocab_size: found 256, expected at least 257"):
        train_tokenizer(documents(), 256)
    assert num_ids(train_tokenizer(documents(), 257)) == 257


def test_loads_a_file_or_its_folder(trained, tmp_path):
    trained.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        assert content_hash(load_tokenizer(path)) == content_hash(trained)


def test_loading_switches_off_what_changes_a_text(trained, tmp_path):
    other = Tokenizer.from_str(trained.to_str())
    other.enable_truncation(4)
    other.enable_padding(length=8)
    other.model.dropout = 0.5
    other.save(str(tmp_path / "tokenizer.json"))
    loaded, text = load_tokenizer(tmp_path), documents()[0]
    assert content_hash(loaded) == content_hash(trained) != content_hash(other)
    assert loaded.encode(text).ids == trained.encode(text).ids and len(other.encode(text).ids) == 8


def test_loading_leaves_no_chance_to_unigram(tmp_path):
    model = models.Unigram([("<unk>", 0.0), *((c, -1.0) for c in ("a", "b", "ab"))], unk_id=0)
    model.alpha, model.nbest_size = 0.1, 64
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.model.alpha is loaded.model.nbest_size is None
    assert len({tuple(loaded.encode("abab" * 20).ids) for _ in range(20)}) == 1


def test_fingerprint_sees_one_changed_merge(trained):
    changed = json.loads(trained.to_str())
    merges = changed["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]
    assert content_hash(Tokenizer.from_str(json.dumps(changed))) != content_hash(trained)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 3}', b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer {path}: cannot be read"):
        load_tokenizer(path)


@pytest.mark.parametrize("name", ["./no/such", "missing.json", "/no/such/file", "a/b/c", "~/no"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match="data.tokenizer: no file .*expected train"):
        load_tokenizer(name)


def test_a_hub_name_without_a_hub_fails_at_once(monkeypatch, tmp_path):
    start_s = time.monotonic()
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="no-one/nothing: cannot reach http://127.0.0.1:9"):
        load_tokenizer("no-one/nothing")
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE.*give the path"):
        load_tokenizer("no-one/nothing")
    assert time.monotonic() - start_s < 5


def test_a_hub_name_used_before_needs_no_hub(monkeypatch, tmp_path, trained):
    trained.save(str(tmp_path / "tokenizer.json"))
    path = str(tmp_path / "tokenizer.json")
    monkeypatch.setattr(remote.huggingface_hub, "try_to_load_from_cache", lambda *_: path)
    monkeypatch.setattr(remote, "require_network", None)
    assert content_hash(load_tokenizer("some/name")) == content_hash(trained)


def word_tokenizer(*words):
    tokenizer = Tokenizer(models.WordLevel({w: 10 * i for i, w in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_eos_is_found_by_its_usual_names():
    assert find_eos(word_tokenizer("a", "</s>"), None) == 10
    assert find_eos(word_tokenizer("a", "</s>", "<|endoftext|>"), None) == 20
    assert find_eos(word_tokenizer("a", "</s>", "stop"), "stop") == 20


def test_no_eos_names_what_there_is(trained):
    with pytest.raises(ValueError, match="has no <eot>.*--data.eos-token.*endoftext"):
        find_eos(trained, "<eot>")
    with pytest.raises(ValueError, match="data.eos_token: the tokenizer has no <|endoftext|>"):
        find_eos(word_tokenizer("a", "b"), None)


def test_ids_with_gaps_count_in_full():
    assert num_ids(word_tokenizer("a", "b", "c")) == 21
