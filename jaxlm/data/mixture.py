"""Rows of several sources, mixed by weight: the source of a row is a function of its number alone.

The shares of a mixture are integers. Its rows repeat in cycles of their sum: in a cycle, each
source has as many rows as its share, evenly spread. After any number of rows, each source has its
exact share but for less than one row.
"""

import bisect
import heapq
from collections.abc import Collection, Mapping, Sequence
from typing import TypedDict

import numpy as np


class Phase(TypedDict):
    """What the rows of a run are made of from one step on, up to the next phase."""

    step: int
    shares: dict[str, int]
    """Name of a source -> rows of it in a cycle, whose length is the sum."""
    stages: dict[str, int]
    """Name of a source that has grown -> stages of its tokens; else 1."""


def add_phase(
    phases: Sequence[Phase], step: int, shares: Mapping[str, int], stages: Mapping[str, int]
) -> list[Phase]:
    """The phases up to a step, and a new one from there on if shares or stages differ.

    Phases after the step are left out: the run has gone back to before them.
    """
    before = [phase for phase in phases if phase["step"] <= step]
    grown = {name: count for name, count in stages.items() if count > 1}
    if before:
        last = before[-1]
        grown = {**last["stages"], **grown}
        if (_used(last["shares"]), last["stages"]) == (_used(shares), grown):
            return before
    return [*before, {"step": step, "shares": dict(shares), "stages": grown}]


def keep_stages(phases: Sequence[Phase], names: Collection[str]) -> list[Phase]:
    """The phases without the stages of other sources than these, whose tokens are others now."""
    return [
        {**phase, "stages": {n: k for n, k in phase["stages"].items() if n in names}}
        for phase in phases
    ]


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
    # The rows of a phase, which repeat: at each place a source, and its rows at earlier places.

    def __init__(self, shares: Mapping[str, int], names: Sequence[str]):
        self.source = np.array([names.index(name) for name in spread(shares)])
        self.length = len(self.source)
        self.shares = np.array([shares.get(name, 0) for name in names])
        order = np.argsort(self.source, kind="stable")
        ends = np.cumsum(self.shares)
        self.earlier = np.empty(self.length, np.int64)
        self.earlier[order] = np.arange(self.length) - (ends - self.shares)[self.source[order]]

    def count(self, num_rows: int) -> np.ndarray:
        """How many of the first rows each source has."""
        cycles, places = divmod(num_rows, self.length)
        inside = np.bincount(self.source[:places], minlength=len(self.shares))
        return cycles * self.shares + inside


class Mixture:
    """Row number of a run -> source, and number of the row in that source."""

    def __init__(self, phases: Sequence[Phase], batch_size: int):
        """Phases begin at step 0, in ascending order."""
        self.names = sorted({name for phase in phases for name in _used(phase["shares"])})
        self._first_rows = [phase["step"] * batch_size for phase in phases]
        self._cycles = [_Cycle(phase["shares"], self.names) for phase in phases]
        self._stages = [phase["stages"] for phase in phases]
        self._before = [np.zeros(len(self.names), np.int64)]
        for cycle, size in zip(self._cycles, np.diff(self._first_rows).tolist(), strict=False):
            self._before.append(self._before[-1] + cycle.count(size))  # the last phase is open

    def rows_before(self, name: str, row: int) -> int:
        """How many of the first `row` rows are of a source; 0 for one that has none."""
        if name not in self.names:
            return 0
        number = bisect.bisect_right(self._first_rows, row) - 1
        counts = self._before[number] + self._cycles[number].count(row - self._first_rows[number])
        return int(counts[self.names.index(name)])

    def growth(self, name: str) -> list[tuple[int, int]]:
        """Row of a source from which on it has so many stages of its tokens, of each phase."""
        return [
            (self.rows_before(name, row), stages.get(name, 1))
            for row, stages in zip(self._first_rows, self._stages, strict=True)
        ]

    def split(self, rows: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """For each source: which of these rows are its own, bool [N], and their numbers in it."""
        source, number = np.empty_like(rows), np.empty_like(rows)
        phases = np.searchsorted(self._first_rows, rows, side="right") - 1
        for phase in np.unique(phases):
            here, cycle = phases == phase, self._cycles[phase]
            cycles, places = np.divmod(rows[here] - self._first_rows[phase], cycle.length)
            source[here] = of = cycle.source[places]
            number[here] = (
                self._before[phase][of] + cycles * cycle.shares[of] + cycle.earlier[places]
            )
        return {
            self.names[of]: (own := source == of, number[own]) for of in np.unique(source).tolist()
        }
