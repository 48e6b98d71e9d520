"""What follows when a loss goes bad: the run stops, or goes back past the batches that did it."""

from jaxlm.config import GuardConfig


class Diverged(Exception):
    """The loss has gone bad, and the run is to go back.

    Attributes:
      step: the batches taken in.
      num_steps: the last steps of these, in which it was bad.
    """

    def __init__(self, step: int, num_steps: int, why: str) -> None:
        super().__init__(why)
        self.step, self.num_steps = step, num_steps


def check_losses(config: GuardConfig, step: int, nonfinite_run: int, spike_run: int) -> None:
    """Looks at the counts of `jaxlm.device.guard.Guard` after a step.

    Raises:
      Diverged: the run is to go back.
      RuntimeError: it is to stop.
    """
    if spike_run >= config.spike_steps:
        raise Diverged(step, spike_run, f"the loss spiked in {spike_run} steps up to {step}")
    if nonfinite_run < config.max_nonfinite:
        return
    why = f"{nonfinite_run} steps in a row up to {step} were not finite"
    if config.on_nonfinite == "rollback":
        raise Diverged(step, nonfinite_run, why)
    raise RuntimeError(
        f"{why}; lower --optim.learning_rate (and add --resume best to go back first), or pass "
        "over such batches with --guard.on_nonfinite rollback"
    )
