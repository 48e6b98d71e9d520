"""Files written to do harm: an error that names the file, and nothing run, waited for or filled.

`python tests/fuzz/fuzz_readers.py` is the long version; what it found is kept here.
"""

import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
import text_run
from fuzz import fuzz_readers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.checkpoints import folder, manifest
from jaxlm.checkpoints.folder import find_checkpoints, read_metadata
from jaxlm.checkpoints.metadata import FORMAT, Metadata
from jaxlm.checkpoints.restore import DamagedArrays
from jaxlm.config import Config, OptimConfig, from_dict, to_dict
from jaxlm.corpus import tokenizer
from jaxlm.data.dataset import open_dataset
from jaxlm.files.strict import parse_json, read_json, validate
from jaxlm.inference.load import load_model
from jaxlm.report.diff import diff_checkpoints
from jaxlm.tracking import metrics
from jaxlm.tracking.rows import Rows

NAMES = [
    *("manifest", "step metadata", "commit", "metadata", "config", "metrics", "events"),
    *("holder", "data manifest", "progress", "tokenizer"),
]


class Shard(TypedDict):
    name: str
    size: int


@dataclasses.dataclass(frozen=True)
class Skip:
    step: int
    why: Literal["spike", "nan"] = "spike"
    loss: float | None = None
    tags: list[str] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "nul", "NaN", "[Infinity]", "-Infinity", "1e999", "[-1e999]", "9" * 25, "9" * 5000,
        '{"a": 1, "a": 1}', "[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 500 + "1",
        "[" * 40 + "]" * 40, r'"\ud800"', "\ufeff1", str(2**63), "1 2", "'a'",
    ],
    ids=lambda text: ascii(text[:12]),
)  # fmt: skip
def test_what_is_not_json_is_refused_by_the_name_of_its_file(tmp_path: Path, text: str):
    path = tmp_path / "hostile.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"hostile\.json: "):
        read_json(path, Any)  # pyright: ignore[reportArgumentType]


def test_only_files_of_a_sane_size_are_read(tmp_path: Path):
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(1 << 40)  # takes no disk, and would take a terabyte of memory
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for ever
    (tmp_path / "device.json").symlink_to("/dev/zero")
    for name in ("large", "pipe", "device"):
        with pytest.raises(ValueError, match=rf"{name}\.json: "):
            read_json(tmp_path / f"{name}.json", dict[str, Any])
    (tmp_path / "latin.json").write_bytes(b'"\xe9"')
    with pytest.raises(ValueError, match=r"latin\.json"):
        read_json(tmp_path / "latin.json", str)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, int, "found True, expected int"),
        (1, bool, "found 1, expected bool"),
        ("1", int, "found '1', expected int"),
        ("1e5", float, "expected float"),
        (True, float, "expected float"),
        (1.0, int, "expected int"),
        (None, str, "expected str"),
        ([1, "a"], list[int], r"\[1\]: found 'a', expected int"),
        ({"a": None}, dict[str, int], r"\['a'\]: found None"),
        ([], dict[str, int], "found \\[\\], expected dict"),
        (1, Literal["a"], "found 1, expected"),
        (True, Literal[1], "found True"),
        ({"name": "x"}, Shard, "size: missing"),
        ({"name": "x", "size": "1"}, Shard, "size: found '1'"),
        ({"step": 1, "extra": 1}, Skip, "extra: not a field"),
        ({}, Skip, "step: missing"),
        ([{"step": 1, "tags": [1]}], list[Skip], r"\[0\]\.tags\[0\]: found 1, expected str"),
        ({"step": 1, "why": "x"}, Skip, "why: found 'x'"),
    ],
)
def test_a_value_of_another_kind_is_refused(value: Any, kind: Any, message: str):
    with pytest.raises(ValueError, match=message):
        validate(value, kind)


