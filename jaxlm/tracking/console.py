"""What a person sees of a run: a progress bar in a terminal, plain lines anywhere else."""

import functools
import math
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, TextIO

import rich.console
from rich.progress import BarColumn, Progress, TextColumn

from jaxlm.terminal import can_draw, log_to, output
from jaxlm.tracking.metrics import perplexity

_RULE = "=" * 60
_REFRESH_INTERVAL_S = 0.25


def format_bytes(num_bytes: float) -> str:
    """Bytes in decimal units, as disks are sold: 2100000000 -> 2.1 GB."""
    return _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB", "PB"))


def format_count(count: float) -> str:
    """A number of tokens or parameters: 180400000 -> 180.4 M, 2e9 -> 2.0 B."""
    return _scaled(count, ("", "k", "M", "B", "T"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 999.95 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.{min(power, 1)}f} {units[power]}".rstrip()


def format_duration(duration_s: float) -> str:
    """Seconds as hh:mm:ss, with days in front where there are any."""
    if not math.isfinite(duration_s):
        return "--:--:--"
    days, rest_s = divmod(max(0, round(duration_s)), 86_400)
    return (f"{days}d " if days else "") + time.strftime("%H:%M:%S", time.gmtime(rest_s))


def _now() -> str:
    # At the end of a line, whose beginning people search for.
    return time.strftime("%H:%M:%S")


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1e6 else f"{value:.2e}"


class Console:
    """Prints a run; every method may be called from any thread."""

    def __init__(self, num_steps: int, *, stream: TextIO | None = None):
        """Prints nothing yet.

        Args:
          num_steps: steps of the whole run.
          stream: where to print; by default standard output.
        """
        self._num_steps = num_steps
        self._stream = output(stream or sys.stdout)
        self._refreshed = 0.0
        self._bar: Progress | None = None
        if can_draw(self._stream):
            # Refreshed from the loop: a thread of its own would compete with the training.
            self._bar = Progress(
                TextColumn("Step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[loss]}"),
                TextColumn("{task.fields[left]}"),
                console=rich.console.Console(file=self._stream, force_terminal=True),
                auto_refresh=False,
                expand=True,
            )
            self._task = self._bar.add_task("", total=num_steps, loss="", left="")

    def lines(self) -> AbstractContextManager[None]:
        """Prints log records meanwhile, warnings in yellow."""
        return log_to(self._print, functools.partial(self._print, style="yellow"))

    def _print(self, text: str, *, style: str | None = None) -> None:
        # Above the bar, where there is one.
        if self._bar is None:
            self._stream.write(text + "\n")
            self._stream.flush()
        else:
            self._bar.console.print(
                text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True
            )

    def step(self, step: int, row: dict[str, Any], seconds_left: float | None) -> None:
        """Prints a training row.

        Args:
          step: steps done.
          row: `train/*` metrics; `train/mfu`, a fraction of the peak, only where it is known.
          seconds_left: time to the end of the run (s), where it is known.
        """
        loss = row["train/loss"]
        width = max(5, len(str(self._num_steps)))
        parts = [
            f"Step {step:>{width}}/{self._num_steps}",
            f"Loss: {loss:.4f}",
            f"PPL: {_number(perplexity(loss)):>7}",
            *([f"LR: {row['train/learning_rate']:.2e}"] if "train/learning_rate" in row else []),
            f"Grad: {_number(row['train/grad_norm'])}",
            f"Tok/s: {row['train/tokens_per_s']:,.0f}",
        ]
        if row.get("train/mfu") is not None:
            parts.append(f"MFU: {row['train/mfu']:.1%}")
        left = "" if seconds_left is None else f"{format_duration(seconds_left)} left"
        if left and self._bar is None:  # the bar has it, and a line of more than 100 columns wraps
            parts.append(left)
        self._print(" | ".join([*parts, _now()]))
        self._update(step, loss=f"Loss {loss:.4f}", left=left)

    def evaluation(
        self, step: int, row: Mapping[str, float], best_loss: float | None, improved: bool
    ) -> None:
        """Prints the banner of an eval.

        Args:
          step: steps done.
          row: `eval/loss`, `eval/perplexity`, and those of named held-out sets.
          best_loss: the best so far, or None before there is one.
          improved: whether this eval is the new best.
        """
        verdict = f"Best eval loss: {'none yet' if best_loss is None else f'{best_loss:.4f}'}"
        if improved:
            verdict = self._with_emoji("🎯", "New best eval loss!")
        lines = [f"Evaluation at step {step} | {_now()}", f"  Eval Loss: {row['eval/loss']:.4f}"]
        lines.append(f"  Eval PPL: {_number(row['eval/perplexity'])}")
        if (bits := row.get("eval/bits_per_byte")) is not None:
            lines.append(f"  Bits per byte: {bits:.4f}")
        for name, value in row.items():
            of, _, metric = name.removeprefix("eval/").rpartition("/")
            if of and metric not in ("perplexity", "bits_per_byte"):
                lines.append(f"  {metric.capitalize()} of {of}: {value:.4f}")
        lines.append(f"  {verdict}")
        self._print("\n".join(["", _RULE, *lines, _RULE, ""]))

    def saved(self, step: int, path: str, best: bool) -> None:
        """Says that a checkpoint is committed; called once it is, from any thread."""
        kind = "Best model checkpoint" if best else "Checkpoint"
        self._print(self._with_emoji("💾", f"{kind} saved: {path} | {_now()}"))

    def progress(self, step: int) -> None:
        """Moves the bar; cheap enough for every step."""
        self._update(step)

    def close(self) -> None:
        """Leaves the bar as it stands; lines may still be printed."""
        if self._bar is not None:
            self._bar.stop()

    def _update(self, step: int, **fields: Any) -> None:
        if self._bar is None:
            return
        self._bar.update(self._task, completed=step, **fields)
        now = time.monotonic()
        if now - self._refreshed >= _REFRESH_INTERVAL_S or step == self._num_steps:
            self._refreshed = now
            self._bar.start()
            self._bar.console.show_cursor(True)  # A killed run would leave it hidden.
            self._bar.refresh()

    def _with_emoji(self, emoji: str, text: str) -> str:
        can_show = emoji.encode(self._stream.encoding, "ignore") != b""
        return f"{emoji} {text}" if can_show else text
