"""The report of one run or several: one HTML page that needs nothing else.

All that comes from disk is escaped, and the page's own policy lets no script run but ours, by its
checksum, and nothing be loaded.
"""

import base64
import datetime
import functools
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from jaxlm.extras import needs
from jaxlm.report.charts import COLOURS, THEME, Curve, draw_curves, draw_timeline
from jaxlm.report.history import EVENTS, History, goodput, times
from jaxlm.tracking.clock import KINDS
from jaxlm.tracking.console import format_bytes, format_count, format_duration

CHARTS: dict[str, dict[str, Any]] = {
    "train/loss": {"unit": "nats per token", "smoothed": True},
    "eval/loss": {"unit": "nats per token", "points": True},
    "train/learning_rate": {"unit": "learning rate"},
    "train/grad_norm": {"unit": "norm", "smoothed": True, "log": True},
    "train/tokens_per_s": {"unit": "tokens per second", "smoothed": True},
    "train/mfu": {"unit": "share of peak FLOP/s"},
    "goodput": {"unit": "% of time on steps", "bounds": (0, 100)},
}
"""Metric -> how it is drawn, in order; one that no run has is left out."""
_MAX_ROWS = 100
"""Of a table, for each run."""
_MAX_CHARS = 160

_DRAW = """
const specs = JSON.parse(document.getElementById("specs").textContent);
const formatTooltip = (shown, escaped) => "<table>" +
  Object.entries({...shown, run: specs.runs[shown.run]}).map(([name, value]) =>
    `<tr><td class="key">${escaped(name)}</td><td>${escaped(String(value))}</td></tr>`).join("") +
  "</table>";
const options = {actions: false, ast: true, renderer: "svg", defaultStyle: false,
                 config: specs.config, tooltip: {disableDefaultStyle: true, formatTooltip}};
Promise.all(specs.charts.map((spec, i) => vegaEmbed("#chart-" + i, spec, options)))
  .then(() => document.body.dataset.drawn = specs.charts.length);
"""

_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c1e21; --soft: #5d6269; --line: #d9dce0;
        --mark: #fff1b8 }
@media (prefers-color-scheme: dark) {
  :root { --bg: #15171a; --fg: #e4e6e9; --soft: #a0a6ad; --line: #363a40; --mark: #544600 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--bg); color: var(--fg);
       font: 15px/1.45 system-ui, sans-serif }
h1 { font-size: 1.35rem; margin: 0 } h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem }
h3 { font-size: .85rem; font-weight: 600; margin: 0 0 .2rem }
p { margin: .3rem 0; overflow-wrap: anywhere } .soft { color: var(--soft) }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem 1.5rem }
.runs { position: sticky; top: 0; z-index: 1; padding: .3rem 0; background: var(--bg);
        overflow-wrap: anywhere } .runs > * { margin-right: 1.2em }
.chart { width: 100% } figure { margin: 0; min-width: 0 }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .4em }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
         vertical-align: top; white-space: nowrap }
td.t { white-space: normal; min-width: 16rem; max-width: 34rem; overflow-wrap: anywhere }
th { color: var(--soft); font-weight: 500 }
td.n { text-align: right; font-variant-numeric: tabular-nums }
tr.differs td { background: var(--mark) } summary { cursor: pointer; margin: .4rem 0 }
#vg-tooltip-element { position: fixed; visibility: hidden; z-index: 9; padding: .4rem .6rem;
  background: var(--bg); border: 1px solid var(--line); border-radius: 4px; font-size: .8rem;
  pointer-events: none; max-width: 20rem; overflow-wrap: anywhere }
#vg-tooltip-element.visible { visibility: visible }
#vg-tooltip-element td { border: 0; padding: 0 .5rem 0 0; white-space: normal }
#vg-tooltip-element td.key { all: unset; display: table-cell; color: var(--soft);
  padding-right: .5rem }
@media (max-width: 700px) { .charts { grid-template-columns: minmax(0, 1fr) }
  body { padding: .75rem } }
