"""Feeds every reader of files from disk with hostile ones; a crash prints the input and ends it.

    python tests/fuzz/fuzz_readers.py --runs 1000000 [--reader metadata] [--seed 0]

A reader may return or raise a ValueError, within a second of CPU and 4 GiB; all else is a crash,
and gets a test in tests/test_hostile.py. With `--atheris` (Python 3.11, `pip install atheris`),
libFuzzer chooses the inputs by the lines that they reach.
"""

import argparse
import json
import math
import random
import resource
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jaxlm.checkpoints import folder, manifest  # noqa: E402
from jaxlm.checkpoints.metadata import Metadata  # noqa: E402
from jaxlm.corpus import cache, prepare, splits, tokenizer  # noqa: E402
from jaxlm.data import dataset  # noqa: E402
from jaxlm.files import lock  # noqa: E402
from jaxlm.tracking import events, metrics  # noqa: E402
from jaxlm.tracking.rows import Rows  # noqa: E402

DEEP = 3_000
HOSTILE = [
    *"null true false 0 -1 1 1.5 1e999 -1e999 1e308 -0.0 [] {} [null]".split(),
    "NaN", "Infinity", "-Infinity",
    str(2**63 - 1), str(2**63), str(-(2**63)), "9" * 5000, "1" * 400, "1" * 400 + ".5",
    '""', '"x"', '".."', '"."', '"../../x"', '"/etc/passwd"', '"/dev/zero"', r'"\u0000"',
    r'"\ud800"', r'"\u001b[2J"', '"NaN"', '"Infinity"', '"1"', '"true"', '"O"', '"<f8"', '"<u4"',
    '"' + "a" * 5000 + '"', "[" * DEEP, "[" * DEEP + "]" * DEEP, '{"a":' * 500 + "1" + "}" * 500,
    "[" * 40 + "]" * 40, '{"a": 1, "a": 2}', '{"x": NaN}', "[1e999]", "", "{", ",", '"', "\udcff",
]  # fmt: skip


class Reader(NamedTuple):
    """A file, a sound content of it, and who reads it."""

    path: Path
    sample: str
    read: Callable[[], object]
    seal: Callable[[dict[str, Any]], None] = lambda values: None
    """Makes the checksum inside a mutated file right again."""
    tolerant: bool = False
    """It takes what it cannot read for absent; else the error names the file."""


def make_readers(home: Path) -> dict[str, Reader]:
    """All readers, each with a folder of its own in which all but its own file is sound."""
    return _checkpoint_readers(home) | _run_readers(home) | _data_readers(home)


def _checkpoint_readers(home: Path) -> dict[str, Reader]:
    found = {}
    prints = {
        "params/w": ["float32", [2, 3], 123456789, 987654321],
        "state/step": ["int32", [], 1, 2],
    }
    config = {"model": {"num_layers": 2, "rope_theta": 1e4, "compute_dtype": "auto"}}
    config |= {"optim": {"clip_norm": None}, "data": {"eos_token": "x"}, "num_steps": 1200}
    metadata = Metadata(
        3, 384, 2.5, 2.5, 3, 0, True, config,
        {"main": {"fingerprint": "abc", "source": "x", "limits": [9], "eval_tokens": 9}},
        [{"step": 0, "shares": {"main": 1}, "stages": {}}], "main abc", 4.5, 1,
        {"cores": 2, "versions": {"jax": "0"}},
        "0a1b2c3d", [{"step": 1, "changed": ["a: was 1, is 2"]}],
        Rows(9, 7), "x", prints,
    )  # fmt: skip
    for name in ("manifest", "step metadata", "commit", "metadata"):
        step = home / name / "checkpoints" / "3"
        (step / "meta").mkdir(parents=True)
        (step / "meta" / "metadata").write_text(json.dumps(metadata.to_json()))
        times = {"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": None, "custom_metadata": {}}
        (step / "_CHECKPOINT_METADATA").write_text(json.dumps({"metrics": {"a": 1.5}, **times}))
        manifest.write_manifest(step)
        (step / "commit_success.txt").write_text(f"Checkpoint commit was successful to {step}")
        assert manifest.find_damage(step) == []

        def find_damage(step: Path = step) -> None:
            for line in manifest.find_damage(step):
                assert line.isprintable() and len(line) < 6000, line

        file = {"manifest": "manifest.json", "step metadata": "_CHECKPOINT_METADATA"}
        path = step / file.get(name, "commit_success.txt")
        found[name] = Reader(path, path.read_text(), find_damage, _seal_manifest, tolerant=True)

    def read_metadata() -> None:
        read = folder.read_metadata(step.parent, 3)
        assert type(read.step) is int and isinstance(read.best_eval_loss, float | int)
        json.dumps(read.to_json(), allow_nan=False).encode()
        folder.find_best({3: read.eval_loss})
        read.run_config()

    path = step / "meta" / "metadata"
    return found | {"metadata": Reader(path, path.read_text(), read_metadata)}


def _seal_manifest(values: dict[str, Any]) -> None:
    body = json.dumps(values.get("files"), sort_keys=True)
    values["crc32c"] = google_crc32c.value(body.encode())


def _run_readers(home: Path) -> dict[str, Reader]:
    run = home / "run"
    (run / "checkpoints").mkdir(parents=True)
    rows = [{"step": 0, "eval/loss": 3.0}, {"step": 1, "train/loss": "NaN"}, {"step": 2, "a": 1}]

    def read_metrics() -> None:
        read = metrics.read_metrics(run / "metrics.jsonl")
        assert all(type(row["step"]) is int for row in read)
        b"".join(metrics._line(row) for row in read)

    def read_what_happened() -> None:
        found, unreadable = events.read_events(run / events.NAME)
        assert all(line.isprintable() for line in unreadable)
        assert all(type(step) is int for step in events.checkpoints_left(found).values())
        events.Events(run / events.NAME).compare(["4", "8.corrupt"], {})
        assert not events.read_events(run / events.NAME)[1] or unreadable

    def read_holder() -> None:
        assert lock.describe_holder(run)

    line = {"time": "2026-01-31T23:59:59Z", "event": "save", "step": 4, "why": "every 4"}
    line["checkpoint"] = "4"
    start = line | {"event": "start", "host": "here", "pid": 1, "environment": {"cores": 2}}
    aside = line | {"event": "set aside", "checkpoint": "4.corrupt"}
    happened = "".join(json.dumps(event) + "\n" for event in (start, line, aside))
    holder = json.dumps({"host": "here", "pid": 1234, "started": "Mon Jan  1 00:00:00 2024"})
    config = json.dumps({"checkpoint": {"directory": None, "keep_latest": 3}, "num_steps": 12})
    return {
        "config": Reader(run / "config.json", config, lambda: folder.find_checkpoints(str(run))),
        "metrics": Reader(run / "metrics.jsonl", "\n".join(map(json.dumps, rows)), read_metrics),
        "events": Reader(run / events.NAME, happened, read_what_happened, tolerant=True),
        "holder": Reader(run / lock.HOLDER, holder, read_holder, tolerant=True),
    }


def _data_readers(home: Path) -> dict[str, Reader]:
    trained = tokenizer.train_tokenizer(["to be or not to be " * 9], 280).to_str()
    found = {}
    for name in ("data manifest", "progress"):
        place = home / name / "data" / "text-0"
        place.mkdir(parents=True)
        values: dict[str, Any] = {"source": "text:x", "revision": "r", "format": 1}
        values |= {"tokenizer": splits.write_record(place / "tokenizer.json", trained.encode())}
        for split in ("train", "eval"):
            record = splits.write_record(place / f"{split}-00000.bin", bytes(20))
            values |= {split: [{**record, "offset": 0, "num_tokens": 10}]}
        values |= {"next_document": 4, "vocab_size": 280, "eos_id": 0, "dtype": "<u2"}
        values |= {
            "exhausted": True,
            "sizes": "",
            "parts": {"text:x": [10, 10]},
            "eval_bytes": 9,
            "begun": 0,
            "stages": [10],
            "numbers": {},
        }
        values |= {"documents": {"train": 1, "eval": 1}}
        values["fingerprint"] = dataset.manifest_fingerprint(values)
        sample = json.dumps(values)

        def open_data(place: Path = place) -> None:
            assert all(
                entry["num_bytes"] >= 0 for entry in cache.list_caches(str(place.parents[1]))
            )
            read = dataset.open_dataset(place, 300)
            assert read.train.num_tokens > 0 and read.train.read(0, 1).dtype.kind == "u"

        def resume(place: Path = place) -> None:
            source: Any = types.SimpleNamespace(name="text:x", revision="r", sizes="")
            sound = {path: path.read_bytes() for path in place.iterdir()}
            read = prepare._progress(place, source)
            assert read["next_document"] >= 0 and sum(s["num_tokens"] for s in read["train"]) >= 0
            for path, content in sound.items() if not any(place.iterdir()) else ():
                path.write_bytes(content)

        if name == "progress":
            found[name] = Reader(place / cache.PROGRESS, sample, resume, tolerant=True)
        else:
            found[name] = Reader(place / dataset.MANIFEST, sample, open_data, _seal_data)
    path = home / "tokenizer.json"
    read_tokenizer = Reader(
        path, trained, lambda: tokenizer.num_ids(tokenizer.load_tokenizer(path))
    )
    return found | {"tokenizer": read_tokenizer}


def _seal_data(values: dict[str, Any]) -> None:
    values["fingerprint"] = dataset.manifest_fingerprint(values)


