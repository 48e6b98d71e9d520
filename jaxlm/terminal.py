"""Terminal input and output: streams, log lines, progress, colours, signals, exit codes."""

import contextlib
import functools
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, ParamSpec, TextIO, TypeVar, cast

Item = TypeVar("Item")
Args = ParamSpec("Args")

STOPPED = 75
"""Exit code of an incomplete run (EX_TEMPFAIL) that stopped on request and saved, or lost another
process. Starting it again resumes it."""

_drawing = threading.Lock()
_LOG = logging.getLogger("jaxlm")


class _NullStream(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


class _Output:
    def __init__(self, stream: TextIO | None, strict: bool):
        self._stream = cast(TextIO, _NullStream()) if stream is None else stream
        self._dropped = () if strict else (OSError, ValueError)  # ValueError: the stream is closed

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        shown = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        with contextlib.suppress(*self._dropped):
            self._stream.write(shown)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(*self._dropped):
            self._stream.flush()

    def isatty(self) -> bool:
        return is_terminal(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def output(stream: TextIO | None, *, strict: bool = False) -> TextIO:
    """A stream that escapes characters it cannot encode, and drops text it cannot write.

    A closed terminal, a closed pipe or a full disk would otherwise end a run.

    Args:
      stream: the stream to write to; None, as Python has for a closed descriptor, drops all text.
      strict: raise the errors of `stream` instead of dropping text.
    """
    return cast(TextIO, _Output(stream, strict))


class _Lines(logging.Handler):
    def __init__(self, write: Callable[[str], None], warn: Callable[[str], None]):
        super().__init__()
        self._write, self._warn = write, warn
        self.before = _LOG.level, _LOG.propagate
        if outer := _active_handlers():
            self.before = outer[-1].before

    def emit(self, record: logging.LogRecord) -> None:
        if _active_handlers()[-1:] == [self]:
            warns = record.levelno >= logging.WARNING
            with contextlib.suppress(OSError, ValueError):  # of a closed or full stream
                (self._warn if warns else self._write)("Warning: " * warns + record.getMessage())


def _names_below(name: str) -> list[str]:
    return [other for other in logging.root.manager.loggerDict if other.startswith(f"{name}.")]


def _active_handlers() -> list[_Lines]:
    return [handler for handler in _LOG.handlers if isinstance(handler, _Lines)]


@contextlib.contextmanager
def log_to(
    write: Callable[[str], None], warn: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Sends log records of jaxlm to `write`, as lines; an outer `log_to` receives none meanwhile.

    Other handlers of the logger "jaxlm" receive the records too.

    Args:
      write: called with each line, from any thread.
      warn: called instead of `write` with each line that begins with "Warning: ".
    """
    handler = _Lines(write, warn or write)
    # `logging.config` disables existing loggers, so damage would go unreported: enable them.
    loggers = [_LOG, *map(logging.getLogger, _names_below(_LOG.name))]
    disabled = [logger for logger in loggers if logger.disabled]
    for logger in disabled:
        logger.disabled = False
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False
    try:
        yield
    finally:
        _LOG.removeHandler(handler)
        for logger in disabled:
            logger.disabled = True
        if not _active_handlers():
            level, _LOG.propagate = handler.before
            _LOG.setLevel(level)


def prints_lines(function: Callable[Args, Item]) -> Callable[Args, Item]:
    """Decorates a function to print its log records, unless the program has configured logging.

    Logging is configured if the logger "jaxlm" has a level, or the root logger has INFO or lower. A
    handler proves nothing: the import of Orbax adds one to the root logger.
    """

    @functools.wraps(function)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Item:
        if _LOG.level or _LOG.isEnabledFor(logging.INFO):
            return function(*args, **kwargs)
        with log_to(lambda line: print(line, file=output(sys.stdout))):
            return function(*args, **kwargs)

    return call


def guard_streams() -> None:
    """Wraps standard output and error in `output`, at the start of a process.

    Standard output to a file or a pipe is strict: a truncated result must be an error.
    """
    # Fill closed descriptors 0 to 2: a checkpoint opened as descriptor 2 would receive messages.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if not isinstance(sys.stdout, _Output):
        sys.stdout = output(sys.stdout, strict=not is_terminal(sys.stdout))
    if not isinstance(sys.stderr, _Output):
        sys.stderr = output(sys.stderr)


def catch(receive: Callable[[int, FrameType | None], None], *numbers: int) -> dict[int, Any]:
    """Sets `receive` as handler of these signals, except ignored ones, as under nohup.

    Returns:
      Signal -> previous handler.
    """
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, receive) for number in handled}


def write_error(text: str) -> None:
    """Writes a line to standard error; safe in a signal handler that interrupted `print`."""
    if sys.stderr is not None:  # if closed, descriptor 2 may be another file
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def is_terminal(stream: TextIO | None) -> bool:
    """Whether the stream is an open terminal."""
    with contextlib.suppress(OSError, ValueError):
        return stream is not None and stream.isatty()
    return False


def can_draw(stream: TextIO | None) -> bool:
    """Whether the stream is a terminal that interprets control codes."""
    return is_terminal(stream) and os.environ.get("TERM", "dumb") != "dumb"


def wants_color() -> bool:
    """Whether messages on stdout and stderr may be coloured (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and can_draw(sys.stdout) and can_draw(sys.stderr)


@contextlib.contextmanager
def progress(label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """Draws a progress bar on standard error, if that is a terminal without a bar.

    Args:
      label: a word or two.
      total: amount of work; without it, the bar only pulses.

    Yields:
      A function to call with the amount of work just done.
    """
    if not can_draw(sys.stderr) or not _drawing.acquire(blocking=False):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    # Text printed to a terminal meanwhile appears above the bar.
    bar = Progress(
        console=Console(file=output(sys.stderr)),
        transient=True,
        redirect_stdout=is_terminal(sys.stdout),
    )
    try:
        with bar:
            bar.console.show_cursor(True)  # a kill would leave the cursor hidden
            yield functools.partial(bar.advance, bar.add_task(label, total=total))
    finally:
        _drawing.release()


def track(items: Sequence[Item], label: str) -> Iterator[Item]:
    """Yields the items, with a progress bar."""
    with progress(label, len(items) if len(items) > 1 else None) as advance:
        for item in items:
            yield item
            advance(1)