def test_a_value_of_its_kind_is_taken_as_it_is():
    assert validate(1, float) == 1 and validate(None, int | None) is None
    assert validate({"name": "x", "size": 1, "more": 2}, Shard)["more"] == 2
    assert validate([{"step": 1, "loss": "-Infinity"}], list[Skip]) == [Skip(1, loss=-math.inf)]
    assert parse_json('"\\ud83d\\ude00é"'.encode(), str) == "😀é"


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1.5, None])
def test_every_loss_survives_strict_json(loss: float | None):
    values = {f.name: None for f in dataclasses.fields(Metadata)} | {
        "step": 1, "tokens_seen": 2, "best_eval_loss": math.inf, "num_worse_evals": 0,
        "final": False, "config": {}, "data": {}, "phases": [], "eval_set": "", "environment": {},
        "bytes_per_token": None,
        "tracking_run_id": "", "lineage": [], "rows": Rows(), "run_id": "",
        "fingerprints": {}, "eval_loss": loss, "format": FORMAT,
    }  # fmt: skip
    metadata = Metadata(**values)
    again = Metadata.from_json(parse_json(json.dumps(metadata.to_json()).encode(), dict[str, Any]))
    assert repr(again) == repr(metadata)


def test_a_config_takes_values_of_its_types_only():
    for name, value in (("num_steps", "9"), ("seed", True), ("z_loss", "0"), ("model", [])):
        with pytest.raises(ValueError, match=f"^{name}: found"):
            from_dict(to_dict(Config()) | {name: value})
    with pytest.raises(ValueError, match=r"^optim\.clip_norm: found inf, expected a finite number"):
        Config(optim=OptimConfig(clip_norm=math.inf))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(JSON)
def test_any_json_is_taken_whole_or_refused(value: Any):
    data = json.dumps(value).encode()
    try:
        taken = parse_json(data, Any)  # pyright: ignore[reportArgumentType]
    except ValueError:
        return
    assert taken == value
    for kind in (int, float, dict[str, float], list[Skip], Shard, Metadata, Config):
        try:
            validate(taken, kind)
        except ValueError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_every_reader_takes_or_refuses_hostile_files(tmp_path: Path, name: str):
    readers = fuzz_readers.make_readers(tmp_path)
    assert list(readers) == NAMES
    taken = fuzz_readers.fuzz(readers[name], 1000, seed=1)
    assert readers[name].tolerant or 0 < taken < 900


def test_the_fuzzer_finds_a_careless_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    careless = lambda path, kind: json.loads(path.read_bytes())  # noqa: E731
    for module, name in ((manifest, "manifest"), (folder, "metadata")):
        with monkeypatch.context() as patch, pytest.raises(BaseException):  # noqa: B017, PT011
            patch.setattr(module, "read_json", careless)
            reader = fuzz_readers.make_readers(tmp_path / name)[name]
            fuzz_readers.fuzz(reader, 2000, seed=1)


# --- found crashes


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return fuzz_readers.make_readers(tmp_path)["manifest"].path.parent


