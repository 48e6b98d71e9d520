"""Which checkpoints are kept. The policies of Orbax can delete the latest."""

from jaxlm.checkpoints.folder import find_best
from jaxlm.config import CheckpointConfig

IN_TRANSIT = 2
"""Checkpoints on disk in addition to those kept: one being written, one being deleted."""


class Retention:
    """Keeps the newest, the best, and every so many: no setting can drop best or latest."""

    def __init__(self, config: CheckpointConfig, num_in_transit: int = IN_TRANSIT):
        self._config = config
        self._num_in_transit = num_in_transit
        self.state_bytes = 0  # known once a state is saved
        self.dropped: dict[str, str] = {}  # step -> why it did not stay

    def kept(self, eval_losses: dict[int, float | None]) -> set[int]:
        """Of the steps, ascending, with their held-out losses: those that stay."""
        steps = list(eval_losses)
        best = find_best(eval_losses)
        kept = set(steps[-self._config.keep_latest :])
        if best:
            kept.add(best.step)
        kept |= self._milestones(steps, kept)
        self.dropped = dict.fromkeys((str(s) for s in steps if s not in kept), self._rule)
        return kept

    @property
    def _rule(self) -> str:
        rule = f"neither the best nor of the latest {self._config.keep_latest}"
        every, weights = self._config.keep_every, self._config.keep_weights_every
        rule += f", and not kept by keep_every {every}" if every else ""
        return rule + (f"; weights stay of multiples of {weights}" if weights else "")

    def _milestones(self, steps: list[int], kept: set[int]) -> set[int]:
        every, budget = self._config.keep_every, self._config.disk_budget_gb
        if every is None:
            return set()
        milestones = {step for step in steps if step % every == 0}
        if budget and self.state_bytes:
            room = budget * 1e9 / self.state_bytes - self._num_in_transit
            while milestones - {0} and len(milestones | kept) > room:
                every *= 2  # every other one goes, so that those left stay evenly apart
                milestones = {step for step in milestones if step % every == 0}
        return milestones
