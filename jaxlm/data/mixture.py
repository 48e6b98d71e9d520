"""Rows of several sources, mixed by weight: the source of a row is a function of its number alone.

The shares of a mixture are integers. Its rows repeat in cycles of their sum: in a cycle, each
source has as many rows as its share, evenly spread. After any number of rows, each source has its
exact share but for less than one row.
"""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np


class Phase(TypedDict):
    """The shares of a run from one step on, up to the next phase."""

    step: int
    shares: dict[str, int]
    """Name of a source -> rows of it in a cycle, whose length is the sum."""


def add_phase(phases: Sequence[Phase], step: int, shares: Mapping[str, int]) -> list[Phase]:
    """The phases up to a step, and these shares from there on, if the last phase has others.

    Phases after the step are left out: the run has gone back to before them.
    """
    before = [phase for phase in phases if phase["step"] <= step]
    if before and _used(before[-1]["shares"]) == _used(shares):
        return before
    return [*before, {"step": step, "shares": dict(shares)}]


def _used(shares: Mapping[str, int]) -> dict[str, int]:
    return {name: share for name, share in shares.items() if share}


def spread(shares: Mapping[str, int]) -> list[str]:
    """The names of a cycle, each as often as its share and evenly spread.

    Row q (from 0) of a share s may take places from q*C/s up to (q+1)*C/s of the C places; of the
    rows that may take a place, the one whose last place comes first gets it. So the rows of a
    source in any first n places differ from n*s/C by less than one (Baruah et al., "Proportionate
    Progress", Algorithmica 1996).
    """
    length = sum(shares.values())
    spans = sorted(
        (row * length // share, -(-(row + 1) * length // share), name)
        for name, share in shares.items()
        for row in range(share)
    )
    names, waiting, num_begun = list[str](), list[tuple[int, str]](), 0
    for place in range(length):
        while num_begun < length and spans[num_begun][0] <= place:
            heapq.heappush(waiting, spans[num_begun][1:])
            num_begun += 1
        names.append(heapq.heappop(waiting)[1])
    return names


class _Cycle:
    # Of a phase: how many rows each source has before each place, and in all.

    def __init__(self, shares: Mapping[str, int]):
        names = np.array(spread(shares))
        self.length = len(names)
        self.before = {
            name: np.concatenate([[0], np.cumsum(names == name)]) for name in _used(shares)
        }

    def count(self, name: str, num_rows: Any) -> Any:
        """How many of the first rows are of a source: integers, or arrays of them."""
        if name not in self.before:
            return np.zeros_like(num_rows)
        cycles, places = np.divmod(num_rows, self.length)
        return cycles * self.before[name][-1] + self.before[name][places]


class Mixture:
    """Row number of a run -> source, and number of the row in that source."""

    def __init__(self, phases: Sequence[Phase], batch_size: int):
        """Phases begin at step 0, in ascending order."""
        self.names = sorted({name for phase in phases for name in _used(phase["shares"])})
        self._first_rows = [phase["step"] * batch_size for phase in phases]
        self._cycles = [_Cycle(phase["shares"]) for phase in phases]
        sizes = np.diff(self._first_rows)
        self._rows_before = {
            name: [
                0,
                *itertools.accumulate(
                    int(cycle.count(name, size))
                    for cycle, size in zip(self._cycles, sizes, strict=False)  # the last is open
                ),
            ]
            for name in self.names
        }

    def rows_before(self, name: str, row: int) -> int:
        """How many of the first `row` rows are of a source; 0 for one that has none."""
        if name not in self.names:
            return 0
        return int(self._count(name, np.array([row]))[0])

    def split(self, rows: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each source: which of these rows are its own, bool [N], and their numbers in it."""
        found = {}
        for name in self.names:
            before, after = self._count(name, rows), self._count(name, rows + 1)
            if (own := after > before).any():
                found[name] = own, before[own]
        return found

    def _count(self, name: str, rows: np.ndarray) -> np.ndarray:
        phase = np.searchsorted(self._first_rows, rows, side="right") - 1
        counts = np.empty_like(rows)
        for number in np.unique(phase):
            here = phase == number
            inside = self._cycles[number].count(name, rows[here] - self._first_rows[number])
            counts[here] = self._rows_before[name][number] + inside
        return counts
