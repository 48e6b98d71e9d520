"""What a person at a terminal sees and sends: output, progress, colours, signals, exit codes."""

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
"""Exit code of a run that is not at its end (EX_TEMPFAIL): it was asked to stop and saved, or lost
another process. Start it again to go on."""

_drawing = threading.Lock()
_LOG = logging.getLogger("jaxlm")


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


class _Output:
    def __init__(self, stream: TextIO | None, strict: bool):
        self._stream = cast(TextIO, _Nowhere()) if stream is None else stream
        self._dropped = () if strict else (OSError, ValueError)  # the latter of a closed stream

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
    """A stream for people: what it cannot encode is escaped, what it cannot write is dropped.

    Else a closed terminal, a pipe without a reader or a full disk would end a run on its way.

    Args:
      stream: where to write; None, which Python has for a closed descriptor, takes everything.
      strict: raise what `stream` raises when it cannot write.
    """
    return cast(TextIO, _Output(stream, strict))


class _Lines(logging.Handler):
    def __init__(self, write: Callable[[str], None], warn: Callable[[str], None]):
        super().__init__()
        self._write, self._warn = write, warn
        self.before = _LOG.level, _LOG.propagate
        if outer := _listening():
            self.before = outer[-1].before

    def emit(self, record: logging.LogRecord) -> None:
        if _listening()[-1:] == [self]:
            warns = record.levelno >= logging.WARNING
            with contextlib.suppress(OSError, ValueError):  # of a stream, as in `output`
                (self._warn if warns else self._write)("Warning: " * warns + record.getMessage())


def _names_below(name: str) -> list[str]:
    return [other for other in logging.root.manager.loggerDict if other.startswith(f"{name}.")]


def _listening() -> list[_Lines]:
    return [handler for handler in _LOG.handlers if isinstance(handler, _Lines)]


@contextlib.contextmanager
def log_to(
    write: Callable[[str], None], warn: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Sends log records of jaxlm to `write`, as lines; an outer `log_to` gets none meanwhile.

    A handler of the caller's own on the logger "jaxlm" gets the records as well.

    Args:
      write: takes a line, in any thread.
      warn: takes a line that begins with "Warning: ", in place of `write`.
    """
    own = _Lines(write, warn or write)
    # `logging.config` disables the loggers that exist, and damage would go unreported.
    loggers = [_LOG, *map(logging.getLogger, _names_below(_LOG.name))]
    disabled = [logger for logger in loggers if logger.disabled]
    for logger in disabled:
        logger.disabled = False
    _LOG.addHandler(own)
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False
    try:
        yield
    finally:
        _LOG.removeHandler(own)
        for logger in disabled:
            logger.disabled = True
        if not _listening():
            level, _LOG.propagate = own.before
            _LOG.setLevel(level)


def prints_lines(function: Callable[Args, Item]) -> Callable[Args, Item]:
    """A function that prints its log records, unless the program has set a level for them.

    The level is that of the logger "jaxlm", or INFO at the root. A handler is no sign of a program
    that listens: the import of Orbax gives one to the root logger.
    """

    @functools.wraps(function)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Item:
        if _LOG.level or _LOG.isEnabledFor(logging.INFO):
            return function(*args, **kwargs)
        with log_to(lambda line: print(line, file=output(sys.stdout))):
            return function(*args, **kwargs)

    return call


def guard_streams() -> None:
    """Makes standard output and error those of `output`; for the beginning of a process.

    Standard output to a file or a pipe stays strict: a result that was cut short is no success.
    """
    # The next file to be opened, a checkpoint say, would take the number of a closed descriptor,
    # and then the messages for standard error.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if not isinstance(sys.stdout, _Output):
        sys.stdout = output(sys.stdout, strict=not is_terminal(sys.stdout))
    if not isinstance(sys.stderr, _Output):
        sys.stderr = output(sys.stderr)


def catch(receive: Callable[[int, FrameType | None], None], *numbers: int) -> dict[int, Any]:
    """Has these signals call `receive`, and leaves alone what was ignored, as by nohup.

    Returns:
      The handlers before, by signal.
    """
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, receive) for number in heard}


def write_error(text: str) -> None:
    """Writes a line to standard error from a signal handler, which may have interrupted `print`."""
    if sys.stderr is not None:  # else its descriptor may belong to another file
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def is_terminal(stream: TextIO | None) -> bool:
    """Whether it is one; a stream that is closed is none."""
    with contextlib.suppress(OSError, ValueError):
        return stream is not None and stream.isatty()
    return False


def can_draw(stream: TextIO | None) -> bool:
    """Whether control codes have a meaning there: it is a terminal, and not a dumb one."""
    return is_terminal(stream) and os.environ.get("TERM", "dumb") != "dumb"


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
        console=Console(file=output(sys.stderr)),
        transient=True,
        redirect_stdout=is_terminal(sys.stdout),
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
