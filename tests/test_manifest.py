"""Damage to any file of a checkpoint is found, and nothing else is called damage."""

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import tiny_config, train_table

from jaxlm.checkpoints.manifest import NAME, find_damage
from jaxlm.files.durable import DiskError, write_file


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("pristine")
    train_table(tiny_config(run_dir, num_steps=3))
    return run_dir / "checkpoints" / "3"


@pytest.fixture
def step_folder(pristine: Path, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "checkpoints" / "3"
    shutil.copytree(pristine, folder)
    yield folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_sound_checkpoint_has_no_damage(pristine: Path) -> None:
    assert find_damage(pristine) == []


def test_a_copy_elsewhere_is_sound(step_folder: Path) -> None:
    assert find_damage(step_folder) == []


@pytest.mark.parametrize("name", ["manifest.json", "_CHECKPOINT_METADATA", "manifest.ocdbt"])
def test_a_file_whose_size_the_disk_does_not_tell_is_no_damage(
    pristine: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = Path.stat

    def stat(path: Path, **how: bool) -> os.stat_result:
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, **how)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(DiskError, match="cannot be read .Input/output error.*left as it is"):
        find_damage(pristine)


def test_a_flipped_bit_in_any_file_is_found_and_named(step_folder: Path) -> None:
    rng = random.Random(0)
    files = [path for path in _files(step_folder) if path.stat().st_size]
    assert len(files) > 20
    flips = missed = 0
    for path in files:
        sound = path.read_bytes()
        for _ in range(8):
            at, bit = rng.randrange(len(sound)), rng.randrange(8)
            flipped = bytearray(sound)
            flipped[at] ^= 1 << bit
            if _same_meaning(path, sound, bytes(flipped)):
                continue
            path.write_bytes(flipped)
            flips += 1
            damage = find_damage(step_folder)
            missed += not any(path.name in found for found in damage)
        path.write_bytes(sound)
    assert flips > 150
    assert missed == 0
    assert find_damage(step_folder) == []


def _same_meaning(path: Path, sound: bytes, flipped: bytes) -> bool:
    # The two exemptions: Orbax writes the commit's time and the folder's path after the manifest.
    if path.name == "commit_success.txt" and path.parent.name == "3":
        return flipped.endswith(b"/3") and flipped.startswith(b"Checkpoint commit was successful")
    if path.name not in ("_CHECKPOINT_METADATA", NAME):
        return False
    try:
        values = [json.loads(text) for text in (sound, flipped)]
    except ValueError:
        return False
    for value in values:
        value.pop("commit_timestamp_nsecs", None)
    return values[0] == values[1]


def test_a_missing_file_is_found(step_folder: Path) -> None:
    for path in _files(step_folder):
        sound = path.read_bytes()
        path.unlink()
        assert any(path.name in found for found in find_damage(step_folder)), path
        path.write_bytes(sound)


def test_a_truncated_file_is_found_without_reading_it(step_folder: Path) -> None:
    largest = max(_files(step_folder), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert any("bytes, expected" in found for found in find_damage(step_folder, contents=False))


def test_an_empty_step_folder_is_damage(tmp_path: Path) -> None:
    (tmp_path / "5").mkdir()
    assert "unfinished, emptied or not of jaxlm" in find_damage(tmp_path / "5")[0]


def test_a_step_under_another_number_is_damage(step_folder: Path) -> None:
    moved = step_folder.rename(step_folder.with_name("4"))
    assert any("commit_success.txt" in found for found in find_damage(moved))


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
