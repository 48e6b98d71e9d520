"""Curves and timelines as Vega-Lite specs: JSON values that include their data.

Rows and tooltips hold the index of a run; the page shows the run's name instead.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

COLOURS = (
    "#2B8CCB",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#8C8C8C",
    "#A89A00",
)
"""One for each run: the palette of Okabe and Ito, safe for colour-blind readers, and two more; all
are legible on white and on black."""
_NUM_POINTS = 15_000  # total over all charts of a page
_MIN_SMOOTHED = 30
THEME: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "tickColor": "currentColor",
        "domainColor": "currentColor",
        "gridColor": "currentColor",
        "gridOpacity": 0.12,
        "domainOpacity": 0.4,
        "tickOpacity": 0.4,
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
    },
    "axisY": {"minExtent": 58, "maxExtent": 58, "labelLimit": 60},
}
"""The style of all charts: text in the colour of the page, x axes aligned."""


class Curve(NamedTuple):
    """One metric of one run."""

    run: int
    points: list[tuple[int, float]]
    """Step and value, in order."""


def smooth(values: Sequence[float]) -> list[float]:
    """The exponential moving average over about a thirtieth of the values, at most 100.

    The bias towards the initial 0 is corrected as in Adam (Kingma and Ba, 2015). Non-finite values
    are skipped.
    """
    weight = 1 - 1 / min(max(len(values) / 30, 2), 100)
    mean, share, found = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean = weight * mean + (1 - weight) * value
            share = weight * share + (1 - weight)
        found.append(mean / share if share else math.nan)
    return found


def thin(values: Sequence[float], num_buckets: int) -> list[int]:
    """The indices of the lowest and highest value of each bucket, ascending, so that spikes stay.

    The first non-finite value of each bucket stays too, and breaks the line.
    """
    if len(values) <= 2 * num_buckets:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for bucket in range(num_buckets):
        start, stop = (len(values) * n // num_buckets for n in (bucket, bucket + 1))
        finite = [i for i in range(start, stop) if math.isfinite(values[i])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        kept |= set([i for i in range(start, stop) if not math.isfinite(values[i])][:1])
    return sorted(kept)


def draw_curves(
    curves: list[Curve],
    runs: list[str],
    steps: tuple[int, int],
    *,
    unit: str,
    smoothed: bool = False,
    points: bool = False,
    log: bool = False,
    bounds: tuple[float, float] | None = None,
    num_charts: int = 8,
) -> dict[str, Any]:
    """A chart of one metric.

    Args:
      curves: at most one for each run.
      runs: names of the runs.
      steps: range of the x axis.
      unit: title of the y axis.
      smoothed: draw raw values faintly and their moving average in front, unless values are few.
      points: draw a mark at each value.
      log: use a logarithmic y axis if the values span a large range.
      bounds: range of the y axis.
      num_charts: charts of the page, which share the maximum number of points.
    """
    smoothed = smoothed and max((len(xy) for _, xy in curves), default=0) >= _MIN_SMOOTHED
    data, num_buckets = [], max(50, _NUM_POINTS // (2 * num_charts * len(runs)))
    for run, xy in curves:
        values = [y for _, y in xy]
        smooth_values = smooth(values)
        for i in thin(values, num_buckets):
            row = {"x": xy[i][0], "y": _short(values[i]), "r": run}
            data.append(row | ({"s": _short(smooth_values[i])} if smoothed else {}))
    y = {"field": "y", "type": "quantitative", "title": unit, "scale": _scale(data, log, bounds)}
    if y["scale"].get("type") == "log":
        y["axis"] = {"values": _decades(data)}
    encoding = {"x": _steps_axis(steps), "y": y, "color": _colour(runs)}
    layers: list[dict[str, Any]] = [
        {
            "mark": {
                "type": "line",
                "point": {"size": 30} if points else False,
                "strokeWidth": 1 if smoothed else 1.8,
                "opacity": 0.4 if smoothed else 1,
            },
            "encoding": encoding,
        }
    ]
    if smoothed:
        front = encoding | {"y": y | {"field": "s"}}
        layers.append({"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": front})
    layers.append(_hover(encoding, smoothed, unit))
    return _spec(data, layers, height=170)


def draw_timeline(
    events: list[tuple[int, int, str, str]],
    runs: list[str],
    steps: tuple[int, int],
    kinds: Sequence[str],
) -> dict[str, Any]:
    """A chart of events.

    Args:
      events: run, step, kind and reason.
      runs: names of the runs.
      steps: range of the x axis.
      kinds: kinds from top to bottom; a kind without events is left out.
    """
    data = [{"r": r, "x": x, "k": kind, "w": why[:120]} for r, x, kind, why in events]
    present = [kind for kind in kinds if any(kind == event[2] for event in events)]
    encoding = {
        "x": _steps_axis(steps),
        "y": {
            "field": "k",
            "type": "nominal",
            "title": " ",
            "scale": {"domain": present},
            "axis": {"grid": True},
        },
        "yOffset": {"field": "r", "type": "nominal"},
        "color": _colour(runs),
        "tooltip": [
            {"field": "r", "title": "run", "format": "d"},
            {"field": "x", "title": "step"},
            {"field": "k", "title": "event"},
            {"field": "w", "title": "why"},
        ],
    }
    mark = {"type": "point", "filled": True, "size": 45, "opacity": 0.9}
    height = len(present) * max(20, 12 * len(runs))
    return _spec(data, [{"mark": mark, "encoding": encoding}], height=height)


def _spec(data: list[dict[str, Any]], layers: list[dict[str, Any]], height: int) -> dict[str, Any]:
    return {
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": data},
        "layer": layers,
    }


def _hover(encoding: dict[str, Any], smoothed: bool, unit: str) -> dict[str, Any]:
    shown = [("r", "run", "d"), ("x", "step", ","), ("y", unit, ".5~g")]
    shown += [("s", "smoothed", ".5~g")] if smoothed else []
    # Without a format on each field, Vega-Lite misplaces the nearest point.
    tooltip = [{"field": field, "title": title, "format": form} for field, title, form in shown]
    near = {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}
    opacity = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    return {
        "params": [{"name": "near", "select": near}],
        "mark": {"type": "point", "filled": True, "size": 45},
        "encoding": encoding | {"opacity": opacity, "tooltip": tooltip},
    }


def _steps_axis(steps: tuple[int, int]) -> dict[str, Any]:
    scale = {"domain": list(steps), "nice": False}
    axis = {"title": "step", "tickCount": 6, "format": "~s", "labelFlush": True}
    return {"field": "x", "type": "quantitative", "scale": scale, "axis": axis}


def _scale(
    data: list[dict[str, Any]], log: bool, bounds: tuple[float, float] | None
) -> dict[str, Any]:
    if bounds:
        return {"domain": list(bounds)}
    values = [row["y"] for row in data if row["y"] is not None]
    if log and values and min(values) > 0 and max(values) > 20 * statistics.median(values):
        return {"type": "log"}
    return {"zero": False}


def _decades(data: list[dict[str, Any]]) -> list[float]:
    values = [row["y"] for row in data if row["y"] is not None]
    low, high = (math.floor(math.log10(value)) for value in (min(values), max(values)))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    return [step * 10.0**power for power in range(low, high + 2) for step in steps]


def _colour(runs: list[str]) -> dict[str, Any]:
    scale = {"domain": list(range(len(runs))), "range": list(COLOURS[: len(runs)])}
    return {"field": "r", "type": "nominal", "scale": scale, "legend": None}


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
