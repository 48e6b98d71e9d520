"""What follows a complete run (sample, report): functions found by name, not imported."""

import pkgutil
from collections.abc import Callable
from typing import NamedTuple

from jaxlm.checkpoints.folder import Best
from jaxlm.config import Config
from jaxlm.tracking.events import Events
from jaxlm.tracking.metrics import Metrics

_TOOLS = ("jaxlm.inference.sample:sample_at_end", "jaxlm.report.page:report_at_end")


class Complete(NamedTuple):
    """A complete run, with its trackers still open."""

    config: Config
    step: int
    best: Best | None
    events: Events
    metrics: Metrics | None
    """None in all processes but one."""

    def show(self, name: str, make: Callable[[], str], *, is_html: bool = False) -> None:
        """Sends the text that `make` returns to the trackers, if there are any, as `name`."""
        if self.metrics:
            self.metrics.trackers.show(self.step, name, make, is_html=is_html)


AtEnd = Callable[[Complete], None]


def find_tools() -> list[AtEnd]:
    """The functions of `_TOOLS`, without those whose module you have deleted from the source."""
    found = []
    for name in _TOOLS:
        try:
            found.append(pkgutil.resolve_name(name))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("jaxlm"):
                raise
    return found
