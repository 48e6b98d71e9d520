"""Retention: which checkpoints are kept. Orbax's own policies can delete the latest."""

from jaxlm.checkpoints.folder import find_best
from jaxlm.config import CheckpointConfig

IN_TRANSIT = 2
"""Checkpoints on disk in addition to those kept: one being written, one being deleted."""


def choose_kept(
    config: CheckpointConfig,
    eval_losses: dict[int, float | None],
    *,
    state_bytes: int = 0,
    num_in_transit: int = IN_TRANSIT,
) -> set[int]:
    """The steps to keep: the newest, the best and the milestones (multiples of `keep_every`).

    No setting can drop best or latest; the disk budget drops milestones alone.

    Args:
      config: the rules.
      eval_losses: each step on disk, in ascending order -> its held-out loss, None without an eval.
      state_bytes: size of a checkpoint, for the disk budget; 0 if unknown.
      num_in_transit: checkpoints that the budget must hold in addition to those kept.
    """
    steps, best = list(eval_losses), find_best(eval_losses)
    kept = set(steps[-config.keep_latest :]) | ({best.step} if best else set())
    every, budget = config.keep_every, config.disk_budget_gb
    if every is None:
        return kept
    milestones = {step for step in steps if step % every == 0}
    if budget and state_bytes:
        room = budget * 1e9 / state_bytes - num_in_transit
        while milestones - {0} and len(milestones | kept) > room:
            every *= 2  # Drops every other one: the rest stays evenly spaced.
            milestones = {step for step in milestones if step % every == 0}
    return kept | milestones


def num_kept(config: CheckpointConfig) -> int:
    """The number of checkpoints that stay under any budget: the newest and the best."""
    return config.keep_latest + 1


def why_dropped(config: CheckpointConfig) -> str:
    """The reason for deleting a step that `choose_kept` leaves out, for events.jsonl."""
    every, weights = config.keep_every, config.keep_weights_every
    reason = f"neither the best nor of the latest {config.keep_latest}"
    reason += f", and not kept by keep_every {every}" if every else ""
    return reason + (f"; of multiples of {weights}, the weights stay" if weights else "")
