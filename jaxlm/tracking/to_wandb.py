"""The Weights & Biases tracker: rows of metrics.jsonl as one curve over all starts."""

import html
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Config, to_dict
from jaxlm.tracking.trackers import Row

_log = logging.getLogger(__name__)


def open_tracker(
    config: Config, history: Sequence[Row], run_id: str, earlier: str | None
) -> "Wandb":
    """A tracker that resumes the W&B run `earlier`, or starts the W&B run `run_id`.

    W&B cannot delete rows: a W&B run with steps past the history is not resumed.
    """
    if earlier and earlier != run_id and config.tracking.wandb == "online":
        run = _init(config, earlier)
        if run.step <= (history[-1]["step"] + 1 if history else 0):
            return Wandb(config, run, earlier, history)
        run.finish()
    return Wandb(config, _init(config, run_id), run_id, history)


def _init(config: Config, run_id: str) -> Any:
    import wandb

    online = config.tracking.wandb == "online"
    hooks = sys.exit, sys.excepthook
    try:
        return wandb.init(
            project=config.tracking.wandb_project,
            name=Path(config.run_dir).resolve().name,
            id=run_id,
            mode="online" if online else "offline",
            resume="allow" if online else None,
            reinit="create_new",  # leaves a W&B run of the caller open
            dir=config.run_dir,
            settings=wandb.Settings(
                silent=True, console="off", disable_code=True, init_timeout=20, finish_timeout=60
            ),
        )
    finally:
        sys.exit, sys.excepthook = hooks  # wandb wraps both and never restores them


class Wandb:
    """The W&B tracker: one W&B row for each step, with its training and eval metrics.

    Offline, each start replays the whole history into a new folder, since an offline run cannot be
    resumed: the newest folder has all rows. Online, only rows that the server lacks are sent.

    Attributes:
      run_id: id of the W&B run.
    """

    def __init__(self, config: Config, run: Any, run_id: str, history: Sequence[Row]):
        self.run_id = run_id
        self._config, self._run, self._step = config, run, 0
        self._pending: Row = {}
        self._online = config.tracking.wandb == "online"
        run.config.update(to_dict(config), allow_val_change=True)
        if self._online:
            _log.info(f"W&B: {run.url}")
        first = run.step
        for row in history:
            if row["step"] >= first:
                self.log(row["step"], row)

    def log(self, step: int, row: Row) -> None:
        """Adds a row to the pending step; sends the previous step first if `step` is new."""
        if step != self._step:
            self._send()
        self._step = step
        self._pending |= {name: value for name, value in row.items() if name != "step"}

    def show(self, step: int, name: str, text: str, is_html: bool) -> None:
        """Adds a panel of HTML to a step."""
        import wandb

        page = text if is_html else f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        # Without `inject=False`, W&B adds a stylesheet from the network.
        self.log(step, {name: wandb.Html(page, inject=False, data_is_not_path=True)})

    def _send(self) -> None:
        if self._pending:
            self._run.log(self._pending, step=self._step, commit=True)
        self._pending = {}

    def close(self, *, failed: bool = False) -> None:
        """Sends the pending step, and ends the W&B run."""
        # W&B drops later rows of a step that it has. If a stop skipped the eval of a step, leave
        # the step to the resumed run, which sends row and eval together.
        at_end = self._step == self._config.num_steps
        eval_due = at_end or self._step % self._config.eval_interval == 0
        if not (self._online and eval_due and "eval/loss" not in self._pending):
            self._send()
        self._run.finish(exit_code=int(failed))
