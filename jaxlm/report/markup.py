"""Text and tables as HTML, and the style sheet of the report."""

import html
from collections.abc import Iterable, Sequence

MAX_CHARS = 160
"""Maximum length of a text in a table."""
STYLE = """
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
pre { margin: 0 0 .6rem; padding: .5rem .7rem; border-left: 3px solid var(--line); font: inherit;
  white-space: pre-wrap; overflow-wrap: anywhere }
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


def as_text(value: object, max_chars: int = MAX_CHARS) -> str:
    """Any value as escaped HTML text, cut to `max_chars`."""
    text = str(value).encode(errors="replace").decode()
    return html.escape(text if len(text) <= max_chars else f"{text[: max_chars - 1]}…")


class Html(str):
    """Text that is HTML already."""


def as_table(head: Iterable[str], rows: Iterable[Sequence[object]], num_marked: int = 0) -> str:
    """An HTML table.

    Args:
      head: names of the columns, escaped unless they are `Html`.
      rows: cells, escaped unless they are `Html`.
      num_marked: number of first rows to highlight.
    """

    def cell(value: object) -> str:
        if isinstance(value, Html):
            return f"<td>{value}</td>"
        kind = " class=n" if type(value) is int else " class=t" if len(str(value)) > 40 else ""
        return f"<td{kind}>{as_text(value)}</td>"

    titles = (name if isinstance(name, Html) else as_text(name) for name in head)
    lines = [f"<tr>{''.join(f'<th>{title}</th>' for title in titles)}</tr>"]
    for number, row in enumerate(rows):
        start = "<tr class=differs>" if number < num_marked else "<tr>"
        lines.append(f"{start}{''.join(map(cell, row))}</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"
