"""What a command owes to who started it: colours where they are wanted, progress, exit codes."""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO, TypeVar

Item = TypeVar("Item")

STOPPED = 75
"""Exit code of a run that is not at its end (EX_TEMPFAIL): it was asked to stop and saved, or lost
another process. Start it again to go on."""

_drawing = threading.Lock()


def can_draw(stream: TextIO) -> bool:
    """Whether control codes have a meaning there: it is a terminal, and not a dumb one."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def wants_color() -> bool:
    """Whether a message may be coloured, to whichever of the two streams (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and can_draw(sys.stdout) and can_draw(sys.stderr)


@contextlib.contextmanager
def progress(what: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """Says on standard error that this is going on; draws nothing where that is no terminal.

    Within another one it draws nothing either.

    Args:
      what: a word or two.
      total: how much there is to do; without it, a bar that moves to and fro.

    Yields:
      What to call with how much more of it is done.
    """
    if not can_draw(sys.stderr) or not _drawing.acquire(blocking=False):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    # What is printed meanwhile goes above the bar, unless it goes to a file or a pipe.
    bar = Progress(
        console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()
    )
    try:
        with bar:
            bar.console.show_cursor(True)  # a killed command would leave it hidden
            yield functools.partial(bar.advance, bar.add_task(what, total=total))
    finally:
        _drawing.release()


def track(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items, with the progress through them."""
    with progress(what, len(items) if len(items) > 1 else None) as advance:
        for item in items:
            yield item
            advance(1)
