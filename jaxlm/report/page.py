"""The report of one run or several: one self-contained HTML page.

Data from disk is escaped. A Content-Security-Policy allows only the inlined script, by hash, and no
external resources.
"""

import base64
import datetime
import functools
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

from jaxlm.errors import InputError
from jaxlm.extras import MODULES, needs
from jaxlm.report.charts import COLOURS, THEME, Curve, draw_curves, draw_timeline
from jaxlm.report.curves import find_curves, followed_sources
from jaxlm.report.history import History, goodput, read_history
from jaxlm.report.markup import MAX_CHARS, STYLE, Html, as_table, as_text
from jaxlm.tracking.clock import KINDS
from jaxlm.tracking.console import format_bytes, format_count, format_duration
from jaxlm.tracking.events import CHECKPOINT_KINDS, RUN_KINDS, Event
from jaxlm.training.at_end import Complete

_MAX_ROWS = 100
"""Maximum number of rows of a table for each run."""
_MAX_SAMPLES, _MAX_SAMPLE_CHARS = 3, 4000
_ON_TIMELINE = (*RUN_KINDS, *CHECKPOINT_KINDS)

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


def make_report(histories: Sequence[History]) -> str:
    """The report as one HTML page.

    Raises:
      ValueError: there is no run, or more runs than colours.
      ImportError: the extra `report` is missing.
    """
    if not 1 <= len(histories) <= len(COLOURS):
        raise InputError(f"RUN: found {len(histories)} runs, expected 1 to {len(COLOURS)}")
    script = _script()
    runs = [history.run for history in histories]
    charts, specs = _charts(histories, runs)
    shown = [name.encode(errors="replace").decode()[:MAX_CHARS] for name in runs]
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
            f"<title>{as_text(', '.join(runs))}</title><style>{STYLE}</style></head><body>",
            f"<h1>jaxlm report</h1><p class=soft>as on disk at {now:%Y-%m-%d %H:%M} UTC</p>",
            _overview(histories),
            charts,
            _samples(histories),
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
    # Vega, Vega-Lite and `_DRAW`, bundled once: bundling takes a second or two.
    bundle = needs("vl_convert", "jaxlm report").javascript_bundle(_DRAW)
    return bundle.replace("</script", "<\\/script")


def _name(run: int, name: str) -> Html:
    return Html(f'<span class=key style="background:{COLOURS[run]}"></span>{as_text(name)}')


def _last(history: History, metric: str) -> float | None:
    return next((row[metric] for row in reversed(history.rows) if metric in row), None)


def _number(value: float | None, digits: int = 4) -> object:
    return "-" if value is None else Html(f"{value:.{digits}f}")


def _overview(histories: Sequence[History]) -> str:
    rows, missing = [], []
    for run, history in enumerate(histories):
        losses = {r["step"]: r["eval/loss"] for r in history.rows if "eval/loss" in r}
        best = min(
            losses, key=lambda step, of=losses: (of[step] != of[step], of[step]), default=None
        )
        seen = _last(history, "train/tokens_seen")
        all_s = {kind: sum(p.seconds[kind] for p in history.processes) for kind in KINDS}
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
            f"<p>⚠ {_name(run, history.run)}: {as_text(text)}</p>" for text in history.missing
        ]
    head = ["run", "step", "tokens", "train/loss", "lowest eval/loss", "time", "goodput", "disk"]
    return as_table(head, rows) + "".join(missing)


def _of_kinds(history: History, kinds: Sequence[str]) -> list[Event]:
    return [event for event in history.events if event["event"] in kinds]


def _why(event: Event) -> str:
    name, why = event.get("checkpoint"), event["why"]
    if event["event"] == "start":
        why += f" (process {event.get('pid', '?')} on {event.get('host', '?')})"
    return why if name in (None, str(event["step"])) else f"{name}: {why}"


