"""Which checkpoints are kept: a policy for Orbax, whose own can delete the latest."""

from collections.abc import Sequence
from typing import Any

from jaxlm.config import CheckpointConfig
from jaxlm.folder import find_best

IN_TRANSIT = 2
"""Checkpoints on the disk besides those kept: one being written, one being deleted."""


class Retention:
    """Keeps the newest, the best, and every so many: no setting can drop best or latest."""

    def __init__(self, config: CheckpointConfig):
        self._config = config
        self.state_bytes = 0  # known once a state is saved

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """For each checkpoint, ascending: whether it stays."""
        del context
        steps = [info.step for info in checkpoints]
        best = find_best({info.step: (info.metrics or {}).get("eval_loss") for info in checkpoints})
        kept = set(steps[-self._config.keep_latest :])
        if best:
            kept.add(best.step)
        kept |= self._milestones(steps, kept)
        return [step in kept for step in steps]

    def _milestones(self, steps: list[int], kept: set[int]) -> set[int]:
        every, budget = self._config.keep_every, self._config.disk_budget_gb
        if every is None:
            return set()
        milestones = {step for step in steps if step % every == 0}
        if budget and self.state_bytes:
            room = int(budget * 1e9 / self.state_bytes) - IN_TRANSIT
            while milestones and len(milestones | kept) > room:
                every *= 2  # every other one goes, so that those left stay evenly apart
                milestones = {step for step in milestones if step % every == 0}
        return milestones
