"""Text in object stores gives the documents that the same files give on this machine."""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from test_bucket import server, store  # noqa: F401  (fixtures)

from jaxlm.config import DataConfig
from jaxlm.corpus import formats
from jaxlm.corpus.prepared import find_or_make
from jaxlm.corpus.sources import open_source


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    rows = [{"text": f"row {n} " * 30} for n in range(40)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "more/b.txt.gz").write_bytes(gzip.compress(b"to be or not to be\n\n" * 400))
    table = pa.table({"text": [f"in a table {n}" for n in range(30)]})
    pyarrow.parquet.write_table(table, folder / "more/c.parquet", row_group_size=7)
    return folder


@pytest.fixture
def memory(texts: Path) -> Iterator[Any]:
    """A store of fsspec in memory, with those files."""
    system = fsspec.filesystem("memory")
    for path in filter(Path.is_file, texts.rglob("*")):
        system.pipe(f"/bucket/texts/{path.relative_to(texts)}", path.read_bytes())
    yield system
    system.store.clear()


def documents(source: str, start: int = 0) -> list[str]:
    return [of.text for of in open_source(DataConfig(source=f"text:{source}")).documents(start)]


def revision(source: str) -> str:
    return open_source(DataConfig(source=f"text:{source}")).revision


def test_the_documents_are_those_of_the_files(texts: Path, memory: Any, monkeypatch) -> None:
    monkeypatch.setattr(formats, "BLOCK_BYTES", 700)
    whole = documents(str(texts))
    assert len(whole) > 70
    for folder in ("memory://bucket/texts", "memory://bucket/texts/", "memory://bucket/**/*"):
        assert documents(folder) == whole
    assert documents("memory://bucket/texts", start=20) == whole[20:]
    for pattern in ("*.jsonl", "more/*", "[a-b]*", "**/*.parquet"):
        assert documents(f"memory://bucket/texts/{pattern}") == documents(f"{texts}/{pattern}")


def test_names_with_signs_of_a_pattern_are_found(memory: Any) -> None:
    memory.pipe("/bucket/[v1] set/[a].txt", b"here it is")
    for path in ("[v1] set", "[v1] set/[a].txt", "[v1] set/*.txt"):
        assert documents(f"memory://bucket/{path}") == ["here it is"]


def test_an_object_that_changes_is_another_corpus(memory: Any) -> None:
    before = revision("memory://bucket/texts")
    assert revision("memory://bucket/texts") == before
    memory.pipe("/bucket/texts/a.jsonl", memory.cat("/bucket/texts/a.jsonl"))
    assert revision("memory://bucket/texts") != before


def test_what_cannot_be_read_is_named(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/x/\*: no object matches"):
        documents("memory://bucket/x/*")
    with pytest.raises(ValueError, match="found http://host/a.txt, expected s3:// or gs://"):
        documents("http://host/a.txt")
    with pytest.raises(ValueError, match="found files in a store, expected files on this machine"):
        find_or_make_tokens()
    found = open_source(DataConfig(source="text:memory://bucket/texts/a.jsonl")).documents(0)
    memory.rm("/bucket/texts/a.jsonl")
    with pytest.raises(FileNotFoundError, match="a.jsonl: no such object"):
        next(found)
    monkeypatch.setattr(memory, "glob", lambda *_, **__: 1 / 0)
    with pytest.raises(OSError, match="cannot be read .ZeroDivisionError.*the credentials"):
        documents("memory://bucket/texts/*")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ImportError, match="s3://x/.*: needs the extra stores"):
        documents("s3://x/*.jsonl")


def find_or_make_tokens() -> None:
    from jaxlm.corpus.tokens import link_tokens

    config = DataConfig(source="tokens:memory://bucket/*.bin", tokenizer="t.json")
    link_tokens(config, vocab_size=300, limits=[1])


@pytest.mark.slow
def test_a_bucket_of_google_gives_the_same_tokens(texts: Path, store: Any, tmp_path: Path):  # noqa: F811
    for path in filter(Path.is_file, texts.rglob("*")):
        store.blob(f"corpus/{path.relative_to(texts)}").upload_from_filename(path)
    datasets = [
        find_or_make(
            DataConfig(source=f"text:{place}", cache_dir=str(tmp_path / f"cache{number}")),
            vocab_size=300,
            limits=[10**6],
        )
        for number, place in enumerate((texts, "gs://bucket/corpus"))
    ]
    assert datasets[0].fingerprint == datasets[1].fingerprint
    assert datasets[0].train.num_tokens > 1000
