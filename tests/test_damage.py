"""Damage of every kind to every file of a real run: none of it is restored in silence.

Silent means: a restore, by a trainer or by a reader, that reports nothing, and whose state,
metadata or choice of best is not what was saved.
"""

import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from flax import nnx
from text_run import give_to_another_run
from tiny_run import data, tiny_config

from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.checkpoint import CheckpointError, Checkpoints
from jaxlm.checkpoints.folder import Best, list_corrupt, list_steps, read_metadata, select
from jaxlm.checkpoints.manifest import NAME, find_damage
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.restore import items_of
from jaxlm.config import CheckpointConfig, Config, MeshConfig, OptimConfig
from jaxlm.device.fingerprint import fingerprint
from jaxlm.device.model import model_factory
from jaxlm.device.optim import make_optimizer
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import make_blueprint
from jaxlm.inference.load import load_model
from jaxlm.terminal import log_to
from jaxlm.training.resume import plan_resume
from jaxlm.training.train import train

STEPS, BEST, LATEST = [3, 6, 9, 12], 9, 12
# Large enough for arrays that Orbax keeps apart from its index: that has checksums, the arrays have
# none, and are restored wrong without a word.
MODEL = replace(tiny_config("unused").model, d_model=64, d_ff=96)


def config_of(run_dir: Path | str, **changes: Any) -> Config:
    checkpoint = {"save_interval": 3, "keep_latest": 9}
    return tiny_config(run_dir, model=MODEL, checkpoint=checkpoint, **changes)


CONFIG = config_of("unused")
BLUEPRINT = make_blueprint(
    model_factory(CONFIG.model, "cpu"),
    partial(make_optimizer, CONFIG.optim),
    make_mesh(MeshConfig(), jax.devices()[:2]),
)
KINDS = {
    "arrays": "*/d/*",
    "arrays, as each process wrote them": "*/ocdbt.process_0/d/*",
    "indices of the arrays": "*/manifest.ocdbt",
    "indices of each process": "*/ocdbt.process_0/manifest.ocdbt",
    "structure": "*/_METADATA",
    "shardings": "*/_sharding",
    "commits of the items": "*/commit_success.txt",
    "metadata": "meta/metadata",
    "metrics": "metrics/metrics",
    "step metadata": "_CHECKPOINT_METADATA",
    "manifest": NAME,
    "commit": "commit_success.txt",
}


RUINOUS = OptimConfig(learning_rate=3.0, warmup_steps=2)


