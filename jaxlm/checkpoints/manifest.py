"""The manifest: proof that the files of a checkpoint are those that were written.

The manifest lists the size and the CRC32C of every file, and is written into the step folder just
before the atomic commit. Orbax writes two items later, which are checked by their content: the
commit timestamp inside `_CHECKPOINT_METADATA`, and `commit_success.txt`.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import google_crc32c

from jaxlm.files.durable import crc32c, fsync, read_file, reading, write_file
from jaxlm.files.strict import read_json, shown

NAME = "manifest.json"
_STEP_METADATA = "_CHECKPOINT_METADATA"
_METADATA = "meta/metadata"
_COMMIT = "commit_success.txt"
_COMMIT_TEXT = "Checkpoint commit was successful to "
# A fast check skips files of arrays (in a folder `d`) above this size, and reads all others.
_SMALL_BYTES = 1 << 20


class _Manifest(TypedDict):
    crc32c: int
    files: dict[str, dict[str, int]]


class _StepMetadata(TypedDict):
    commit_timestamp_nsecs: int | None


def write_manifest(folder: Path) -> None:
    """Writes the manifest of all files below `folder`, and flushes them to disk."""
    skipped = {folder / NAME, folder / _COMMIT}
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path not in skipped)
    with ThreadPoolExecutor() as pool:
        entries = pool.map(_entry, paths)
    names = (path.relative_to(folder).as_posix() for path in paths)
    files = dict(zip(names, entries, strict=True))
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync(path)
    body = json.dumps(files, sort_keys=True)
    text = json.dumps(
        {"crc32c": google_crc32c.value(body.encode()), "files": files}, sort_keys=True
    )
    write_file(folder / NAME, text.encode())


def find_damage(
    folder: Path, *, contents: bool = True, share: tuple[int, int] = (0, 1)
) -> list[str]:
    """A line for each difference between a step folder and its manifest.

    Args:
      folder: the step folder.
      contents: read the array files too; else compare only their sizes.
      share: (i, n): check only share i of n equal shares of the listed files.
    """
    if not folder.is_dir():
        return ["it is not a folder" if folder.exists() else "it does not exist"]
    try:
        manifest = read_json(folder / NAME, _Manifest)
    except FileNotFoundError:
        return [f"{NAME} is missing: the checkpoint is unfinished, emptied or not of jaxlm"]
    except (OSError, ValueError) as error:
        return [f"{NAME} cannot be read ({error})"]
    body = json.dumps(manifest["files"], sort_keys=True)
    if manifest["crc32c"] != google_crc32c.value(body.encode()):
        return [f"{NAME}: its own checksum does not match"]
    with reading(folder):
        found = _scan(folder)
    if strays := sorted(name for name, entry in found.items() if _leads_out(entry, folder)):
        return [f"{name}: leads out of the checkpoint, or is not a file" for name in strays]
    names = sorted(manifest["files"])[share[0] :: share[1]]
    damage, files = [], {name: manifest["files"][name] for name in names}
    much = contents and sum(entry.get("bytes", 0) for entry in files.values()) > _SMALL_BYTES
    with ThreadPoolExecutor() as pool:
        each = pool.map if much else map  # Threads cost more than they save on small files.
        differences = list(each(lambda name: _compare(folder, name, files[name], contents), files))
    for name, difference in zip(files, differences, strict=True):
        if difference:
            label = name if name.isprintable() and len(name) < 1000 else shown(name)
            damage.append(f"{label}: {difference}")
    damage += _unlisted(found, manifest["files"]) + _commit_damage(folder)
    return damage or _step_damage(folder)


def _scan(folder: Path, prefix: str = "") -> dict[str, os.DirEntry]:
    """Files and folders below `folder` by their names from there, symbolic links not followed."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            found[name] = entry
            if entry.is_dir(follow_symlinks=False):
                found |= _scan(Path(entry.path), f"{name}/")
    return found


def _leads_out(entry: os.DirEntry, folder: Path) -> bool:
    # Reject symlinks that leave the checkpoint, and FIFOs, which would block the reader.
    if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(folder.resolve()):
        return True
    return not (entry.is_file() or entry.is_dir())


def _entry(path: Path) -> dict[str, int]:
    fsync(path)
    if path.name == _STEP_METADATA:
        return {"json_crc32c": _timeless_crc32c(path)}
    return {"bytes": path.stat().st_size, "crc32c": crc32c(path)}


def _compare(folder: Path, name: str, entry: dict[str, int], contents: bool) -> str | None:
    path = folder / name
    try:
        if ".." in Path(name).parts or Path(name).is_absolute():
            return "leads out of the checkpoint"
        if "json_crc32c" in entry:
            same = _timeless_crc32c(path) == entry["json_crc32c"]
            return None if same else "content differs (checksum)"
        with reading(path):
            size = path.stat().st_size
        if size != entry.get("bytes"):
            return f"{size} bytes, expected {entry.get('bytes')}"
        if (contents or not _is_large_array_file(name, size)) and crc32c(path) != entry.get(
            "crc32c"
        ):
            return "content differs (checksum)"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return str(error.strerror)
    except ValueError as error:
        return f"cannot be read ({error.__cause__ or error})"  # without the path
    return None


def _is_large_array_file(name: str, size: int) -> bool:
    return size > _SMALL_BYTES and "/d/" in name


def _unlisted(found: dict[str, os.DirEntry], files: dict[str, Any]) -> list[str]:
    # Orbax reads unlisted files: an eval loss added to a step would decide what is kept.
    listed = {NAME, _COMMIT, *files}
    listed |= {name[:end] for name in files for end, char in enumerate(name) if char == "/"}
    # Nothing reads hidden files, which file systems add (.DS_Store, .nfs…).
    others = sorted(n for n in found.keys() - listed if not found[n].name.startswith("."))
    return [f"{name}: not a part of it" for name in others]


def _step_damage(folder: Path) -> list[str]:
    # A step copied over another one, manifest included, would pass all other checks.
    named = re.match(r"\d+", folder.name)
    try:
        step = read_json(folder / _METADATA, dict[str, Any])["step"]
    except (OSError, ValueError, KeyError):
        return [f"{_METADATA} cannot be read"]
    if named is None or step == int(named[0]):
        return []
    return [f"{_METADATA}: found step {step}, expected {named[0]}"]


def _commit_damage(folder: Path) -> list[str]:
    # The text holds the folder's path at the commit. A run may move; a step keeps its name.
    step = re.match(r"\d+", folder.name)
    try:
        text = read_file(folder / _COMMIT, _SMALL_BYTES).decode()
    except FileNotFoundError:
        return [f"{_COMMIT} is missing: the commit did not finish"]
    except (OSError, ValueError):
        return [f"{_COMMIT} cannot be read"]
    if step and text.startswith(_COMMIT_TEXT) and Path(text[len(_COMMIT_TEXT) :]).name == step[0]:
        return []
    return [f"{_COMMIT}: found {text[:80]!r}, expected {_COMMIT_TEXT!r} and the folder"]


def _timeless_crc32c(path: Path) -> int:
    values: dict[str, Any] = {**read_json(path, _StepMetadata)}
    del values["commit_timestamp_nsecs"]
    return google_crc32c.value(json.dumps(values, sort_keys=True).encode())
