"""Sets damaged or superseded steps aside by a rename, and deletes others in the background."""

import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from jaxlm.checkpoints.entries import DELETING, SUPERSEDED, UNFINISHED, list_named
from jaxlm.checkpoints.kept_weights import keep_weights
from jaxlm.files.durable import DiskError, free_path, fsync

_CLEAR_ATTEMPTS = 40


def put_aside(folder: Path, steps: Sequence[int], suffix: str) -> list[str]:
    """Renames steps to STEP + `suffix`, with a number if that exists; returns the new names."""
    names = []
    for step in steps:
        target = free_path(folder / f"{step}{suffix}")
        (folder / str(step)).rename(target)
        names.append(target.name)
    fsync(folder)
    return names


def list_old_superseded(folder: Path, num_kept: int) -> list[Path]:
    """The superseded steps to delete, oldest rename first: all but the newest `num_kept` (> 0)."""

    def age(path: Path) -> tuple[int, int]:
        return path.stat().st_ctime_ns, int(path.name.partition(".")[0])

    return sorted(list_named(folder, SUPERSEDED), key=age)[:-num_kept]


def clear_partial(folder: Path) -> None:
    """Removes the files of a failed save, while its threads may still write some."""
    for _ in range(_CLEAR_ATTEMPTS):
        partial = list_named(folder, UNFINISHED)
        if not partial:
            return
        for path in partial:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.05)


class Purger:
    """Deletes checkpoints in a background thread.

    Args:
      folder: the checkpoint folder.
      keep_weights_every: keep the weights of steps that are a multiple of this.
    """

    def __init__(self, folder: Path, keep_weights_every: int | None = None) -> None:
        self._folder, self._doomed = folder, folder / DELETING
        self._every = keep_weights_every
        self._thread = threading.Thread()

    def purge(self, *paths: Path) -> None:
        """Deletes these paths, and the leftovers of earlier deletions."""
        self.join()
        for path in paths:
            self._doomed.mkdir(exist_ok=True)
            path.rename(self._doomed / path.name)
        doomed = list_named(self._doomed)
        self._thread = threading.Thread(target=self._delete, args=(doomed,))
        self._thread.start()

    def _delete(self, doomed: list[Path]) -> None:
        for path in doomed:
            try:
                if self._every and path.name.isdecimal() and int(path.name) % self._every == 0:
                    keep_weights(path, self._folder)
            except (OSError, ValueError, DiskError):  # such as a full disk; the next call retries
                continue
            shutil.rmtree(path, ignore_errors=True)

    def join(self) -> None:
        """Waits for the deletions."""
        if self._thread.ident:
            self._thread.join()