def reseal(step: Path, files: dict[str, Any]) -> None:
    values = {"files": files}
    fuzz_readers._seal_manifest(values)
    (step / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/hostname", "..", "meta/../../../x", "a\0b", "\x1b[2Jx", "x" * 5000]
)
def test_a_manifest_names_files_of_its_step_only(step: Path, tmp_path: Path, name: str):
    (tmp_path / "x").write_bytes(b"")
    reseal(step, {name: {"bytes": 0, "crc32c": 0}})
    line, *_ = manifest.find_damage(step)
    assert line.isprintable()
    assert re.search("leads out of the checkpoint|missing|null|too long", line)


@pytest.mark.parametrize("what", ["file", "folder", "device", "pipe", "dangling"])
def test_nothing_in_a_step_leads_out_of_it(step: Path, tmp_path: Path, what: str):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_bytes(b"")
    target = {"file": tmp_path / "outside" / "x", "folder": tmp_path / "outside"}
    target |= {"device": Path("/dev/zero"), "dangling": tmp_path / "nothing"}
    if what == "pipe":
        os.mkfifo(step / "meta" / "way-out")
    else:
        (step / "meta" / "way-out").symlink_to(target[what])
    assert manifest.find_damage(step) == [
        "meta/way-out: leads out of the checkpoint, or is not a file"
    ]


def test_a_step_may_itself_lie_elsewhere_and_link_inside(step: Path, tmp_path: Path):
    (step / "meta" / "metadata").rename(step / "meta" / ".metadata")
    (step / "meta" / "metadata").symlink_to(".metadata")
    moved = step.rename(tmp_path / "3")
    step.symlink_to(moved)
    assert manifest.find_damage(step) == []


@pytest.mark.parametrize("name", ["x" * 9000, "{" + "[" * 9000, "\x1b[2J", "a\0b"])
@pytest.mark.parametrize("entry", [{"bytes": 0}, {"json_crc32c": 0}])
def test_a_name_of_any_length_gives_a_short_line(step: Path, name: str, entry: dict[str, int]):
    reseal(step, {name: entry})
    line, *_ = manifest.find_damage(step)
    assert line.isprintable() and len(line) < 300


@pytest.mark.parametrize("text", ["{}", "[]", "1", '{"commit_timestamp_nsecs": "x"}'])
def test_a_step_metadata_without_its_time_is_damage(step: Path, text: str):
    (step / "_CHECKPOINT_METADATA").write_text(text)
    assert any("_CHECKPOINT_METADATA: cannot be read" in x for x in manifest.find_damage(step))


@pytest.mark.parametrize("entry", [{}, {"bytes": 1}, {"json_crc32c": 5}, {"crc32c": 1}])
def test_an_entry_that_says_less_is_damage(step: Path, entry: dict[str, int]):
    reseal(step, {"meta/metadata": entry})
    assert manifest.find_damage(step)[0].startswith("meta/metadata: ")


def test_a_metadata_of_another_step_is_refused(step: Path):
    step.rename(step.with_name("4"))
    with pytest.raises(ValueError, match="it is of step 3"):
        read_metadata(step.parent, 4)


@pytest.mark.parametrize("text", ["[]", "{}", '{"checkpoint": []}', '{"checkpoint": {}}', "NaN"])
def test_a_config_json_that_is_none_is_named(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        find_checkpoints(str(tmp_path))


def test_a_checkpoint_folder_that_cannot_be_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": {"directory": "a" * 5000}}))
    with pytest.raises(ValueError, match="cannot be listed"):
        find_checkpoints(str(tmp_path))


@pytest.mark.parametrize("value", ["null", "true", "[1]", '"1e5"', "1e999", "NaN", "9" * 400])
def test_a_metric_that_is_no_number_is_named(tmp_path: Path, value: str):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "a": {value}}}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        metrics.read_metrics(path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "O"}, {"dtype": "<f8"}, {"eval": []}, {"train": 5}, {"eval": [None]},
        {"tokenizer": None}, {"vocab_size": "9"}, {"exhausted": 1},
    ],
)  # fmt: skip
def test_a_data_manifest_is_of_its_types(tmp_path: Path, change: dict[str, Any]):
    reader = fuzz_readers.make_readers(tmp_path)["data manifest"]
    values = json.loads(reader.sample) | change
    fuzz_readers._seal_data(values)
    reader.path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"is damaged: .*manifest\.json"):
        open_dataset(reader.path.parent, 300)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "", "..", "a/b", "a\0", "x" * 300])
def test_a_shard_is_a_file_of_its_folder(tmp_path: Path, name: str):
    reader = fuzz_readers.make_readers(tmp_path)["data manifest"]
    values = json.loads(reader.sample)
    values["train"][0]["name"] = name
    fuzz_readers._seal_data(values)
    reader.path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is damaged: .* is (not the name of a file|missing)"):
        open_dataset(reader.path.parent, 300)


def test_a_tokenizer_that_makes_its_library_panic_is_named(tmp_path: Path):
    values = json.loads(fuzz_readers.make_readers(tmp_path)["tokenizer"].sample)
    values["model"]["continuing_subword_prefix"] = "<u4"
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read"):
        tokenizer.load_tokenizer(tmp_path)


# --- what Orbax reads itself, with a manifest made to fit


def alter_metadata(step: Path, change: dict[str, Any]) -> None:
    path = step / "meta" / "metadata"
    values = json.loads(path.read_bytes())
    values["config"]["model"] |= change
    path.write_text(json.dumps(values))
    manifest.write_manifest(step)


def test_a_config_larger_than_its_arrays_is_never_built(own_home: Path):
    run = own_home / text_run.RUN
    alter_metadata(run / "checkpoints" / "4", {"num_layers": 10**9})
    with pytest.raises(ValueError, match="layers in its config, but only .* arrays; the config"):
        load_model(f"{run}@4")


def test_arrays_larger_than_their_files_are_never_made(own_home: Path):
    run = own_home / text_run.RUN
    step = run / "checkpoints" / "4"
    path = step / "meta" / "metadata"
    values = json.loads(path.read_bytes())
    for entry in values["fingerprints"].values():
        entry[1] = [1 << 30 if size == 512 else size for size in entry[1]]
    path.write_text(json.dumps(values))
    alter_metadata(step, {"vocab_size": 1 << 30})
    with pytest.raises(DamagedArrays, match=r"4/params: .* bytes, for arrays of"):
        load_model(f"{run}@4")


@pytest.mark.parametrize("text", ["null", "[1, 2]", "[" * 5000, '{"tree_metadata": {"a": 1}}'])
def test_what_orbax_cannot_read_is_named(own_home: Path, text: str):
    run = own_home / text_run.RUN
    step = run / "checkpoints" / "4"
    (step / "params" / "_METADATA").write_text(text)
    manifest.write_manifest(step)
    with pytest.raises(DamagedArrays, match="4/params: cannot be read"):
        load_model(f"{run}@4")
    with pytest.raises(DamagedArrays, match="4/params: cannot be read"):
        diff_checkpoints(f"{run}@4", f"{run}@8")


# --- nothing in a checkpoint is executed

RESTORE = """
import json, pathlib, pickle, sys
from jaxlm.checkpoints import folder
from jaxlm.checkpoints import manifest
from jaxlm.device.model import model_factory
from jaxlm.checkpoints.checkpoint import Checkpoints
from jaxlm.config import MeshConfig
from jaxlm.inference.load import load_model
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import blueprint_of
from jaxlm.terminal import log_to

run, bombs = sys.argv[1:]

def restore(run):
    metadata = load_model(run + "@best")[1]
    config = metadata.run_config()
    blueprint = blueprint_of(config, make_mesh(MeshConfig()))
    said, path = [], pathlib.Path(run, "checkpoints")
    checkpoints = Checkpoints(path, config.checkpoint, on_commit=print)
    with log_to(said.append), checkpoints:
        state, metadata = checkpoints.restore_latest(blueprint.abstract)
    assert metadata.step == 12 and not said, said

BAD = ("exec", "compile", "marshal.", "pickle.", "subprocess.", "os.system", "os.exec", "os.fork",
       "os.posix_spawn", "pty.", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "import")
seen, watching = [], False

def watch(event, args):
    if watching and event.startswith(BAD):
        seen.append((event, str(args)[:200]))

def events_of(run):
    global watching
    seen.clear()
    watching = True
    try:
        restore(run)
    except Exception:
        assert run == bombs
    finally:
        watching = False
    return list(seen)

sys.addaudithook(watch)
restore(run)  # imports, and what JAX compiles
clean = events_of(run)
folder.read_json = lambda path, kind: pickle.loads(path.read_bytes())  # the sabotage
manifest._step_damage = lambda path: []
print(json.dumps([clean, events_of(bombs)]))
"""


class Bomb:
    def __reduce__(self):
        return exec, ("open('exploded', 'w').close()",)


@pytest.mark.slow
def test_a_restore_executes_nothing(own_home: Path):
    """The control, in the same process: a restore that unpickles is seen."""
    run, bombs = own_home / text_run.RUN, own_home / "bombs"
    shutil.copytree(run, bombs)
    for step in (4, 8, 12):
        folder_of_step = bombs / "checkpoints" / str(step)
        (folder_of_step / "meta" / "metadata").write_bytes(pickle.dumps(Bomb()))
        manifest.write_manifest(folder_of_step)
    (bombs / "config.json").unlink()
    command = [sys.executable, "-c", RESTORE, str(run), str(bombs)]
    environment = {**os.environ, "PYTHONPATH": str(text_run.REPO)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=own_home, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    clean, careless = json.loads(done.stdout.splitlines()[-1])
    assert clean == []
    assert {"pickle.find_class", "exec", "compile"} <= {event for event, _ in careless}