def run_to_twelve(run_dir: Path) -> None:
    """Nine steps that learn, then three that ruin it: the best is not the latest."""
    train(config_of(run_dir, num_steps=9), **data())
    train(config_of(run_dir, optim=RUINOUS), **data())


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a finished run; only to be read."""
    run_dir = tmp_path_factory.mktemp("pristine")
    run_to_twelve(run_dir)
    folder = run_dir / "checkpoints"
    assert list_steps(folder) == STEPS
    assert select(str(folder)).step == BEST
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(pristine, tmp_path / "checkpoints")


class Had(NamedTuple):
    """What one has of a checkpoint folder."""

    fingerprints: dict[str, list[Any]]
    metadata: Metadata
    best: Best | None


def saved(pristine: Path, step: int = LATEST, best: int = BEST) -> Had:
    """What there was to have."""
    metadata = read_metadata(pristine, step)
    loss = read_metadata(pristine, best).eval_loss
    assert loss is not None
    return Had(metadata.fingerprints, metadata, Best(best, loss))


def trained_on(folder: Path, **config: Any) -> tuple[Had, list[str]]:
    """What a trainer goes on with, and what it reports."""
    warnings: list[str] = []
    checkpoints = Checkpoints(folder, CheckpointConfig(**config), on_commit=lambda *_: None)
    with log_to(warnings.append), checkpoints:
        restored = checkpoints.restore_latest(BLUEPRINT.abstract)
        assert restored is not None
        state, metadata = restored
        return Had(fingerprint(items_of(state)), metadata, checkpoints.best), warnings


def read(folder: Path, which: str) -> tuple[Any, Metadata, list[str]]:
    """The params that a reader gets, their metadata, and what is reported."""
    said: list[str] = []
    with log_to(said.append):
        model, metadata = load_model(f"{folder}@{which}")
    params = fingerprint({"params": nnx.to_pure_dict(nnx.state(model))})
    return params, metadata, [line for line in said if line.startswith("Warning")]


def is_silent(folder: Path, pristine: Path) -> bool:
    """Whether a trainer or a reader is given something else without a word."""
    for which, step in (("best", BEST), ("latest", LATEST)):
        try:
            params, metadata, reports = read(folder, which)
        except (ValueError, OSError):
            continue
        expected = read_metadata(pristine, step)
        wanted = {k: v for k, v in expected.fingerprints.items() if k.startswith("params/")}
        if not reports and (params, metadata) != (wanted, expected):
            return True
    try:
        had, reports = trained_on(folder)  # last: it sets aside what is damaged
    except (CheckpointError, ValueError, OSError):
        return False
    return not reports and had != saved(pristine)


def files_of(step_folder: Path) -> list[Path]:
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def kind_of(path: Path, step_folder: Path) -> str:
    """The kind of a file; each has one."""
    name = path.relative_to(step_folder)
    own = [kind for kind, glob in KINDS.items() if len(name.parts) == len(Path(glob).parts)]
    (kind,) = [kind for kind in own if name.match(KINDS[kind])]
    return kind


def flips(path: Path, count: int, rng: random.Random) -> Iterator[str]:
    """Flips single bits, one at a time; yields which, and brings the file back after each."""
    sound = path.read_bytes()
    places = range(8 * len(sound))
    for place in rng.sample(places, min(count, len(places))):
        flipped = bytearray(sound)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        yield f"{path}, bit {place}"
        path.write_bytes(sound)


def count_flips(
    folder: Path, pristine: Path, per_file: dict[int, int], seed: int, *, look_first: bool
) -> tuple[dict[str, int], int, list[str]]:
    """Flips bits in every file of some steps.

    Args:
      folder: to be damaged.
      pristine: what it is a copy of.
      per_file: step -> flips in each of its files.
      seed: which bits.
      look_first: restore only what the look at the files does not report.

    Returns:
      Flips by kind of file, how many of them were restored from, and the silent ones.
    """
    rng, kinds, restored, silent = random.Random(seed), dict.fromkeys(KINDS, 0), 0, []
    for step, count in per_file.items():
        for path in files_of(pristine / str(step)):
            kind = kind_of(path, pristine / str(step))
            for name in flips(folder / path.relative_to(pristine), count, rng):
                kinds[kind] += 1
                if look_first and find_damage(folder / str(step)):
                    continue
                restored += 1
                if is_silent(folder, pristine):
                    silent.append(name)
                for aside in list_corrupt(folder):
                    (folder / aside).rename(folder / aside.partition(".")[0])
    return kinds, restored, silent


def test_no_flipped_bit_is_silent(folder: Path, pristine: Path) -> None:
    per_file = {LATEST: 6, BEST: 3, 6: 2}
    kinds, restored, silent = count_flips(folder, pristine, per_file, seed=0, look_first=True)
    assert sum(kinds.values()) >= 400 and min(kinds.values()) >= 11, kinds
    assert silent == []
    # Those in what Orbax writes after the manifest, and that mean the same: the time of the commit,
    # and the path of the folder as it then was.
    assert 3 < restored < 20
    assert not is_silent(folder, pristine)


@pytest.mark.slow
def test_no_flipped_bit_is_silent_on_the_whole_way(folder: Path, pristine: Path) -> None:
    per_file = {LATEST: 4, BEST: 3}
    kinds, restored, silent = count_flips(folder, pristine, per_file, seed=1, look_first=False)
    assert restored == sum(kinds.values()) >= 250
    assert silent == []
    per_file = dict.fromkeys(STEPS, 60)
    kinds, _, silent = count_flips(folder, pristine, per_file, seed=2, look_first=True)
    assert sum(kinds.values()) >= 9_000
    assert silent == []


def test_large_files_are_read_once_and_no_flip_in_them_is_silent(
    folder: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_SMALL_BYTES", 1 << 14)  # else the look at the files reads all
    looked, damage = [], Checkpoints.damage
    monkeypatch.setattr(Checkpoints, "damage", lambda *of: looked.append(of[1]) or damage(*of))
    assert trained_on(folder) == (saved(pristine), []) and looked == [BEST]
    alone = shutil.copytree(folder, folder.parent / "alone")
    shutil.rmtree(alone / str(LATEST))
    assert trained_on(alone) == (saved(pristine, step=BEST), []) and looked == [BEST]

    rng, num_told = random.Random(2), 0
    large = [path for path in files_of(pristine / str(LATEST)) if path.stat().st_size > 1 << 14]
    kinds = [kind_of(path, pristine / str(LATEST)) for path in large]
    for path in large:
        for name in flips(folder / path.relative_to(pristine), 2, rng):
            had, reports = trained_on(folder)
            if reports:
                num_told += 1
                file = path.relative_to(pristine / str(LATEST))
                assert f"{file}: content differs (checksum); renamed to" in reports[0]
                (folder / f"{LATEST}.corrupt").rename(folder / str(LATEST))
            assert had == saved(pristine, step=9 if reports else LATEST), name
    assert num_told >= kinds.count("arrays, as each process wrote them") > 0


def test_large_metadata_is_read_and_a_complete_run_in_full(
    folder: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_SMALL_BYTES", 1 << 10)
    metadata = folder / str(LATEST) / KINDS["metadata"]
    assert metadata.stat().st_size > 1 << 10
    change_last_digit(metadata, "tokens_seen")
    had, reports = trained_on(folder)
    assert had == saved(pristine, step=9)
    assert "meta/metadata: content differs (checksum)" in reports[0]

    # Of a complete run nothing is restored, and its last bytes in `d` belong to no array.
    run_dir = folder.parent
    shutil.rmtree(folder), shutil.copytree(pristine, folder)
    shutil.copy(pristine.parent / "jaxlm.json", run_dir)
    path = largest_of("arrays, as each process wrote them", folder / str(LATEST))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_latest=9), on_commit=lambda *_: None)
    with checkpoints:
        assert not plan_resume(config_of(run_dir, optim=RUINOUS), checkpoints).complete
    assert list_corrupt(folder) == [f"{LATEST}.corrupt"]


def change_last_digit(metadata: Path, name: str) -> None:
    content = bytearray(metadata.read_bytes())
    (number,) = re.finditer(rf'"{name}": \d+'.encode(), content)
    content[number.end() - 1] ^= 1
    metadata.write_bytes(content)


@pytest.mark.slow
def test_with_verification_off_flips_are_silent(folder: Path, pristine: Path) -> None:
    """The negative control of the two above: Orbax itself sees few of them."""
    path = largest_of("arrays, as each process wrote them", folder / str(LATEST))
    silent = 0
    for _ in flips(path, 12, random.Random(0)):
        had, reports = trained_on(folder, verify="off")
        silent += not reports and had != saved(pristine)
        if (aside := folder / f"{LATEST}.corrupt").exists():  # the flip was in an index
            aside.rename(folder / str(LATEST))
    assert silent >= 2

    change_last_digit(folder / str(LATEST) / KINDS["metadata"], "tokens_seen")
    had, reports = trained_on(folder, verify="off")
    assert not reports and had != saved(pristine)


# --- every other kind of damage, each on the whole way of a trainer


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink], ids=lambda f: f.__name__)
def test_each_file_cut_short_emptied_or_gone_is_named(
    folder: Path, damage: Callable[[Path], None]
) -> None:
    step_folder = folder / str(LATEST)
    files = files_of(step_folder)
    assert {kind_of(path, step_folder) for path in files} == KINDS.keys()
    for path in files:
        sound = path.read_bytes()
        damage(path)
        name = path.relative_to(step_folder).as_posix()
        assert any(name in found for found in find_damage(step_folder)), name
        path.write_bytes(sound)
    assert find_damage(step_folder) == []


def largest_of(kind: str, step_folder: Path) -> Path:
    return max(step_folder.glob(KINDS[kind]), key=lambda path: path.stat().st_size)


def flip_in(kind: str) -> Callable[[Path], None]:
    def damage(step_folder: Path) -> None:
        path = largest_of(kind, step_folder)
        content = bytearray(path.read_bytes())
        content[len(content) // 2 if kind != "commit" else 0] ^= 1
        path.write_bytes(content)

    return damage


def to_file(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda step_folder: damage(largest_of("arrays", step_folder))


def put_in_place_of(step_folder: Path, names: list[str]) -> None:
    """Takes these from the step before."""
    before = step_folder.with_name(str(int(step_folder.name) - 3))
    for name in names:
        path = step_folder / name
        if path.is_dir():
            shutil.rmtree(path)
            shutil.copytree(before / name, path)
        else:
            shutil.copy(before / name, path)


def swap_file(step_folder: Path) -> None:
    # Both are sound, have one name, and are as long.
    name = "params/_METADATA"
    put_in_place_of(step_folder, ["metrics/metrics", name])
    assert (step_folder / name).stat().st_size


def swap_item(name: str) -> Callable[[Path], None]:
    return lambda step_folder: put_in_place_of(step_folder, [name])


def swap_all_but_the_commit(step_folder: Path) -> None:
    names = [path.name for path in step_folder.iterdir() if path.name != "commit_success.txt"]
    put_in_place_of(step_folder, names)


def rename_step(step_folder: Path) -> None:
    shutil.rmtree(step_folder)
    shutil.copytree(step_folder.with_name("9"), step_folder)


def add_file(step_folder: Path) -> None:
    (step_folder / "metrics" / "more").write_text("{}")


def lose_everything(step_folder: Path) -> None:
    shutil.rmtree(step_folder)
    step_folder.mkdir()


def become_foreign(step_folder: Path) -> None:
    lose_everything(step_folder)
    (step_folder / "model.safetensors").write_bytes(b"\0" * 100)


DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"a flip in {kind}": flip_in(kind) for kind in KINDS},
    "a file cut short": to_file(truncate),
    "a file emptied": to_file(empty),
    "a file deleted": to_file(Path.unlink),
    "a file of another step": swap_file,
    **{f"{name} of another step": swap_item(name) for name in ("params", "opt_state", "state")},
    **{f"{name} of another step": swap_item(name) for name in ("meta", "metrics", NAME)},
    "everything of another step": swap_all_but_the_commit,
    "another step by this number": rename_step,
    "a file that is not its own": add_file,
    "an empty folder": lose_everything,
    "a foreign folder": become_foreign,
    "a checkpoint of another run": give_to_another_run,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_latest_is_told_set_aside_and_the_next_one_restored(
    folder: Path, pristine: Path, kind: str
) -> None:
    DAMAGES[kind](folder / str(LATEST))
    params, metadata, reports = read(folder, "latest")
    assert reports and metadata == read_metadata(pristine, 9)
    had, reports = trained_on(folder)
    assert had == saved(pristine, step=9)
    assert len(reports) == 1 and reports[0].startswith(f"Warning: checkpoint {LATEST} is damaged: ")
    assert reports[0].endswith(f"; renamed to {LATEST}.corrupt")
    assert list_steps(folder) == [3, 6, 9] and list_corrupt(folder) == [f"{LATEST}.corrupt"]


@pytest.mark.parametrize(
    "kind",
    ["a flip in arrays", "a flip in metadata", "an empty folder", "a checkpoint of another run"],
)
def test_a_damaged_best_does_not_block_the_next(folder: Path, pristine: Path, kind: str) -> None:
    DAMAGES[kind](folder / str(BEST))
    _, metadata, reports = read(folder, "best")
    assert reports and metadata == read_metadata(pristine, 6)
    had, reports = trained_on(folder)
    assert had == saved(pristine, step=LATEST, best=6)
    assert reports[0].startswith(f"Warning: checkpoint {BEST} is damaged: ")


def test_of_two_runs_in_equal_parts_neither_is_touched(folder: Path) -> None:
    give_to_another_run(folder / "12")
    assert find_damage(folder / "12") == []
    give_to_another_run(folder / "9")
    for look in (lambda: train(config_of(folder.parent), **data()), lambda: read(folder, "best")):
        with pytest.raises(
            ValueError, match=r"several runs \(3 of run \w{16}.* 12 of run another\)"
        ):
            look()
    assert list_steps(folder) == STEPS and list_corrupt(folder) == []


def test_an_eval_loss_put_into_a_step_does_not_decide_what_is_kept(folder: Path) -> None:
    """Orbax reads one that no manifest lists, and would delete the best for it."""
    options = CheckpointConfig(keep_latest=1)
    for step in (15, 18, 21):
        with Checkpoints(folder, options, on_commit=lambda *_: None) as checkpoints:
            restored = checkpoints.restore_latest(BLUEPRINT.abstract)
            assert restored is not None
            checkpoints.save(restored[0], replace(restored[1], step=step, eval_loss=None))
        (folder / str(step) / "metrics").mkdir()
        (folder / str(step) / "metrics" / "metrics").write_text('{"eval_loss": 0.1}')
    assert BEST in list_steps(folder)


def test_what_a_system_leaves_in_folders_is_no_damage(folder: Path) -> None:
    (folder / str(LATEST) / ".DS_Store").write_bytes(b"x")
    (folder / str(LATEST) / "params" / ".nfs000001").write_bytes(b"x")
    assert find_damage(folder / str(LATEST)) == []


def test_a_run_goes_on_from_the_next_sound_one_to_the_same_end(
    folder: Path, pristine: Path, capsys: pytest.CaptureFixture
) -> None:
    flip_in("arrays")(folder / str(LATEST))
    result = train(config_of(folder.parent, optim=RUINOUS), **data())
    said = capsys.readouterr().out
    assert "Warning: checkpoint 12 is damaged: " in said and "Resuming from step 9" in said
    assert (result.step, result.best) == (LATEST, saved(pristine).best)
    prints = [read_metadata(at, LATEST).fingerprints for at in (folder, pristine)]
    assert prints[0] == prints[1] != read_metadata(pristine, 9).fingerprints


def test_without_a_sound_one_a_run_ends_with_an_error_and_starts_nothing(folder: Path) -> None:
    for step in STEPS:
        flip_in("arrays")(folder / str(step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no sound checkpoint, only 12.corrupt, 3.corr"):
            train(config_of(folder.parent, optim=RUINOUS), **data())
    assert list_steps(folder) == [] and len(list_corrupt(folder)) == len(STEPS)
