"""Weights & Biases and TensorBoard, both fed from the rows of metrics.jsonl.

A tracker is a convenience: once training has begun, one that fails is reported once and dropped.
"""

import html
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Config, TrackingConfig, to_dict
from jaxlm.extras import MODULES, needs

Row = dict[str, Any]


class Trackers:
    """The trackers that the config asks for, as one, which never raises.

    Attributes:
      run_id: the W&B run.
    """

    def __init__(
        self,
        config: Config,
        history: Sequence[Row],
        *,
        run_id: str | None = None,
        new_future: bool = False,
        say: Callable[[str], None] = print,
    ):
        """Opens the trackers, and gives each the rows it lacks.

        Args:
          config: the run's config.
          history: rows of metrics.jsonl up to here, oldest first.
          run_id: the W&B run so far, or None for a new one.
          new_future: the rows after the history may differ from those made before.
          say: takes a line for the person who watches the run.
        """
        self._trackers: dict[str, _Wandb | _TensorBoard] = {}
        self._say = say
        self.run_id = run_id if run_id and not new_future else secrets.token_hex(4)
        if config.tracking.wandb != "off":
            self._open("W&B", lambda: self._wandb(config, history, run_id))
        if config.tracking.tensorboard:
            self._open("TensorBoard", lambda: _TensorBoard(config, history))

    def _wandb(self, config: Config, history: Sequence[Row], earlier: str | None) -> "_Wandb":
        run = None
        if earlier and earlier != self.run_id and config.tracking.wandb == "online":
            # Continue the same W&B run unless it has steps past ours: W&B deletes no rows.
            run = _init_wandb(config, earlier)
            if run.step > (history[-1]["step"] + 1 if history else 0):
                run.finish()
                run = None
            else:
                self.run_id = earlier
        return _Wandb(config, run or _init_wandb(config, self.run_id), history, self._say)

    def _open(self, name: str, tracker: Callable[[], "_Wandb | _TensorBoard"]) -> None:
        self._guard(name, lambda: self._trackers.update({name: tracker()}))

    def log(self, step: int, row: Row) -> None:
        """Sends one row to every tracker that still works."""
        for name, tracker in list(self._trackers.items()):
            self._guard(name, lambda tracker=tracker: tracker.log(step, row))

    def show(self, step: int, name: str, make: Callable[[], str], *, is_html: bool = False) -> None:
        """Sends a text, made only where there is a tracker; a page of HTML goes to W&B alone."""

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
        except Exception as error:  # The border to the trackers: no failure there may stop a run.
            self._trackers.pop(name, None)
            reason = f"{type(error).__name__}: {error}"
            self._say(f"{name} failed; the run goes on without it ({reason})")


def require(tracking: TrackingConfig) -> None:
    """Checks that the packages of the trackers asked for are installed.

    Raises:
      ImportError: one is missing; the message names the extra to install.
    """
    # Else wandb asks the name server for its error-report host at every start, offline as well.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if tracking.wandb != "off":
        needs(MODULES["wandb"], f"tracking.wandb {tracking.wandb}")
    if tracking.tensorboard:
        needs(MODULES["tensorboard"], "tracking.tensorboard")


def _init_wandb(config: Config, run_id: str) -> Any:
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
            reinit="create_new",  # A run of the caller's own stays as it is.
            dir=config.run_dir,
            settings=wandb.Settings(
                silent=True, console="off", disable_code=True, init_timeout=20, finish_timeout=60
            ),
        )
    finally:
        sys.exit, sys.excepthook = hooks  # wandb wraps both, and never puts them back.


class _Wandb:
    """One W&B row a step: the log row and the eval row of a step go out together.

    Offline, each start replays the whole history into a new folder: a killed process leaves its
    folder short, and an offline run cannot be resumed, so the newest folder is the whole one.
    Online, the rows that the server lacks are sent.
    """

    def __init__(self, config: Config, run: Any, history: Sequence[Row], say: Callable):
        self._config, self._run, self._step = config, run, 0
        self._pending: Row = {}
        self._online = config.tracking.wandb == "online"
        run.config.update(to_dict(config), allow_val_change=True)
        if self._online:
            say(f"W&B: {run.url}")
        first = run.step
        for row in history:
            if row["step"] >= first:
                self.log(row["step"], row)

    def log(self, step: int, row: Row) -> None:
        if step != self._step:
            self._send()
        self._step = step
        self._pending |= {name: value for name, value in row.items() if name != "step"}

    def show(self, step: int, name: str, text: str, is_html: bool) -> None:
        import wandb

        page = text if is_html else f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        # Uninjected: else it gets a stylesheet from the network.
        self.log(step, {name: wandb.Html(page, inject=False, data_is_not_path=True)})

    def _send(self) -> None:
        if self._pending:
            self._run.log(self._pending, step=self._step, commit=True)
        self._pending = {}

    def close(self, *, failed: bool = False) -> None:
        # W&B drops whatever comes for a step it has. So a step whose eval is still to come, in
        # the run that goes on from here, is left to that run.
        at_end = self._step == self._config.num_steps
        eval_due = at_end or self._step % self._config.eval_interval == 0
        if not (self._online and eval_due and "eval/loss" not in self._pending):
            self._send()
        self._run.finish(exit_code=int(failed))


def _scalars(row: Row) -> dict[str, Any]:
    return {"value": [{"tag": k, "simple_value": v} for k, v in row.items() if k != "step"]}


class _TensorBoard:
    """One event file, written anew at each start, so that the folder is one curve.

    tensorboardX's own SummaryWriter hands events to a thread; when that dies (a full disk), its
    queue fills and the run hangs. EventsWriter writes at once, and raises.
    """

    def __init__(self, config: Config, history: Sequence[Row]):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._event_class: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        folder = Path(config.run_dir) / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        earlier = list(folder.glob("events.out.tfevents.*.jaxlm"))
        # The name holds only the second: two starts within one would write to the same file.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}.jaxlm")
        for row in history:
            self._write(row["step"], _scalars(row))
        self._writer.flush()
        for path in earlier:
            path.unlink()

    def _write(self, step: int, summary: Any) -> None:
        event = self._event_class(step=step, wall_time=time.time(), summary=summary)
        self._writer.write_event(event)

    def log(self, step: int, row: Row) -> None:
        self._write(step, _scalars(row))
        self._writer.flush()

    def show(self, step: int, name: str, text: str, is_html: bool) -> None:
        if is_html:  # it can show none
            return
        from tensorboardX.summary import text as summary_of

        self._write(step, summary_of(name, text))
        self._writer.flush()

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()
