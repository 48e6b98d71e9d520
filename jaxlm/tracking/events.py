"""events.jsonl, the history of a run: what happened, when and why, one JSON object a line.

The file is append-only: a resume that cuts metrics.jsonl back keeps its lines. No run depends on
them, so a failed write or read never stops training. The next start compares the history with the
checkpoints on disk, and records changes that a kill left out.
"""

import contextlib
import datetime
import json
import logging
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jaxlm.errors import InputError
from jaxlm.files.durable import DiskError, read_file
from jaxlm.files.strict import parse_json

_log = logging.getLogger(__name__)

NAME = "events.jsonl"
CHECKPOINT_KINDS = ("save", "best", "deletion", "set aside")
RUN_KINDS = ("start", "skipped", "back", "rows", "stop", "end", "failed")
KINDS = (*RUN_KINDS, *CHECKPOINT_KINDS, "sample")
_MAX_BYTES, _MAX_UNREADABLE = 1 << 26, 100


class Event(TypedDict):
    """One line of the file."""

    time: str
    """UTC, as 2026-01-31T23:59:59Z."""
    event: str
    """One of `KINDS`."""
    step: int
    why: str
    """Human-readable reason."""
    checkpoint: NotRequired[str]
    """The folder that appeared or disappeared, such as `12`, or its new name: `12.corrupt`."""
    host: NotRequired[str]
    """Where the run started."""
    pid: NotRequired[int]
    environment: NotRequired[dict[str, Any]]
    """Versions, devices and cores."""
    prompt: NotRequired[str]
    text: NotRequired[str]
    """The model's continuation of the prompt."""


def read_events(path: Path) -> tuple[list[Event], list[str]]:
    """The events, oldest first, and a warning for each line that is no event.

    Raises:
      OSError, DiskError: the file cannot be read.
      ValueError: no regular file, too large, or too many lines are no events.
    """
    return _parse(read_file(path, _MAX_BYTES))


def _parse(content: bytes) -> tuple[list[Event], list[str]]:
    events, unreadable = [], []
    *lines, torn = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            events.append(parse_json(line, Event))
        except ValueError as error:
            unreadable.append(f"{NAME}, line {number} is no event: {error}")
            if len(unreadable) > _MAX_UNREADABLE:
                raise InputError(
                    f"found more than {_MAX_UNREADABLE} lines that are no events, up to line "
                    f"{number}; move the file away, and the run begins another"
                ) from error
    if torn:
        unreadable.append(f"{NAME}: a kill cut its last line short, which was passed over")
    return events, unreadable


def checkpoints_left(events: Iterable[Event]) -> dict[str, int]:
    """The checkpoints on disk after these events: folder name -> step."""
    left: dict[str, int] = {}
    for event in events:
        _apply(event, left)
    return left


def _apply(event: Event, left: dict[str, int]) -> None:
    if (name := event.get("checkpoint")) is None:
        return
    if event["event"] == "deletion":
        left.pop(name, None)
        return
    if event["event"] == "set aside":
        left.pop(str(event["step"]), None)
    left[name] = event["step"]


class Events:
    """Appends events to the file; for the process that holds the lock of the checkpoints.

    Args:
      path: the file, made with its first event; None writes nothing.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._left: dict[str, int] | None = None
        self._unwritten = b""  # lines that a full disk has refused

    def add(self, event: str, step: int, why: str, **more: Any) -> None:
        """Appends an event; a line that a full disk refuses is written with the next one.

        Without fsync, which could block behind a checkpoint being written to the same disk.
        """
        assert event in KINDS, event
        if self._path is None:
            return
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line: Any = {"time": now, "event": event, "step": step, "why": why, **more}
        _apply(line, self._there())
        text = json.dumps(line, ensure_ascii=False) + "\n"
        self._unwritten += text.encode(errors="replace")  # A path may hold invalid UTF-8.
        with contextlib.suppress(OSError), self._path.open("ab", buffering=0) as file:
            while self._unwritten:
                self._unwritten = self._unwritten[file.write(self._unwritten) :]

    def start(self, step: int, why: str, environment: dict[str, Any]) -> None:
        """Records that the run starts in this process."""
        where = {"host": socket.gethostname(), "pid": os.getpid(), "environment": environment}
        self.add("start", step, why, **where)

    def failed(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Records the error that ended the run, if the run had started; for an `ExitStack`."""
        if kind and self._path and self._path.exists():
            step = max(self._there().values(), default=0)
            self.add("failed", step, f"{kind.__name__}: {error}")

    def compare(self, names: Iterable[str], why: Mapping[str, str]) -> None:
        """Records checkpoints that appeared, disappeared or were renamed since the last call.

        Args:
          names: folder names of all checkpoints on disk, those set aside included.
          why: name -> reason, if known.
        """
        if self._path is None:
            return
        there, names = self._there(), set(names)
        steps = {name: int(name.partition(".")[0]) for name in names}
        # A step set aside comes before the new step of the same number.
        for name in sorted(names, key=lambda name: (steps[name], name.isdecimal(), name)):
            if name not in there:
                kind = "save" if name.isdecimal() else "set aside"
                self.add(kind, steps[name], why.get(name, "found on disk"), checkpoint=name)
        for name in [name for name in there if name not in names]:
            self.add("deletion", there[name], why.get(name, "found gone"), checkpoint=name)

    def _there(self) -> dict[str, int]:
        if self._left is None:
            self._left = {}
            try:
                if self._path and self._path.exists():
                    content = read_file(self._path, _MAX_BYTES)
                    self._left = checkpoints_left(_parse(content)[0])
                    if torn := len(content) - content.rfind(b"\n") - 1:
                        os.truncate(self._path, len(content) - torn)
            except (OSError, ValueError, DiskError) as error:
                _log.warning(f"{self._path}: what happens is not written down: {error}")
                self._path = None
        return self._left
