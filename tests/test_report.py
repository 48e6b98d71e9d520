"""`jaxlm report`: what it reads, what it draws, and that nothing in it comes alive."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import runs

from jaxlm import __main__ as cli
from jaxlm.launch import run_main
from jaxlm.report.charts import COLOURS, Curve, draw_curves, smooth, thin
from jaxlm.report.history import read_history, split_by_start
from jaxlm.report.page import make_report
from jaxlm.tracking.clock import KINDS

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
    return {"step": step} | {f"time/{kind}": seconds.get(kind, 0.0) for kind in KINDS}


def test_the_page_of_a_run(tiny_run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tiny_run)
    out = tmp_path / "report.html"
    assert cli.command(["report", runs.RUN, "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"out": str(out), "bytes": out.stat().st_size, "missing": {runs.RUN: []}}
    page = out.read_text()
    assert len(page) < 2_000_000 and "http-equiv" in page
    found = specs(page)
    assert len(found) == 7 and "eval/loss" in visible(page)
    drawn = {row["x"]: row["y"] for row in found[1]["data"]["values"]}
    losses = runs.eval_losses(Path(runs.RUN))
    assert drawn == pytest.approx(losses, rel=1e-5) and len(drawn) == 3
    assert "best" in visible(page) and "optim.learning_rate" in visible(page)


def test_what_happened_to_a_run(own_run: Path):
    folder = own_run / runs.RUN / "checkpoints"
    shutil.copytree(folder / "4", folder / "2.corrupt")
    (folder / "2.corrupt" / "manifest.json").unlink(missing_ok=True)
    history = read_history(str(own_run / runs.RUN))
    kinds = {(event.step, event.kind) for event in history.events}
    assert {(8, "best"), (8, "save"), (12, "save"), (2, "set aside"), (8, "change")} <= kinds
    assert [step for step, kind in kinds if kind == "start"] and (12, "best") not in kinds
    assert len(history.processes) == 2 and history.missing == []
    (change,) = [event for event in history.events if event.kind == "change"]
    assert "learning_rate" in change.why


def test_a_new_start_is_told_from_the_clock():
    one = [timed(2, start=1.5, steps=1), timed(4, start=1.5, steps=3)]
    assert len(split_by_start([*one, timed(6, start=1.5, steps=4)])) == 1
    again = split_by_start([*one, timed(6, start=0.5, steps=8)])
    assert [(p.first_step, p.last_step) for p in again] == [(2, 4), (6, 6)]
    assert len(split_by_start([*one, timed(6, start=1.5, steps=2)])) == 2
    assert again[0].goodput == pytest.approx(2 / 3)
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
    assert len(empty.missing) == 3 and "metrics.jsonl is not there" in empty.missing[0]
    assert len(torn.rows) == 1 and not any("curves" in line for line in torn.missing)
    assert "line 1" in bad.missing[0] and bad.rows == []
    page = visible(make_report([empty, torn, bad]))
    assert page.count("⚠") == 8 and "line 1" in page


def test_a_damaged_run_still_has_its_page(own_run: Path):
    runs.damage(own_run / runs.RUN / "checkpoints" / "8")
    (own_run / runs.RUN / "checkpoints" / "12" / "meta" / "metadata").write_text("{")
    (own_run / runs.RUN / "config.json").write_text("[]")
    history = read_history(str(own_run / runs.RUN))
    assert any(event.kind == "damaged" and event.step == 12 for event in history.events)
    assert "config.json cannot be read" in history.missing[-1]
    assert "damaged" in visible(make_report([history]))


def test_nothing_from_disk_comes_alive(tmp_path: Path):
    run = tmp_path / "<b>run"
    write_rows(run, [{"step": 1, "train/loss": 2.0}])
    (run / "config.json").write_text(json.dumps({"checkpoint": {"directory": None}, EVIL: EVIL}))
    (run / "checkpoints" / f"7.corrupt{EVIL.replace('/', '_')}").mkdir(parents=True)
    page = make_report([read_history(str(run))])
    assert page.count("<script") == 2 + page.count('"<script')
    assert "<b>" not in visible(page) and "<img" not in visible(page)
    assert "&lt;img" in visible(page) and "set aside" in visible(page)
    assert "<" not in re.findall(r'id="specs">(.*?)</script>', page, re.S)[0]


def test_a_page_stays_small(tmp_path: Path):
    names = [f"run{n}" for n in range(len(COLOURS))]
    for name in names:
        rows = [
            timed(step, steps=float(step)) | {"train/loss": 1 / 3 + math.sin(step * 1.7)}
            for step in range(1, 20_001)
        ]
        for row in rows:
            row |= {"train/grad_norm": row["train/loss"], "train/tokens_per_s": row["step"] / 7}
            row |= {"eval/loss": row["train/loss"], "eval/best_loss": row["train/loss"]}
        write_rows(tmp_path / name, rows[:: 1 if name == "run0" else 20])
    page = make_report([read_history(str(tmp_path / name)) for name in names])
    assert len(page.encode()) < 2_000_000
    assert len({row["r"] for row in specs(page)[0]["data"]["values"]}) == len(COLOURS)


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
        ([], "found 0 runs"),
        (["."] * 9, "found 9 runs"),
        ([".", "--out", "."], "--out: found"),
        ([".", "--out", "nowhere/x.html"], "--out: found nowhere/x.html"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main(lambda: cli.command(["report", *args])) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