def spans_of(text: str) -> list[tuple[int, int]]:
    """Start and end of every value, key and pair in a JSON text, or of every line's."""
    found, decode = [], json.JSONDecoder().raw_decode

    def walk(start: int) -> int:
        value, end = decode(text, start)
        found.append((start, end))
        if isinstance(value, dict | list):
            at = start + 1
            while text[at] not in "]}":
                item = at
                if isinstance(value, dict):
                    at = decode(text, item)[1]
                    found.append((item, at))
                    at += text[at:].index(":") + 1
                    at += len(text[at:]) - len(text[at:].lstrip())
                at = walk(at)
                found.append((item, at))
                at += len(text[at:]) - len(text[at:].lstrip(" ,"))
        return end

    at = 0
    while at < len(text) and text[at] in "{[":
        at = walk(at) + 1
    return found or [(i, i + 1) for i in range(len(text))]


def mutate(text: str, spans: list[tuple[int, int]], rng: random.Random) -> str:
    """One to three of its parts replaced, doubled, dropped or swapped, or a letter changed."""
    for start, end in sorted(rng.sample(spans, min(len(spans), rng.choice((1, 1, 1, 2, 3)))))[::-1]:
        choice, part = rng.random(), text[start:end]
        if choice < 0.6:
            part = rng.choice(HOSTILE)
        elif choice < 0.75:
            other = rng.choice(spans)
            part = text[other[0] : other[1]]
        elif choice < 0.85:
            part = f"{part}, {part}"
        elif choice < 0.95 and part:
            at = rng.randrange(len(part))
            part = part[:at] + chr(rng.randrange(256)) + part[at + 1 :]
        else:
            return text[:start]
        text = text[:start] + part + text[end:]
    return text


def sealed(data: bytes, seal: Callable[[dict[str, Any]], None]) -> bytes:
    """The same with its checksum made right, if it is JSON at all."""
    try:
        values = json.loads(data)
        seal(values)
        return json.dumps(values).encode()
    except (ValueError, RecursionError, TypeError, AttributeError):
        return data


def feed(reader: Reader, data: bytes) -> bool:
    """Whether the reader took it; raises whatever counts as a crash."""
    reader.path.write_bytes(data)
    start_s = time.process_time()
    try:
        reader.read()
        return True
    except ValueError as error:
        where = str(reader.path.parents[1])
        assert reader.tolerant or where in str(error) or "of step 3" in str(error), error
        return False
    finally:
        assert time.process_time() - start_s < 1, "it hangs"


def fuzz(reader: Reader, runs: int, seed: int) -> int:
    """Feeds `runs` mutated files; returns how many were taken."""
    rng, spans, taken = random.Random(seed), spans_of(reader.sample), 0
    assert feed(reader, reader.sample.encode()), "the sample itself is sound"
    for number in range(runs):
        data = mutate(reader.sample, spans, rng).encode(errors="surrogateescape")
        if number % 2:
            data = sealed(data, reader.seal)
        try:
            taken += feed(reader, data)
        except BaseException:
            print(f"crash of run {number}: {data[:3000]!r}")
            raise
    return taken


def fuzz_by_coverage(reader: Reader, runs: int, seed: int) -> None:
    """The same with inputs of libFuzzer; ends the process."""
    import atheris

    readers = "files.strict checkpoints.manifest checkpoints.folder tracking.metrics"
    for module in f"{readers} corpus.cache data.dataset".split():
        for value in list(vars(sys.modules[f"jaxlm.{module}"]).values()):
            if isinstance(value, types.FunctionType) and value.__module__.startswith("jaxlm."):
                atheris.instrument_func(value)
    rng, spans = random.Random(seed), spans_of(reader.sample)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        rng.seed(seed)
        if rng.random() < 0.5:
            return atheris.Mutate(data, max_size)
        return mutate(reader.sample, spans, rng).encode(errors="surrogateescape")[:max_size]

    def one(data: bytes) -> None:
        feed(reader, sealed(data, reader.seal) if len(data) % 2 else data)

    flags = [f"-runs={runs}", f"-seed={seed + 1}", "-max_len=20000", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *flags], one, custom_mutator=mutator)
    atheris.Fuzz()


def main() -> None:
    """Parses the flags and prints a line for each reader."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100_000, help="inputs per reader")
    parser.add_argument("--reader", help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="by coverage; needs --reader")
    flags = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as home:
        for name, reader in make_readers(Path(home)).items():
            if flags.reader in (None, name):
                start_s = time.monotonic()
                if flags.atheris:
                    fuzz_by_coverage(reader, flags.runs, flags.seed)
                taken = fuzz(reader, flags.runs, flags.seed)
                took_s = math.ceil(time.monotonic() - start_s)
                print(
                    f"{name}: {flags.runs:,} inputs, {taken:,} taken, no crash, {took_s} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