"""


def make_report(histories: Sequence[History]) -> str:
    """The page.

    Raises:
      ValueError: there is no run, or there are more than can be told apart.
      ImportError: the extra `report` is missing.
    """
    if not 1 <= len(histories) <= len(COLOURS):
        raise ValueError(f"RUN: found {len(histories)} runs, expected 1 to {len(COLOURS)}")
    script = _script()
    runs = [history.run for history in histories]
    charts, specs = _charts(histories, runs)
    shown = [name.encode(errors="replace").decode()[:_MAX_CHARS] for name in runs]
    values = {"charts": specs, "config": THEME, "runs": shown}
    data = json.dumps(values, allow_nan=False, separators=(",", ":"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    now = datetime.datetime.now(datetime.UTC)
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(', '.join(runs))}</title><style>{_STYLE}</style></head><body>",
            f"<h1>jaxlm report</h1><p class=soft>as on disk at {now:%Y-%m-%d %H:%M} UTC</p>",
            _overview(histories),
            charts,
            _events(histories),
            _time(histories),
            _checkpoints(histories),
            _settings("Config", [history.config for history in histories], runs),
            _settings("Environment", [history.environment for history in histories], runs),
            f'<script type="application/json" id="specs">{data.replace("<", chr(92) + "u003c")}',
            f"</script><script>{script}</script></body></html>\n",
        ]
    )


@functools.cache
def _script() -> str:
    # Vega-Lite, Vega and ours; to pack them takes a second or two.
    bundle = needs("vl_convert", "jaxlm report").javascript_bundle(_DRAW)
    return bundle.replace("</script", "<\\/script")


def _text(value: object) -> str:
    text = str(value).encode(errors="replace").decode()
    return html.escape(text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 1]}…")


class _Html(str):
    """Text that is HTML already."""


def _table(
    head: Iterable[str], rows: Iterable[Sequence[object]], marked: Iterable[int] = ()
) -> str:
    def cell(value: object) -> str:
        if isinstance(value, _Html):
            return f"<td>{value}</td>"
        kind = " class=n" if type(value) is int else " class=t" if len(str(value)) > 40 else ""
        return f"<td{kind}>{_text(value)}</td>"

    lines, marked = ["".join(f"<th>{_text(name)}</th>" for name in head)], set(marked)
    lines = [f"<tr>{lines[0]}</tr>"]
    for number, row in enumerate(rows):
        start = "<tr class=differs>" if number in marked else "<tr>"
        lines.append(f"{start}{''.join(map(cell, row))}</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _name(run: int, name: str) -> _Html:
    return _Html(f'<span class=key style="background:{COLOURS[run]}"></span>{_text(name)}')


def _last(history: History, metric: str) -> float | None:
    return next((row[metric] for row in reversed(history.rows) if metric in row), None)


def _number(value: float | None, digits: int = 4) -> object:
    return "-" if value is None else _Html(f"{value:.{digits}f}")


def _overview(histories: Sequence[History]) -> str:
    rows, missing = [], []
    for run, history in enumerate(histories):
        losses = {r["step"]: r["eval/loss"] for r in history.rows if "eval/loss" in r}
        best = min(
            losses, key=lambda step, of=losses: (of[step] != of[step], of[step]), default=None
        )
        seen, all_s = _last(history, "train/tokens_seen"), _seconds(history)
        rows.append(
            [
                _name(run, history.run),
                f"{_last(history, 'step') or 0:.0f} of {history.config.get('num_steps', '?')}",
                "-" if seen is None else format_count(seen),
                _number(_last(history, "train/loss")),
                "-" if best is None else f"{losses[best]:.4f} (step {best:.0f})",
                format_duration(sum(all_s.values())) if history.processes else "-",
                f"{100 * goodput(all_s):.1f}%" if history.processes else "-",
                format_bytes(history.num_bytes),
            ]
        )
        missing += [
            f"<p>⚠ {_name(run, history.run)}: {_text(what)}</p>" for what in history.missing
        ]
    head = ["run", "step", "tokens", "train/loss", "lowest eval/loss", "time", "goodput", "disk"]
    return _table(head, rows) + "".join(missing)


def _seconds(history: History) -> dict[str, float]:
    return {kind: sum(p.seconds[kind] for p in history.processes) for kind in KINDS}


def _points(history: History, metric: str) -> list[tuple[int, float]]:
    if metric == "goodput":
        found = [(row["step"], times(row)) for row in history.rows]
        return [(int(step), 100 * goodput(s)) for step, s in found if s]
    return [(int(row["step"]), row[metric]) for row in history.rows if metric in row]


def _charts(histories: Sequence[History], runs: list[str]) -> tuple[str, list[dict[str, Any]]]:
    all_steps = [int(row["step"]) for history in histories for row in history.rows]
    all_steps += [event.step for history in histories for event in history.events]
    steps = min([0, *all_steps]), max([1, *all_steps])
    figures, specs = [], []

    def add(title: str, spec: dict[str, Any]) -> str:
        specs.append(spec)
        figure = f'<figure><h3>{_text(title)}</h3><div class=chart id="chart-{len(specs) - 1}">'
        return figure + "</div></figure>"

    for metric, how in CHARTS.items():
        curves = [Curve(run, _points(history, metric)) for run, history in enumerate(histories)]
        if any(points for _, points in curves):
            spec = draw_curves(curves, runs, steps, num_charts=len(CHARTS), **how)
            figures.append(add("goodput since the start" if metric == "goodput" else metric, spec))
    events = [
        (run, event.step, event.kind, event.why)
        for run, history in enumerate(histories)
        for event in history.events[-3 * _MAX_ROWS :]
    ]
    if events:
        figures.append(add("events", draw_timeline(events, runs, steps, EVENTS)))
    if not figures:
        return "", []
    legend = " ".join(f"<span>{_name(run, name)}</span>" for run, name in enumerate(runs))
    legend = f"<div class=runs>{legend}</div>" if len(runs) > 1 else ""
    curves = f"{legend}<div class=charts>{''.join(figures)}</div>"
    return f"<h2>Curves</h2><section>{curves}</section>", specs


def _events(histories: Sequence[History]) -> str:
    rows = [
        [_name(run, history.run), event.step, event.kind, event.why]
        for run, history in enumerate(histories)
        for event in [e for e in history.events if e.kind != "save"][-_MAX_ROWS:]
    ]
    note = "<p class=soft>As far as disk tells: checkpoints that retention deleted leave no trace, "
    note += "nor do starts none of whose rows were kept.</p>"
    return f"<h2>Events</h2>{_table(['run', 'step', 'event', 'why'], rows)}{note}" if rows else ""


def _time(histories: Sequence[History]) -> str:
    rows = [
        [_name(run, history.run), f"{process.first_step} to {process.last_step}"]
        + [_Html(format_duration(sum(process.seconds.values())))]
        + [_Html(f"{100 * process.goodput:.1f}%")]
        + [_number(process.seconds[kind], 1) for kind in KINDS]
        for run, history in enumerate(histories)
        for process in history.processes[-_MAX_ROWS:]
    ]
    head = ["run", "steps", "time", "goodput", *(f"{kind} (s)" for kind in KINDS)]
    return f"<h2>Time of each start</h2>{_table(head, rows)}" if rows else ""


def _checkpoints(histories: Sequence[History]) -> str:
    rows = [
        [_name(run, history.run), row["step"], format_count(row["tokens_seen"])]
        + [
            _number(None if row[n] is None else float(row[n]))
            for n in ("eval_loss", "best_eval_loss")
        ]
        + [format_bytes(row["bytes"]), ", ".join(row["is"])]
        for run, history in enumerate(histories)
        for row in history.checkpoints[-_MAX_ROWS:]
    ]
    head = ["run", "step", "tokens", "eval loss", "best eval loss", "size", ""]
    return f"<h2>Checkpoints on disk</h2>{_table(head, rows)}" if rows else ""


def _settings(title: str, values: Sequence[dict[str, Any]], runs: list[str]) -> str:
    names = list(dict.fromkeys(name for value in values for name in value))
    spelt = {
        name: [json.dumps(value[name]) if name in value else "-" for value in values]
        for name in names
    }
    differing = [name for name in names if len(set(spelt[name])) > 1]
    names = [*differing, *(name for name in names if name not in differing)][:_MAX_ROWS]
    if not names:
        return ""
    head = ["", *(_name(run, name) for run, name in enumerate(runs))]
    cells = "".join(f"<th>{name}</th>" for name in head)
    table = _table([], [[name, *spelt[name]] for name in names], range(len(differing)))
    table = table.replace("<tr></tr>", f"<tr>{cells}</tr>", 1)
    said = f", {len(differing)} of {len(names)} differ" if len(runs) > 1 else ""
    return (
        f"<h2>{title}</h2><details><summary>{len(names)} settings{said}</summary>{table}</details>"
    )
