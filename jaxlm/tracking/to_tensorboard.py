"""The TensorBoard tracker: rows of metrics.jsonl as one event file."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import Config
from jaxlm.tracking.trackers import Row


def _scalars(row: Row) -> dict[str, Any]:
    return {"value": [{"tag": k, "simple_value": v} for k, v in row.items() if k != "step"]}


class TensorBoard:
    """The TensorBoard tracker: one event file, rewritten at each start, so that one curve is shown.

    tensorboardX's SummaryWriter passes events to a thread. If the thread dies (a full disk), its
    queue fills up and the run hangs. EventsWriter writes directly, and raises.
    """

    def __init__(self, config: Config, history: Sequence[Row]):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._event_class: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
        folder = Path(config.run_dir) / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        earlier = list(folder.glob("events.out.tfevents.*.jaxlm"))
        # tensorboardX names files by the second: two starts in one second would share a file.
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
        """Writes a row and flushes it."""
        self._write(step, _scalars(row))
        self._writer.flush()

    def show(self, step: int, name: str, text: str, is_html: bool) -> None:
        """Writes a text; drops HTML, which TensorBoard cannot show."""
        if is_html:
            return
        from tensorboardX.summary import text as summary_of

        self._write(step, summary_of(name, text))
        self._writer.flush()

    def close(self, *, failed: bool = False) -> None:
        """Closes the file."""
        self._writer.close()
