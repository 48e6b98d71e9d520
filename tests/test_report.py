"""`jaxlm report`: what it reads, what it draws, and that nothing in it comes alive."""

import json
import math
import re
from pathlib import Path

import pytest
import text_run

from jaxlm import __main__ as cli
from jaxlm.checkpoints import folder
from jaxlm.evaluation.evals import checkpoint_id
from jaxlm.launch import run_main
from jaxlm.report.charts import COLOURS, Curve, draw_curves, smooth, thin
from jaxlm.report.curves import find_curves
from jaxlm.report.history import goodput, read_history, split_by_start
from jaxlm.report.page import make_report
from jaxlm.tracking import clock
from jaxlm.tracking.events import KINDS

pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
EVIL = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>'


def specs(page: str) -> list[dict]:
    found = re.search(r'id="specs">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])["charts"]


def visible(page: str) -> str:
    """The page without its scripts."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.S)


def write_rows(run: Path, rows: list[dict]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def timed(step: int, **seconds: float) -> dict:
    return {"step": step} | {f"time/{kind}": seconds.get(kind, 0.0) for kind in clock.KINDS}


def test_the_page_of_a_run(shared_home: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(shared_home)
    out = tmp_path / "report.html"
    assert cli.command(["report", text_run.RUN, "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"out": str(out), "bytes": out.stat().st_size, "missing": {text_run.RUN: []}}
    page = out.read_text()
    assert len(page) < 2_000_000 and "http-equiv" in page
    found = specs(page)
    assert len(found) == 7 and "eval/loss" in visible(page)
    drawn = {row["x"]: row["y"] for row in found[1]["data"]["values"]}
    losses = text_run.eval_losses(Path(text_run.RUN))
    assert drawn == pytest.approx(losses, rel=1e-5) and len(drawn) == 3
    assert "best" in visible(page) and "optim.learning_rate" in visible(page)


def test_what_happened_to_a_run(shared_home: Path):
    history = read_history(str(shared_home / text_run.RUN))
    kinds = [(event["step"], event["event"]) for event in history.events]
    saved = [(4, "save"), (4, "best"), (8, "save"), (8, "best")]
    assert kinds[:6] == [(0, "start"), *saved, (8, "end")]
    assert kinds[6:] == [(8, "start"), (12, "save"), (12, "end")]
    assert len(history.processes) == 2 and history.missing == []
    page = visible(make_report([history]))
    assert "resumed; optim.learning_rate: was 0.01, is 3.0" in page
    assert "the latest 5 events of checkpoints" in page


def test_a_step_is_read_once(shared_home: Path, monkeypatch: pytest.MonkeyPatch):
    asked, real = [], folder.read_metadata
    monkeypatch.setattr(folder, "read_metadata", lambda *a: asked.append(a[1]) or real(*a))
    read_history(str(shared_home / text_run.RUN))
    assert asked == [4, 8, 12]


def write_events(run: Path, *events: dict) -> None:
    lines = [{"time": "2026-01-31T23:59:59Z", "why": ""} | event for event in events]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_deletions_going_back_and_samples_are_shown(tmp_path: Path):
    write_rows(tmp_path, [{"step": 9, "train/loss": 2.0}])
    write_events(
        tmp_path,
        {"event": "save", "step": 4, "checkpoint": "4", "why": "interval"},
        {"event": "deletion", "step": 4, "checkpoint": "4", "why": "by some rule"},
        {"event": "set aside", "step": 8, "checkpoint": "8.corrupt", "why": "one bit"},
        {"event": "back", "step": 6, "why": "from step 9"},
        {"event": "sample", "step": 8, "prompt": "To be", "text": ", or not"},
        {"event": "of the future", "step": 8},
    )
    page = make_report([read_history(str(tmp_path))])
    timeline = {(row["x"], row["k"], row["w"]) for row in specs(page)[-1]["data"]["values"]}
    assert timeline == {
        (4, "save", "interval"),
        (4, "deletion", "by some rule"),
        (8, "set aside", "8.corrupt: one bit"),
        (6, "back", "from step 9"),
    }
    assert (
        "<pre><strong>To be</strong>, or not</pre>" in page
        and "2026-01-31T23:59:59Z" in visible(page)
    )


def test_what_eval_follow_found_is_drawn_and_in_the_table(own_home: Path):
    run = own_home / text_run.RUN
    steps = folder.scan_folder(run / "checkpoints").sound
    rows = [
        {"step": step, "checkpoint": checkpoint_id(found), "source": "text:<b>", "loss": step / 4}
        | {"perplexity": 1.0, "num_tokens": 9}
        for step, found in steps.items()
    ]
    again = rows[1] | {"checkpoint": "gone", "loss": 7.5}  # a run that went back
    (run / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [again, *rows]))
    page = make_report([read_history(str(run))])
    assert "eval --follow: text:&lt;b&gt;" in page and "<th>text:&lt;b&gt;</th>" in page
    drawn = {row["x"]: row["y"] for row in specs(page)[-2]["data"]["values"]}
    assert drawn == {4: 1.0, 8: 2.0, 12: 3.0} and "<td>3.0000</td>" in page
    (run / "evals.jsonl").write_text("[]\n")
    history = read_history(str(run))
    assert "no losses of `jaxlm eval --follow` from evals.jsonl" in history.missing[0]
    assert len(history.checkpoints) == 3


def test_a_new_start_is_told_from_the_clock():
    one = [timed(2, start=1.5, steps=1), timed(4, start=1.5, steps=3)]
    assert len(split_by_start([*one, timed(6, start=1.5, steps=4)])) == 1
    again = split_by_start([*one, timed(6, start=0.5, steps=8)])
    assert [(p.first_step, p.last_step) for p in again] == [(2, 4), (6, 6)]
    assert len(split_by_start([*one, timed(6, start=1.5, steps=2)])) == 2
    assert goodput(again[0].seconds) == pytest.approx(2 / 3)
    assert split_by_start([{"step": 1, "eval/loss": 2.0}]) == []


def test_a_spike_outlives_the_thinning():
    values = [float(n % 7) for n in range(10_000)]
    values[4321], values[77] = 1e6, math.nan
    kept = thin(values, 50)
    assert {0, 77, 4321, 9999} <= set(kept) and len(kept) <= 3 * 50 + 2
    assert thin([1.0, 2.0], 50) == [0, 1]
    assert 4321 not in range(0, 10_000, 100)  # a plain stride would have lost it


def test_smoothing_keeps_a_constant_and_passes_over_nan():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert smooth([1.0, math.nan, 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    assert smooth([0.0, 1.0])[1] < 1.0


def test_a_logarithmic_axis_only_where_it_helps():
    def scale(*values: float) -> dict:
        curve = Curve(0, list(enumerate(values)))
        spec = draw_curves([curve], ["a"], (0, 9), unit="norm", log=True)
        return spec["layer"][0]["encoding"]["y"]["scale"]

    assert scale(1, 1, 1, 100) == {"type": "log"}
    assert scale(1, 2, 3) == scale(1, 1, 1, -100) == {"zero": False}


def test_what_is_missing_is_said(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    write_rows(tmp_path / "torn", [{"step": 1, "train/loss": 2.0}])
    with (tmp_path / "torn" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tr')
    write_rows(tmp_path / "bad", [{"step": "one"}, {"step": 2}])
    empty, torn, bad = (read_history(str(tmp_path / name)) for name in ("empty", "torn", "bad"))
    assert len(empty.missing) == 4 and "metrics.jsonl is not there" in empty.missing[0]
    assert len(torn.rows) == 1 and not any("curves" in line for line in torn.missing)
    assert "line 1" in bad.missing[0] and bad.rows == []
    write_events(tmp_path / "bad", {"event": "end", "step": 1}, {"event": 1, "step": 1})
    half = read_history(str(tmp_path / "bad"))
    assert len(half.events) == 1 and any("jsonl, line 2 is no event" in x for x in half.missing)
    page = visible(make_report([empty, torn, bad]))
    assert page.count("⚠") == 11 and "line 1" in page


def test_a_damaged_run_still_has_its_page(own_home: Path):
    text_run.damage(own_home / text_run.RUN / "checkpoints" / "8")
    (own_home / text_run.RUN / "checkpoints" / "12" / "meta" / "metadata").write_text("{")
    (own_home / text_run.RUN / "config.json").write_text("[]")
    history = read_history(str(own_home / text_run.RUN))
    assert any(line.startswith("checkpoint 12 is damaged: ") for line in history.missing)
    assert any(line.startswith("no config from config.json: ") for line in history.missing)
    assert "damaged" in visible(make_report([history]))


def test_nothing_from_disk_comes_alive(tmp_path: Path):
    run = tmp_path / "<b>run"
    write_rows(run, [{"step": 1, "train/loss": 2.0}])
    (run / "config.json").write_text(json.dumps({"checkpoint": {"directory": None}, EVIL: EVIL}))
    evil: dict = {name: EVIL for name in ("why", "checkpoint", "host", "prompt", "text", "time")}
    write_events(run, *(evil | {"event": kind, "step": 2**62} for kind in (*KINDS, EVIL)))
    page = make_report([read_history(str(run))])
    assert page.count("<script") == 2 + page.count('"<script')
    assert "<b>" not in visible(page) and "<img" not in visible(page)
    assert "&lt;img" in visible(page) and "set aside" in visible(page)
    assert visible(page).count("&lt;img") > 2 * len(KINDS)
    assert "<" not in re.findall(r'id="specs">(.*?)</script>', page, re.S)[0]


@pytest.mark.slow
def test_a_page_stays_small(tmp_path: Path):
    names = [f"run{n}" for n in range(len(COLOURS))]
    for name in names:
        rows = [
            timed(step, steps=float(step)) | {"train/loss": 1 / 3 + math.sin(step * 1.7)}
            for step in range(1, 5_001)
        ]
        for row in rows[:: 1 if name == "run0" else 5]:
            row |= {"train/grad_norm": row["train/loss"], "train/tokens_per_s": row["step"] / 7}
            row |= {"eval/loss": row["train/loss"], "eval/best_loss": row["train/loss"]}
        write_rows(tmp_path / name, rows[:: 1 if name == "run0" else 5])
        events = [{"event": kind, "step": 1, "why": "w" * 500} for kind in KINDS]
        write_events(tmp_path / name, *events * 100)
    page = make_report([read_history(str(tmp_path / name)) for name in names])
    assert len(page.encode()) < 2_000_000
    assert len({row["r"] for row in specs(page)[0]["data"]["values"]}) == len(COLOURS)


def test_named_sets_and_tasks_have_charts_after_the_loss(tmp_path: Path):
    names = ("loss", "perplexity", "bits_per_byte", "web/loss", "web/perplexity", "web/accuracy")
    row = {"step": 4} | {f"eval/{name}": 1.5 for name in (*names, "words/acc")}
    write_rows(tmp_path / "run", [row])
    titles = [title for title, _, _ in find_curves([read_history(str(tmp_path / "run"))])]
    assert titles == ["eval/loss", "eval/web/loss", "eval/web/accuracy", "eval/words/acc"]


def test_settings_that_differ_are_marked(tmp_path: Path):
    for name, rate in (("a", 1), ("b", 2)):
        write_rows(tmp_path / name, [{"step": 1, "train/loss": 2.0}])
        config = {"checkpoint": {"directory": None}, "rate": rate, "same": 3}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    a, b = (read_history(str(tmp_path / name)) for name in "ab")
    assert re.findall(r"<tr class=differs><td>(\w+)", make_report([a, b])) == ["rate"]
    assert "<tr class=differs>" not in make_report([a, a])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere: found no folder"),
        ([], "RUN: found none"),
        ([".", "."], ".: found no run, metrics.jsonl is not there"),
        ([".", "--out", "."], "--out: found"),
        ([".", "--out", "nowhere/x.html"], "--out: found no folder nowhere"),
        ([".", "--out", "metrics.jsonl"], "expected a name that ends in .html"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main(lambda: cli.command(["report", *args])) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
