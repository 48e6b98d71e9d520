import contextlib
import errno
import io
import logging
import math
import os
import pty
import re
import sys
import threading
import time

import pytest

from jaxlm.tracking import console as module
from jaxlm.tracking.console import Console, format_bytes, format_count, format_duration
from jaxlm.tracking.metrics import perplexity

ROW = {
    "train/loss": 4.7748,
    "train/learning_rate": 6e-4,
    "train/grad_norm": 0.53,
    "train/tokens_per_s": 12345.4,
}
BANNER = """
============================================================
Evaluation at step 500 | 14:03:07
  Eval Loss: 4.7867
  Eval PPL: 119.90
  🎯 New best eval loss!
============================================================

"""


def eval_row(loss: float) -> dict[str, float]:
    return {"eval/loss": loss, "eval/perplexity": perplexity(loss)}


def warn(console: Console, text: str) -> None:
    with console.lines():
        logging.getLogger("jaxlm.training.loop").warning(text)


@pytest.fixture(autouse=True)
def at_this_time(monkeypatch):
    time.strptime(module._now(), "%H:%M:%S")
    monkeypatch.setattr(module, "_now", lambda: "14:03:07")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def ascii_stream() -> tuple[io.BytesIO, io.TextIOWrapper]:
    raw = io.BytesIO()
    return raw, io.TextIOWrapper(raw, encoding="ascii")


def test_a_step_line_is_the_seeds():
    out = io.StringIO()
    console = Console(30_000, stream=out)
    console.step(500, ROW, 5025)
    console.step(1000, {**ROW, "train/loss": math.log(69.01), "train/mfu": 0.4123}, None)
    assert out.getvalue().splitlines() == [
        "Step   500/30000 | Loss: 4.7748 | PPL:  118.49 | LR: 6.00e-04 | Grad: 0.53 | "
        "Tok/s: 12,345 | 01:23:45 left | 14:03:07",
        "Step  1000/30000 | Loss: 4.2343 | PPL:   69.01 | LR: 6.00e-04 | Grad: 0.53 | "
        "Tok/s: 12,345 | MFU: 41.2% | 14:03:07",
    ]


def test_the_banner_is_the_seeds():
    out = io.StringIO()
    Console(30_000, stream=out).evaluation(500, eval_row(4.78668), None, improved=True)
    assert out.getvalue() == BANNER


@pytest.mark.parametrize(
    "loss, best_loss, expected",
    [
        (4.9, 4.7867, ["  Eval Loss: 4.9000", "  Eval PPL: 134.29", "  Best eval loss: 4.7867"]),
        (math.nan, None, ["  Eval Loss: nan", "  Eval PPL: nan", "  Best eval loss: none yet"]),
    ],
)
def test_the_banner_without_a_new_best(loss, best_loss, expected):
    out = io.StringIO()
    Console(30_000, stream=out).evaluation(1000, eval_row(loss), best_loss, improved=False)
    assert out.getvalue().splitlines()[3:6] == expected


@pytest.mark.parametrize("loss, ppl", [(1000.0, "inf"), (math.nan, "nan"), (100.0, "2.69e+43")])
def test_a_loss_beyond_all_bounds_is_printed(loss, ppl):
    out = io.StringIO()
    console = Console(10, stream=out)
    console.step(1, {**ROW, "train/loss": loss, "train/grad_norm": math.inf}, math.nan)
    console.evaluation(1, eval_row(loss), 4.0, improved=False)
    assert re.search(rf"PPL: +{re.escape(ppl)} \|.*Grad: inf .*--:--:-- left", out.getvalue())
    assert f"  Eval PPL: {ppl}\n" in out.getvalue()


def test_a_stream_that_cannot_encode_gets_plain_text():
    raw, out = ascii_stream()
    console = Console(10, stream=out)
    console.evaluation(5, eval_row(1.0), None, improved=True)
    console.saved(5, "runs/größe", best=True)
    console.saved(5, "runs/\udcff", best=False)
    text = raw.getvalue().decode("ascii")
    assert "\n  New best eval loss!\n" in text
    assert text.endswith(
        "Best model checkpoint saved: runs/gr\\xf6\\xdfe | 14:03:07\n"
        "Checkpoint saved: runs/\\udcff | 14:03:07\n"
    )
    with pytest.raises(UnicodeEncodeError):  # the control: such a stream does refuse
        ascii_stream()[1].write("🎯")


