"""The names of what lies in a checkpoint folder. Of these alone, anything is renamed or deleted."""

import re
import time
from collections.abc import Callable
from pathlib import Path

CORRUPT = ".corrupt"
"""Ends the name of a step that was found damaged."""
SUPERSEDED = ".superseded"
"""Ends the name of a step that the run has gone back from."""
REPLACED = ".replaced"
"""Ends the name of a step while it is saved again."""
UNFINISHED = ".orbax-checkpoint-tmp"
"""Ends the name of a step while it is written."""
DELETING = "deleting"
"""What is to be deleted is renamed into this folder first, so that it goes at once."""
_NAME = re.compile(
    rf"(0|[1-9][0-9]{{0,17}})(({CORRUPT}|{SUPERSEDED})(-[0-9]+)?|{REPLACED}|{UNFINISHED})?"
)

_COMMIT_S = 0.5  # within this time, a step that is being renamed or deleted has changed


def list_named(folder: Path, suffix: str = "") -> list[Path]:
    """What has exactly a name that a run gives, with this suffix if one is named; ascending."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if suffix in path.name and _NAME.fullmatch(path.name)]


def list_steps(folder: Path) -> list[int]:
    """The committed steps, ascending, whether sound or not."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def list_corrupt(folder: Path) -> list[str]:
    """The names of checkpoints that were found damaged and renamed."""
    return [path.name for path in list_named(folder, CORRUPT)]


def list_names(folder: Path) -> list[str]:
    """The folders of all checkpoints, those set aside included; one being replaced is its step."""
    there = [path.name for path in list_named(folder) if path.is_dir()]
    return sorted({name.removesuffix(REPLACED) for name in there if UNFINISHED not in name})


def when_settled(path: Path, look: Callable[[], list[str]]) -> list[str] | None:
    """What `look` finds wrong with a step, at which a trainer may be at work.

    It looks again if the trainer has put another one there, or finished its commit.

    Returns:
      Empty for a sound step; None for one that was deleted meanwhile.
    """
    while before := identity(path):
        if not (damage := look()):
            return []
        time.sleep(_COMMIT_S)
        if identity(path) == before:
            return damage
    return None


def identity(path: Path) -> tuple[int, int] | None:
    """What changes when another step is put there, or this one's commit goes on."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns
