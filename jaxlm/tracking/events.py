"""events.jsonl, the history of a run: what happened, when and why, one JSON object a line.

Lines are only added: a resume that cuts metrics.jsonl back leaves them. Nothing depends on them, so
what cannot be written or read never stops a run. What a kill kept from being written down is found
at the next start, where the history is held against the checkpoints on disk.
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
    """A line."""

    time: str
    """UTC, as 2026-01-31T23:59:59Z."""
    event: str
    """One of `KINDS`."""
    step: int
    why: str
    """The reason, for people."""
    checkpoint: NotRequired[str]
    """The folder that came or went, such as `12`, or the new name of one: `12.corrupt`."""
    host: NotRequired[str]
    """Where the run started."""
    pid: NotRequired[int]
    environment: NotRequired[dict[str, Any]]
    """Versions, devices and cores."""
    prompt: NotRequired[str]
    text: NotRequired[str]
    """What the model made of the prompt."""


def read_events(path: Path) -> tuple[list[Event], list[str]]:
    """The events, oldest first, and a line for people about each that cannot be read.

    Raises:
      OSError, DiskError: the file cannot be read.
      ValueError: it is no regular file, too large, or hardly holds any events.
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
    """The checkpoints that are on disk after these events: name of the folder -> step."""
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
    """Adds to the file; used by one process at a time, that which has the lock of the checkpoints.

    Args:
      path: the file, made with its first event; None to write none.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._left: dict[str, int] | None = None
        self._unwritten = b""  # what the disk would not take so far

    def add(self, event: str, step: int, why: str, **more: Any) -> None:
        """Writes an event down; what a full disk refuses waits for the next one.

        It is not synced, which could wait for a checkpoint on its way to the same disk.
        """
        assert event in KINDS, event
        if self._path is None:
            return
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line: Any = {"time": now, "event": event, "step": step, "why": why, **more}
        _apply(line, self._there())
        text = json.dumps(line, ensure_ascii=False) + "\n"
        self._unwritten += text.encode(errors="replace")  # a path may hold what is no text
        with contextlib.suppress(OSError), self._path.open("ab", buffering=0) as file:
            while self._unwritten:
                self._unwritten = self._unwritten[file.write(self._unwritten) :]

    def start(self, step: int, why: str, environment: dict[str, Any]) -> None:
        """Writes down that the run starts in this process."""
        where = {"host": socket.gethostname(), "pid": os.getpid(), "environment": environment}
        self.add("start", step, why, **where)

    def failed(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Writes down what ended the run, if it had begun; for an `ExitStack`."""
        if kind and self._path and self._path.exists():
            step = max(self._there().values(), default=0)
            self.add("failed", step, f"{kind.__name__}: {error}")

    def compare(self, names: Iterable[str], why: Mapping[str, str]) -> None:
        """Writes down which checkpoints came, went or were renamed since the last look.

        Args:
          names: of the folders of all checkpoints on disk, those set aside included.
          why: the reason for each name, where it is known.
        """
        if self._path is None:
            return
        there, names = self._there(), set(names)
        steps = {name: int(name.partition(".")[0]) for name in names}
        # What was set aside comes before what took its place.
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