def test_saved_lines_from_many_threads_stay_whole():
    class Whole(io.StringIO):
        def write(self, text: str) -> int:
            assert text.endswith("\n")  # one write a line, so that no other comes between
            return super().write(text)

    out = Whole()
    console = Console(10, stream=out)
    threads = [
        threading.Thread(
            target=lambda: [console.saved(s, f"runs/a@{s}", best=False) for s in range(50)]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    line = "💾 Checkpoint saved: runs/a@{} | 14:03:07"
    expected = sorted(line.format(s) for s in range(50) for _ in range(4))
    assert sorted(out.getvalue().splitlines()) == expected


def say_everything(console: Console) -> None:
    console.progress(1)
    warn(console, "x")
    console.step(1, ROW, None)
    console.evaluation(1, eval_row(3.0), None, improved=True)
    console.saved(1, "runs/a", best=True)
    console.progress(10)
    console.close()


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.ENOSPC, "full"), ValueError()])
@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_stream_that_is_gone_does_not_stop_the_run(error, kind, terminal):
    class Gone(kind):
        def write(self, text: str) -> int:
            raise error

        def flush(self) -> None:
            raise error

    say_everything(Console(10, stream=Gone()))


def test_a_terminal_that_goes_away_does_not_stop_the_run(terminal):
    ours, theirs = pty.openpty()
    with open(theirs, "w", buffering=1) as stream:
        console = Console(10, stream=stream)
        console.progress(1)
        drawn = b""
        while b"Step 1/10" not in drawn:  # a terminal gives what it has so far
            drawn += os.read(ours, 65536)
        os.close(ours)
        with pytest.raises(OSError, match="Input/output"):  # the control
            stream.write("x\n")
        say_everything(console)
        with contextlib.suppress(OSError):
            stream.close()


@pytest.mark.parametrize("closed", [True, False])
def test_a_stream_that_is_closed_does_not_stop_the_run(closed, monkeypatch):
    stream = Terminal()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream if closed else None)  # None: `>&-`
    say_everything(Console(10))


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_pipe_or_a_dumb_terminal_gets_no_control_codes(term, terminal, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich alone would draw in a pipe then
    if term:
        monkeypatch.setenv("TERM", term)
    out = terminal if term else io.StringIO()
    console = Console(10, stream=out)
    console.progress(1)
    warn(console, "careful")
    console.step(10, ROW, 0)
    console.close()
    lines = out.getvalue().splitlines()
    assert lines[0] == "Warning: careful" and len(lines) == 2
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


def test_a_terminal_gets_a_bar_and_whole_lines(terminal):
    console = Console(20, stream=terminal)
    log = logging.getLogger("jaxlm.training.loop")
    with console.lines():
        log.info("[bold]as it is[/bold] :smile: " + "x" * 150)
        console.progress(1)
        console.step(10, ROW, 60)
        console.step(20, ROW, 0)
        console.close()
        log.info("after the end")
    text = terminal.getvalue()
    assert "[bold]as it is[/bold] :smile: " + "x" * 150 + "\n" in text  # no wrapping of its own
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "Step 1/20" in plain and "Step 20/20" in plain and "Loss 4.7748" in plain
    assert "━" in plain
    assert plain.endswith("after the end\n")
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is back


def test_a_killed_run_leaves_the_cursor_visible(terminal):
    console = Console(20, stream=terminal)
    console.progress(1)  # and no close
    text = terminal.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > -1
    console.close()


@pytest.mark.parametrize("width", [5, 12, 30, 200])
def test_the_bar_stays_on_one_line(width, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    console = Console(30_000, stream=terminal)
    console.progress(1)
    before = len(terminal.getvalue())
    console.progress(30_000)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()[before:])
    assert 0 < len(drawn.strip("\r")) <= width and "\n" not in drawn
    console.close()


def test_no_color_is_respected(terminal, monkeypatch):
    colored = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    warn(Console(10, stream=terminal), "careful")
    assert colored.search(terminal.getvalue())
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    console = Console(10, stream=plain)
    warn(console, "careful")
    console.progress(5)
    console.close()
    assert "careful" in plain.getvalue() and not colored.search(plain.getvalue())


def test_formats():
    assert [format_bytes(x) for x in (0, 999, 999.96, 1500, 2_100_000_000, 4e15)] == [
        "0 B", "999 B", "1.0 kB", "1.5 kB", "2.1 GB", "4.0 PB",
    ]  # fmt: skip
    assert [format_count(x) for x in (7, 1000, 999_960, 180_400_000, 2e9, 5e15)] == [
        "7", "1.0 k", "1.0 M", "180.4 M", "2.0 B", "5000.0 T",
    ]  # fmt: skip
    assert [format_duration(x) for x in (-1, 0.4, 3600, 90_061, math.inf)] == [
        "00:00:00", "00:00:00", "01:00:00", "1d 01:01:01", "--:--:--",
    ]  # fmt: skip
