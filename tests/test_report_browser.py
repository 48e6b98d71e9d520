"""The report in a real browser: it draws, follows the reader's device, and asks for nothing.

Needs the packages `playwright` and `vl-convert-python` and a Chromium (`CHROMIUM`, or on the PATH).
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_report import EVIL, timed, write_events, write_rows

from jaxlm.report.history import read_history
from jaxlm.report.page import make_report
from jaxlm.tracking.events import KINDS

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium on the PATH"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:playwright"),
]
pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Seen(NamedTuple):
    """What a reader's browser has of a page."""

    lines: list[str]
    """The paths of all that was drawn as a line."""
    said: list[str]
    """On the console, and asked of the network."""
    fits: bool
    """Nothing to scroll sideways."""
    background: str
    label: str
    """The colour of an axis label."""
    title: str
    tooltip: str
    """Of the point that the mouse is nearest to."""


def look(browser: Any, page: str, tmp_path: Path, width: int = 1200, scheme: str = "light") -> Seen:
    path, said = tmp_path / "report.html", []
    path.write_text(page)
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda asked: said.append(asked.url) if "report.html" not in asked.url else 0)
    tab.goto(path.as_uri())
    tab.wait_for_selector("body[data-drawn]", timeout=60_000)
    seen = Seen(
        tab.eval_on_selector_all(".mark-line path", "all => all.map(x => x.getAttribute('d'))"),
        said,
        tab.evaluate("document.documentElement.scrollWidth <= innerWidth"),
        tab.evaluate("getComputedStyle(document.body).backgroundColor"),
        tab.evaluate("getComputedStyle(document.querySelector('.role-axis-label text')).fill"),
        tab.title(),
        tooltip_of(tab),
    )
    context.close()
    return seen


def tooltip_of(tab: Any) -> str:
    box = tab.locator("#chart-0").bounding_box()
    for at in (0.5, 0.6):
        tab.mouse.move(box["x"] + at * box["width"], box["y"] + box["height"] / 2)
    return tab.locator("#vg-tooltip-element.visible").inner_text()


def a_run(folder: Path, last_loss: float = 2.0) -> str:
    rows = []
    for step in range(1, 41):
        loss = 5.0 - step / 20 if step < 40 else last_loss
        rows.append(timed(step, start=1.0, steps=float(step)) | {"train/loss": loss})
    rows.append({"step": 40, "eval/loss": 3.0, "eval/best_loss": 3.0})
    write_rows(folder, rows)
    return make_report([read_history(str(folder))])


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_draws_and_fits(browser, tmp_path: Path, width: int, scheme: str):
    seen = look(browser, a_run(tmp_path / "run"), tmp_path, width, scheme)
    assert seen.said == [] and seen.fits
    assert len(seen.lines) >= 4
    assert str(tmp_path)[:20] in seen.tooltip and "nats per token" in seen.tooltip
    assert max(line.count("L") for line in seen.lines) == 39
    dark = scheme == "dark"
    assert (brightness(seen.background) < 128) == dark
    assert (brightness(seen.label) > 128) == dark


def brightness(colour: str) -> float:
    return sum(map(int, colour.partition("(")[2].strip(")").split(",")[:3])) / 3


def test_the_lines_follow_the_data(browser, tmp_path: Path):
    one, same = (look(browser, a_run(tmp_path / n), tmp_path).lines for n in ("one", "same"))
    other = look(browser, a_run(tmp_path / "other", last_loss=9.0), tmp_path).lines
    assert one == same and one[0] != other[0]


def test_no_script_but_ours_runs(browser, tmp_path: Path):
    page = a_run(tmp_path / "run")
    broken = page.replace("<h1>", "<script>document.title = 'owned'</script><h1>")
    seen = look(browser, broken, tmp_path)
    assert seen.title != "owned" and len(seen.said) == 1 and "script-src" in seen.said[0]
    without_policy = broken.replace("http-equiv", "name")
    assert look(browser, without_policy, tmp_path).title == "owned"


def test_hostile_text_is_text(browser, tmp_path: Path):
    run = tmp_path / "<b>run"
    run.mkdir()
    write_events(run, *({"event": kind, "step": 7, "why": EVIL, "text": EVIL} for kind in KINDS))
    seen = look(browser, a_run(run), tmp_path)
    assert "<b>run" in seen.tooltip
    assert seen.title == str(run)[:159] + "…" * (len(str(run)) > 160) and seen.said == []
