"""A clock: wall time of a run by kind of work, and steps per second."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

KINDS: tuple[str, ...] = ("steps", "data", "eval", "save", "restore", "compile", "start")
"""Kinds of work: `data` is waiting for a batch, `start` is all else before the loop."""

X = TypeVar("X")


class Clock:
    """Counts every second since its creation for exactly one kind of work, at first `start`."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since_s = "start", time.perf_counter()
        self._step, self._step_s = 0, 0.0

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Counts the time in this context for `kind` alone, not for an enclosing kind."""
        before = self._turn_to(kind)
        try:
            yield
        finally:
            self._turn_to(before)

    def waiting(self, items: Iterable[X]) -> Iterator[X]:
        """Yields the items; counts the wait for each of them for `data`."""
        iterator = iter(items)
        while True:
            with self.spent("data"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self) -> dict[str, float]:
        """Kind -> wall time so far (s)."""
        self._turn_to(self._kind)
        return dict(self._seconds)

    def rate(self, step: int) -> float:
        """Steps per second since the last call, without the time of evals and saves."""
        seconds = self.seconds()
        step_s = seconds["steps"] + seconds["data"]
        rate = (step - self._step) / max(step_s - self._step_s, 1e-9)
        self._step, self._step_s = step, step_s
        return rate

    def _turn_to(self, kind: str) -> str:
        # Returns the previous kind.
        now_s = time.perf_counter()
        self._seconds[self._kind] += now_s - self._since_s
        before, self._kind, self._since_s = self._kind, kind, now_s
        return before
