"""Batches that a run passes over, because its loss went bad on them.

`skips.json` in the checkpoint folder is an append-only list. An entry is on disk before anything
else of a rollback happens, so a kill at any instant leaves either the run before it or the run
after it. Each checkpoint holds the list as of its step, which identifies superseded checkpoints.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import google_crc32c

from jaxlm.files.durable import write_file
from jaxlm.files.strict import read_json

NAME = "skips.json"


@dataclasses.dataclass(frozen=True)
class Skip:
    """From the state of `from_step` on, so many batches are passed over."""

    from_step: int
    num_batches: int
    """0 where the run only went back."""
    why: str


class _File(TypedDict):
    crc32c: int
    skips: list[Skip]


def skipped(skips: Iterable[Skip], step: int) -> int:
    """Batches passed over before the one that the state of `step` takes in."""
    total, reach = 0, step
    for skip in reversed(list(skips)):
        if skip.from_step <= reach:
            total += skip.num_batches
        if skip.num_batches:  # it passes over all that older entries beyond it did
            reach = min(reach, skip.from_step)
    return total


def held_by(skips: Iterable[Skip], step: int) -> list[Skip]:
    """What a checkpoint of `step` holds if no rollback has superseded it."""
    return [skip for skip in skips if skip.from_step < step]


def read_skips(folder: Path) -> list[Skip] | None:
    """The skips of a checkpoint folder, or None if the file is damaged; empty if there is none."""
    try:
        found = read_json(folder / NAME, _File)
    except FileNotFoundError:
        return []
    except ValueError:
        return None
    return found["skips"] if found["crc32c"] == _checksum(found["skips"]) else None


def write_skips(folder: Path, skips: list[Skip]) -> None:
    """Replaces the file; on disk when this returns."""
    values = {"crc32c": _checksum(skips), "skips": to_json(skips)}
    write_file(folder / NAME, json.dumps(values).encode())


def to_json(skips: Iterable[Skip]) -> list[dict[str, Any]]:
    """JSON values."""
    return [dataclasses.asdict(skip) for skip in skips]


def _checksum(skips: list[Skip]) -> int:
    return google_crc32c.value(json.dumps(to_json(skips)).encode())