def _charts(histories: Sequence[History], runs: list[str]) -> tuple[str, list[dict[str, Any]]]:
    all_steps = [int(row["step"]) for history in histories for row in history.rows]
    all_steps += [event["step"] for h in histories for event in (*h.events, *h.evals)]
    steps = min([0, *all_steps]), max([1, *all_steps])
    curves = find_curves(histories)
    figures, specs = [], []

    def add(title: str, spec: dict[str, Any]) -> str:
        specs.append(spec)
        figure = f'<figure><h3>{as_text(title)}</h3><div class=chart id="chart-{len(specs) - 1}">'
        return figure + "</div></figure>"

    for title, points, options in curves:
        of_runs = [Curve(run, found) for run, found in enumerate(points)]
        spec = draw_curves(of_runs, runs, steps, num_charts=len(curves), **options)
        figures.append(add(title, spec))
    events = [
        (run, event["step"], kind, _why(event))
        for run, history in enumerate(histories)
        for kind in _ON_TIMELINE
        for event in _of_kinds(history, [kind])[-_MAX_ROWS // len(runs) :]
    ]
    if events:
        figures.append(add("events", draw_timeline(events, runs, steps, _ON_TIMELINE)))
    if not figures:
        return "", []
    legend = " ".join(f"<span>{_name(run, name)}</span>" for run, name in enumerate(runs))
    legend = f"<div class=runs>{legend}</div>" if len(runs) > 1 else ""
    drawn = f"{legend}<div class=charts>{''.join(figures)}</div>"
    return f"<h2>Curves</h2><section>{drawn}</section>", specs


def _events(histories: Sequence[History]) -> str:
    def found(kinds: Sequence[str]) -> list[list[object]]:
        return [
            [_name(run, history.run), event["step"], event["event"], _why(event), event["time"]]
            for run, history in enumerate(histories)
            for event in _of_kinds(history, kinds)[-2 * _MAX_ROWS // len(histories) :]
        ]

    head = ["run", "step", "event", "why", "time"]
    of_runs, of_checkpoints = found(RUN_KINDS), found(CHECKPOINT_KINDS)
    table = as_table(head, of_runs) if of_runs else ""
    if of_checkpoints:
        summary = f"<summary>the latest {len(of_checkpoints)} events of checkpoints</summary>"
        table += f"<details>{summary}{as_table(head, of_checkpoints)}</details>"
    return f"<h2>Events</h2>{table}" if table else ""


def _samples(histories: Sequence[History]) -> str:
    found = [
        f"<p>{_name(run, history.run)}, step {event['step']}</p><pre><strong>"
        + f"{as_text(event.get('prompt', ''), _MAX_SAMPLE_CHARS)}</strong>"
        + f"{as_text(event.get('text', ''), _MAX_SAMPLE_CHARS)}</pre>"
        for run, history in enumerate(histories)
        for event in _of_kinds(history, ["sample"])[-_MAX_SAMPLES:]
    ]
    return f"<h2>Samples</h2>{''.join(found)}" if found else ""


def _time(histories: Sequence[History]) -> str:
    rows = [
        [_name(run, history.run), f"{process.first_step} to {process.last_step}"]
        + [Html(format_duration(sum(process.seconds.values())))]
        + [Html(f"{100 * goodput(process.seconds):.1f}%")]
        + [_number(process.seconds[kind], 1) for kind in KINDS]
        for run, history in enumerate(histories)
        for process in history.processes[-_MAX_ROWS:]
    ]
    head = ["run", "steps", "time", "goodput", *(f"{kind} (s)" for kind in KINDS)]
    return f"<h2>Time of each start</h2>{as_table(head, rows)}" if rows else ""


def _checkpoints(histories: Sequence[History]) -> str:
    sources = followed_sources(histories)
    rows = [
        [_name(run, history.run), row["step"], format_count(row["tokens_seen"])]
        + [
            _number(None if row[n] is None else float(row[n]))
            for n in ("eval_loss", "best_eval_loss")
        ]
        + [_number(row["followed"].get(source)) for source in sources]
        + [format_bytes(row["bytes"]), ", ".join(row["is"])]
        for run, history in enumerate(histories)
        for row in history.checkpoints[-_MAX_ROWS:]
    ]
    head = ["run", "step", "tokens", "eval loss", "best eval loss", *sources, "size", ""]
    return f"<h2>Checkpoints on disk</h2>{as_table(head, rows)}" if rows else ""


def _settings(title: str, values: Sequence[dict[str, Any]], runs: list[str]) -> str:
    names = list(dict.fromkeys(name for value in values for name in value))
    values_of = {
        name: [json.dumps(value[name]) if name in value else "-" for value in values]
        for name in names
    }
    differing = [name for name in names if len(set(values_of[name])) > 1]
    names = [*differing, *(name for name in names if name not in differing)][:_MAX_ROWS]
    if not names:
        return ""
    head = ["", *(_name(run, name) for run, name in enumerate(runs))]
    table = as_table(head, [[name, *values_of[name]] for name in names], len(differing))
    note = f", {len(differing)} of {len(names)} differ" if len(runs) > 1 else ""
    return (
        f"<h2>{title}</h2><details><summary>{len(names)} settings{note}</summary>{table}</details>"
    )


def report_at_end(run: Complete) -> None:
    """Sends the report of a complete run to W&B, if the extra `report` is installed."""
    config = run.config
    if config.tracking.wandb != "off" and importlib.util.find_spec(MODULES["report"]):
        run.show("report", lambda: make_report([read_history(config.run_dir)]), is_html=True)
