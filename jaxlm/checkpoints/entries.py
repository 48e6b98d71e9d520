"""The names in a checkpoint folder. Entries with other names are never renamed or deleted."""

import re
import time
from collections.abc import Callable
from pathlib import Path

CORRUPT = ".corrupt"
"""Suffix of a damaged step."""
SUPERSEDED = ".superseded"
"""Suffix of a step that the run went back from."""
REPLACED = ".replaced"
"""Suffix of the old copy while a step is saved again."""
UNFINISHED = ".orbax-checkpoint-tmp"
"""Suffix of a step while it is written."""
DELETING = "deleting"
"""Folder into which a step is renamed before its deletion, which is thereby atomic."""
_NAME = re.compile(
    rf"(0|[1-9][0-9]{{0,17}})(({CORRUPT}|{SUPERSEDED})(-[0-9]+)?|{REPLACED}|{UNFINISHED})?"
)

_COMMIT_S = 0.5  # time in which a step that is being renamed or deleted changes


def list_named(folder: Path, suffix: str = "") -> list[Path]:
    """The entries named exactly `STEP` plus this suffix, by ascending step."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if suffix in path.name and _NAME.fullmatch(path.name)]


def list_steps(folder: Path) -> list[int]:
    """The committed steps, ascending, whether sound or not."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def list_corrupt(folder: Path) -> list[str]:
    """The names of damaged checkpoints, `N.corrupt`."""
    return [path.name for path in list_named(folder, CORRUPT)]


def list_names(folder: Path) -> list[str]:
    """The names of all checkpoints, those set aside included; `N.replaced` counts as N."""
    there = [path.name for path in list_named(folder) if path.is_dir()]
    return sorted({name.removesuffix(REPLACED) for name in there if UNFINISHED not in name})


def when_settled(path: Path, look: Callable[[], list[str]]) -> list[str] | None:
    """The damage that `look` finds in a step that a trainer may be writing.

    Looks again if the trainer has replaced the step meanwhile, or finished its commit.

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
    """Identity of a step folder: changes if the step is replaced, or its commit continues."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns
