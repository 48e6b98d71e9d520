"""The curves of a report: which metrics are drawn, from which rows."""

import re
from collections.abc import Sequence
from typing import Any

from jaxlm.report.history import History, goodput, times

CHARTS: dict[str, dict[str, Any]] = {
    "train/loss": {"unit": "nats per token", "smoothed": True},
    "eval/loss": {"unit": "nats per token", "points": True},
    "eval/bits_per_byte": {"unit": "bits per byte", "points": True},
    "train/learning_rate": {"unit": "learning rate"},
    "train/grad_norm": {"unit": "norm", "smoothed": True, "log": True},
    "train/tokens_per_s": {"unit": "tokens per second", "smoothed": True},
    "train/mfu": {"unit": "share of peak FLOP/s"},
    "goodput": {"unit": "% of time on steps", "bounds": (0, 100)},
}
"""Metric -> arguments of `draw_curves`, in page order; a metric without values is left out."""
_MAX_SOURCES = 8
_OF_NAMED = re.compile(r"eval/.+/(?!(?:loss|perplexity|bits_per_byte)$)[^/]+")
Points = list[tuple[int, float]]
"""(step, value)."""


def find_curves(histories: Sequence[History]) -> list[tuple[str, list[Points], dict[str, Any]]]:
    """Title, points of each run, and arguments of `draw_curves`, of each chart with values."""
    found = []
    for metric, options in _metrics(histories).items():
        points = [_points(history, metric) for history in histories]
        if any(points):
            title = "goodput since the start" if metric == "goodput" else metric
            found.append((title, points, options))
    for source in followed_sources(histories):
        points = [_followed(history, source) for history in histories]
        found.append((f"eval --follow: {source}", points, CHARTS["eval/loss"]))
    return found


def _metrics(histories: Sequence[History]) -> dict[str, dict[str, Any]]:
    # `CHARTS`, with losses and other metrics of named held-out sets and tasks; bits per byte where
    # tokenizers differ.
    charts, found = {}, {name for history in histories for row in history.rows for name in row}
    differ = len({history.tokenizer for history in histories}) > 1
    for metric, options in CHARTS.items():
        if metric != "eval/bits_per_byte" or differ:
            charts[metric] = options
        if metric == "eval/loss":
            named = sorted(name for name in found if re.fullmatch(r"eval/.+/loss", name))
            charts |= dict.fromkeys(named[:_MAX_SOURCES], options)
            others = sorted(name for name in found if _OF_NAMED.fullmatch(name))[:_MAX_SOURCES]
            charts |= {n: {"unit": n.rpartition("/")[2], "points": True} for n in others}
    return charts


def _points(history: History, metric: str) -> Points:
    if metric == "goodput":
        found = [(row["step"], times(row)) for row in history.rows]
        return [(int(step), 100 * goodput(s)) for step, s in found if s]
    return [(int(row["step"]), row[metric]) for row in history.rows if metric in row]


def _followed(history: History, source: str) -> Points:
    # A run that rolled back evaluates a step twice: the later row counts.
    return sorted({r["step"]: r["loss"] for r in history.evals if r["source"] == source}.items())


def followed_sources(histories: Sequence[History]) -> list[str]:
    """Sources of `jaxlm eval --follow`, in any of the runs."""
    return sorted({row["source"] for history in histories for row in history.evals})[:_MAX_SOURCES]
