"""The trackers of a run, which receive the rows of metrics.jsonl.

No run depends on a tracker: if one fails during training, the error is reported once and the
tracker dropped.
"""

import logging
import os
import pkgutil
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from jaxlm.config import Config, TrackingConfig
from jaxlm.extras import MODULES, needs

_log = logging.getLogger(__name__)

Row = dict[str, Any]


class Tracker(Protocol):
    """An interface for showing the rows of a run; its errors never stop the run."""

    def log(self, step: int, row: Row) -> None:
        """Receives a row of metrics.jsonl."""
        ...

    def show(self, step: int, name: str, text: str, is_html: bool) -> None:
        """Receives a sample or a report of the complete run."""
        ...

    def close(self, *, failed: bool) -> None:
        """Called once, when this process ends its training."""
        ...


OpenTracker = Callable[[Config, Sequence[Row]], Tracker]
"""(config, rows so far, oldest first) -> tracker; only a resumed run has rows."""


class Trackers:
    """All trackers of a run, as one that never raises.

    Attributes:
      run_id: the W&B run.
    """

    def __init__(
        self,
        config: Config,
        history: Sequence[Row],
        *,
        run_id: str | None = None,
        settings_changed: bool = False,
        own: Sequence[OpenTracker] = (),
    ):
        """Opens the trackers, passing each the history to catch up.

        Args:
          config: the run's config, which selects W&B or TensorBoard.
          history: rows of metrics.jsonl up to here, oldest first.
          run_id: the W&B run so far, or None for a new one.
          settings_changed: begin a new W&B run; later rows may differ from those sent.
          own: openers of other trackers.
        """
        self._trackers: dict[str, Tracker] = {}
        new_id = run_id if run_id and not settings_changed else secrets.token_hex(4)
        self.run_id = new_id
        if config.tracking.wandb != "off":
            open_wandb = pkgutil.resolve_name("jaxlm.tracking.to_wandb:open_tracker")
            self._open("W&B", partial(open_wandb, config, history, new_id, run_id))
            self.run_id = getattr(self._trackers.get("W&B"), "run_id", new_id)
        if config.tracking.tensorboard:
            open_tensorboard = pkgutil.resolve_name("jaxlm.tracking.to_tensorboard:TensorBoard")
            self._open("TensorBoard", partial(open_tensorboard, config, history))
        for number, open_own in enumerate(own, 1):
            self._open(
                f"tracker {number} of your own",
                partial(open_own, config, [dict(row) for row in history]),
            )

    def _open(self, name: str, make: Callable[[], Tracker]) -> None:
        self._guard(name, lambda: self._trackers.update({name: make()}))

    def log(self, step: int, row: Row) -> None:
        """Sends one row to every tracker that has not failed."""
        for name, tracker in list(self._trackers.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(step, dict(row)))

    def show(self, step: int, name: str, make: Callable[[], str], *, is_html: bool = False) -> None:
        """Sends a text, made only if there is a tracker; TensorBoard drops HTML."""

        def send() -> None:
            text = make()
            for each, tracker in list(self._trackers.items()):
                self._guard(each, lambda tracker=tracker: tracker.show(step, name, text, is_html))

        if self._trackers:
            self._guard(name, send)

    def close(self, *, failed: bool = False) -> None:
        """Closes all; a second call does nothing."""
        for name, tracker in list(self._trackers.items()):
            self._guard(name, lambda tracker=tracker: tracker.close(failed=failed))
        self._trackers.clear()

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:  # No failure of a tracker may stop a run.
            self._trackers.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            _log.info(f"{name} failed; the run goes on without it ({reason})")


def require(tracking: TrackingConfig) -> None:
    """Checks for the trackers' packages; turns wandb error reports off.

    Raises:
      ImportError: a package is missing; the message names the extra to install.
    """
    # Else wandb asks the name server for its error-report host at every start, offline as well.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if tracking.wandb != "off":
        needs(MODULES["wandb"], f"tracking.wandb {tracking.wandb}")
    if tracking.tensorboard:
        needs(MODULES["tensorboard"], "tracking.tensorboard")
