"""Folders that jaxlm made: only in these does it lock, write, rename or delete."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import TypedDict

from jaxlm.errors import InputError
from jaxlm.files.durable import write_file
from jaxlm.files.strict import read_json, shown

MARKER = "jaxlm.json"
"""The first file in each folder that jaxlm makes."""
_FORMAT = 1
_OF_THE_SYSTEM = "lost+found"  # in the root of each ext4 disk, which may be mounted here


class _Marker(TypedDict):
    format: int


def mark(folder: Path) -> None:
    """Marks a folder as made by jaxlm."""
    if not (folder / MARKER).exists():
        write_file(folder / MARKER, json.dumps({"format": _FORMAT}).encode())


def check_ours(folder: Path, files: Collection[str] | None = None) -> None:
    """Refuses a folder of another program.

    An absent or empty folder is accepted. Hidden entries do not count: they belong to the system
    (.DS_Store, .nfs…).

    Args:
      folder: the folder.
      files: if given, only entries with these names make the folder another's.

    Raises:
      ValueError: the folder has content that jaxlm, or this version, did not make.
    """
    if not folder.is_dir():
        return
    there = sorted(path.name for path in folder.iterdir())
    if MARKER in there:
        return _check_marker(folder / MARKER)
    named = [name for name in there if files is None or name in files]
    foreign = [name for name in named if name[0] != "." and name != _OF_THE_SYSTEM]
    if foreign:
        raise InputError(
            f"{folder}: found {shown(foreign[0])[1:-1]} and no {MARKER}, so this folder is not one "
            "that jaxlm made, and nothing in it was touched; name another folder, or an empty one "
            f'(or write {{"format": {_FORMAT}}} into its {MARKER}, if jaxlm did make it)'
        )


def _check_marker(path: Path) -> None:
    try:
        found = read_json(path, _Marker)["format"]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path.parent}: jaxlm did not write its {MARKER} ({error}); name another folder"
        ) from error
    if found != _FORMAT:
        raise InputError(
            f"{path}: found format {found}, expected {_FORMAT}; use the jaxlm that wrote it"
        )
