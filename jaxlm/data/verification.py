"""Every byte of a run's data, read once in the background of the run."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.data.dataset import MANIFEST, Manifest, find_shard_damage, records_of
from jaxlm.files.strict import read_json

_PAUSE = 19.0
"""Seconds of rest for each second of reading: a twentieth of a core."""


class _Stopped(Exception):
    pass


class Verification:
    """A thread, while in context, that compares the files of datasets with their checksums.

    A start reads only files that are new or changed in size or time; this finds other changes too.

    Args:
      folders: of the datasets.

    Attributes:
      damage: the first damaged file, and how it differs; None until one is found.
    """

    def __init__(self, folders: Sequence[Path]):
        self.damage: str | None = None
        self._folders, self._ended = folders, threading.Event()
        self._thread = threading.Thread(target=self._run, name="verification", daemon=True)

    def __enter__(self) -> "Verification":
        """Starts reading."""
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Stops reading; waits for the chunk that is being read."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for folder in self._folders:
                records = records_of(read_json(folder / MANIFEST, Manifest))
                if damage := find_shard_damage(folder, records, self._rest):
                    self.damage = f"{folder}/{damage}"
                    return
        except _Stopped:
            pass
        except (OSError, ValueError) as error:  # of a file that is gone, which the loop reports too
            self.damage = str(error)

    def _rest(self, busy_s: float) -> None:
        if self._ended.wait(_PAUSE * busy_s):
            raise _Stopped
