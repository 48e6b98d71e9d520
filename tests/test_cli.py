"""The `jaxlm` command."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
import text_run

from jaxlm import __main__ as cli
from jaxlm.corpus.cache import list_caches
from jaxlm.corpus.tokenizer import load_tokenizer
from jaxlm.extras import version
from jaxlm.inference.sample import printable, sample_run
from jaxlm.launch import run_main
from jaxlm.report.diff import diff_checkpoints
from jaxlm.tracking.console import format_bytes


@pytest.fixture
def out(capsys: pytest.CaptureFixture):
    """What a command prints, once its exit code is as expected."""

    def run(*args: str, code: int = 0) -> str:
        capsys.readouterr()
        assert cli.command(args) == code
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return run


def refusal(capsys: pytest.CaptureFixture, *args: str) -> str:
    """The message of a command that ends with code 1."""
    assert run_main(lambda: cli.command(args)) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ")
    return printed.err


def test_out_replaces_nothing_but_a_plain_file(own_home: Path, monkeypatch, capsys):
    monkeypatch.chdir(own_home)
    os.mkfifo("pipe")
    Path("link").symlink_to("elsewhere")
    for out in ("pipe", "link", "texts"):
        said = refusal(capsys, "report", text_run.RUN, "--out", out)
        assert f"--out: found {out}, which is no plain file" in said
    assert "found no folder nowhere" in refusal(
        capsys, "report", text_run.RUN, "--out", "nowhere/x"
    )
    assert Path("pipe").is_fifo() and Path("link").is_symlink() and Path("texts").is_dir()


def test_a_copy_has_one_end_on_this_disk(capsys: pytest.CaptureFixture):
    said = refusal(capsys, "checkpoints", "copy", "gs://a/run", "gs://b/run")
    assert "gs://a/run to gs://b/run: found two buckets" in said


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]


@pytest.fixture
def at_home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shared_home)
    return shared_home


def test_list_prints_the_seeds_table(at_home: Path, out):
    lines = out("checkpoints", "list", text_run.RUN).splitlines()
    assert cells(lines[0]) == ["Step", "Tokens", "Eval Loss", "Best Eval Loss", "Size", ""]
    assert re.fullmatch(r"-+\|-+\|-+\|-+\|-+\|-*", lines[1])
    losses = text_run.eval_losses(at_home / text_run.RUN)
    assert len(lines) == 5 and list(losses) == [4, 8, 12]
    best = float("inf")
    for line, (step, loss) in zip(lines[2:], losses.items(), strict=True):
        best = min(best, loss)
        expected = [str(step), f"{step * 256 / 1e3:.1f} k", f"{loss:.4f}", f"{best:.4f}"]
        assert cells(line)[:4] == expected
        assert re.fullmatch(r"\d+\.\d [kM]B", cells(line)[4])
        assert line.index("|") == lines[0].index("|")
    assert [cells(line)[-1] for line in lines[2:]] == ["", "best", "latest, final"]


def test_list_as_json(at_home: Path, out):
    found = json.loads(out("checkpoints", "list", text_run.RUN, "--json"))
    rows = found["checkpoints"]
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert [row["tokens_seen"] for row in rows] == [1024, 2048, 3072]
    losses = text_run.eval_losses(at_home / text_run.RUN)
    assert [row["eval_loss"] for row in rows] == list(losses.values())
    assert [row["is"] for row in rows] == [[], ["best"], ["latest", "final"]]
    assert all(row["bytes"] > 600_000 for row in rows)
    assert found["damaged"] == {} and found["set_aside"] == []
    # Of the checkpoint folder itself, the same.
    again = json.loads(out("checkpoints", "list", f"{text_run.RUN}/checkpoints", "--json"))
    assert again["checkpoints"] == rows


def test_compare_tells_runs_apart(
    at_home: Path, out, capsys: pytest.CaptureFixture, tmp_path: Path
):
    copy = shutil.copytree(text_run.RUN, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints/8")
    lines = out("checkpoints", "compare", text_run.RUN, str(copy)).splitlines()
    assert cells(lines[0])[0] == "Run" and len(lines) == 2 + 3 + 2
    assert [cells(line)[:2] for line in lines[2:]] == [
        *[[text_run.RUN, str(step)] for step in (4, 8, 12)],
        *[[str(copy), str(step)] for step in (4, 12)],
    ]
    assert [cells(line)[-1] for line in lines[-2:]] == ["best", "latest, final"]
    assert len({line.index("|") for line in [lines[0], *lines[2:]]}) == 1
    assert "RUN: found none, expected one run folder" in refusal(capsys, "checkpoints", "compare")
    found = json.loads(out("checkpoints", "compare", text_run.RUN, str(copy), "--json"))
    assert [run["run"] for run in found] == [text_run.RUN, str(copy)]


def test_damaged_and_set_aside_ones_are_named(own_home: Path, out):
    folder = own_home / text_run.RUN / "checkpoints"
    name = text_run.damage(folder / "8").relative_to(folder / "8")
    (folder / "4").rename(folder / "4.corrupt")
    lines = out("checkpoints", "list", str(own_home / text_run.RUN)).splitlines()
    assert [cells(line)[0] for line in lines[2:-2]] == ["12"]
    assert lines[-2] == f"damaged: {folder}/8: {name}: content differs (checksum)"
    assert lines[-1] == f"damaged, set aside in {folder}: 4.corrupt"
    found = json.loads(out("checkpoints", "list", str(own_home / text_run.RUN), "--json"))
    assert list(found["damaged"]) == ["8"] and found["set_aside"] == ["4.corrupt"]


def test_a_run_without_checkpoints(tmp_path: Path, out, capsys: pytest.CaptureFixture):
    (tmp_path / "checkpoints").mkdir()
    assert len(out("checkpoints", "list", str(tmp_path)).splitlines()) == 2
    said = refusal(capsys, "checkpoints", "list", str(tmp_path / "none"))
    assert "none: found no checkpoints, expected a run folder" in said


def test_diff_of_equal_checkpoints(at_home: Path, out, tmp_path: Path):
    copy = shutil.copytree(text_run.RUN, tmp_path / "copy")
    said = out("checkpoints", "diff", f"{text_run.RUN}@12", f"{copy}@final")
    assert said == "every array is equal to the bit\n"
    assert out("checkpoints", "diff", text_run.RUN, str(copy)) == said  # latest, if not told


def test_diff_names_every_leaf_layer_by_layer(at_home: Path, out):
    lines = out("checkpoints", "diff", f"{text_run.RUN}@best", f"{text_run.RUN}@latest", code=1)
    *lines, count = lines.splitlines()
    names = [line.split(":")[0] for line in lines]
    assert count == f"{len(lines)} arrays differ" and len(set(names)) == len(names)
    params = [name for name in names if name.startswith("params/")]
    assert len(params) == 1 + 2 * 9 + 2  # embedding, two blocks, final norm and head
    for layer in (0, 1):
        assert f"params/layers/{layer}/mlp/w_up_DF" in params
    of_layer = [name.split("/")[2] for name in params if "/layers/" in name]
    assert of_layer == sorted(of_layer)
    assert "state/step: 1 of 1 values differ, by up to 4.000e+00, 5.0e-01 of its rms" in lines
    assert "state/skipped_steps" not in names


def test_diff_measures_the_difference(at_home: Path, monkeypatch: pytest.MonkeyPatch):
    from jaxlm.report import diff

    def altered(path: Path, items: list[str]):
        (item,) = items  # one after the other: two whole states may be more than the memory
        arrays = restore(path, items)
        if item == "params" and next(calls):
            change(arrays["params"])
        return arrays

    def differences(own_change) -> list[tuple[str, str]]:
        nonlocal change, calls
        change, calls = own_change, iter([False, True])
        return [tuple(d) for d in diff_checkpoints(f"{text_run.RUN}@8", f"{text_run.RUN}@8")]

    def one_bit(params) -> None:
        embedding = params["embedding_VD"] = np.array(params["embedding_VD"])
        embedding.view(np.uint32)[3, 5] ^= 1

    def negative_zero(params) -> None:
        params["embedding_VD"] = np.zeros((512, 32), np.float32)

    def not_a_number(params) -> None:
        embedding = params["embedding_VD"] = np.array(params["embedding_VD"])
        embedding[3, 5] = np.nan

    def narrower(params) -> None:
        params["embedding_VD"] = params["embedding_VD"].astype(np.float16)

    def without(params) -> None:
        del params["embedding_VD"]

    change, calls, restore = None, iter(()), diff.restore_numpy
    monkeypatch.setattr(diff, "restore_numpy", altered)
    name = "params/embedding_VD"
    assert differences(lambda params: None) == []
    ((found, what),) = differences(one_bit)
    assert found == name and re.match(r"1 of 16384 values differ, by up to \d\.\d+e-", what)
    told = "1 of 16384 values differ, and none of them is finite in both"
    assert differences(not_a_number) == [(name, told)]
    assert differences(without) == [(name, f"only in {text_run.RUN}@8")]
    assert differences(narrower) == [(name, "float32 [512, 32] and float16 [512, 32]")]
    ((_, what),) = differences(negative_zero)
    assert what.startswith("16384 of 16384 values differ")


@pytest.mark.filterwarnings("error")
def test_diff_of_infinite_values():
    from jaxlm.report.diff import _difference

    a, b = np.array([np.inf, 1.0], np.float32), np.array([np.inf, 1.5], np.float32)
    assert _difference(a, b) == "1 of 2 values differ, by up to 5.000e-01, 5.0e-01 of its rms"


def test_diff_refuses_what_it_cannot_compare(own_home: Path, capsys: pytest.CaptureFixture):
    run = own_home / text_run.RUN
    said = refusal(capsys, "checkpoints", "diff", f"{run}@8", f"{run}@9")
    assert "@9: there is no such checkpoint" in said and "holds steps: 4, 8, 12" in said
    text_run.damage(run / "checkpoints/8", "opt_state")
    said = refusal(capsys, "checkpoints", "diff", f"{run}@8", f"{run}@12")
    assert "@8: damaged (step 8: opt_state/" in said


def test_verify_looks_at_every_step_and_changes_nothing(own_home: Path, out):
    run = own_home / text_run.RUN
    assert out("checkpoints", "verify", str(run)) == (
        "4: sound\n8: sound\n12: sound\nmetrics.jsonl: sound\n0 of 3 steps are damaged\n"
    )
    name = text_run.damage(run / "checkpoints/8", "opt_state").relative_to(run / "checkpoints/8")
    before = {path: path.stat() for path in run.rglob("*")}
    said = out("checkpoints", "verify", str(run), code=1).splitlines()
    damaged = f"8: {name}: content differs (checksum)"
    assert said == [
        "4: sound",
        damaged,
        "12: sound",
        "metrics.jsonl: sound",
        "1 of 3 steps are damaged",
    ]
    found = json.loads(out("checkpoints", "verify", str(run), "--json", code=1))
    assert found["steps"]["4"] == [] and found["steps"]["8"] != []
    after = {path: path.stat() for path in run.rglob("*")}
    times = ("st_ino", "st_size", "st_mtime_ns")
    assert [[getattr(stat, t) for t in times] for stat in before.values()] == [
        [getattr(stat, t) for t in times] for stat in after.values()
    ]
    assert before.keys() == after.keys()


def test_verify_reads_the_config_that_a_resume_would_read(own_home: Path, out):
    step = own_home / text_run.RUN / "checkpoints/8"
    config = json.loads((step / "meta/metadata").read_text())["config"]
    config["optim"]["warmup_steps"] = 2.0
    text_run.rewrite(step, config=config)
    said = out("checkpoints", "verify", str(own_home / text_run.RUN), code=1).splitlines()
    assert "config in the metadata of step 8: optim.warmup_steps: found 2.0, expected" in said[1]
    assert f"(written by jaxlm {version()})" in said[1]
    assert said[-1] == "1 of 3 steps are damaged"


def test_verify_names_a_step_of_another_run(own_home: Path, out):
    text_run.give_to_another_run(own_home / text_run.RUN / "checkpoints/8")
    said = out("checkpoints", "verify", str(own_home / text_run.RUN), code=1).splitlines()
    assert said[1].startswith("8: it is of another run (another) than the others (")
    assert said[-1] == "1 of 3 steps are damaged"


def test_verify_of_nothing_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "checkpoints").mkdir()
    said = refusal(capsys, "checkpoints", "verify", str(tmp_path))
    assert "found no checkpoint to verify" in said


@pytest.mark.slow
def test_verify_finds_the_recorded_loss_of_the_best(own_home: Path, out, monkeypatch):
    monkeypatch.chdir(own_home)
    loss = text_run.eval_losses(Path(text_run.RUN))[text_run.BEST]
    said = out("checkpoints", "verify", text_run.RUN, "--eval").splitlines()
    assert said[-2] == (
        f"eval loss of step {text_run.BEST}: recorded {loss!r}, found {loss!r}: equal to the bit"
    )
    # A loss that was written down wrong: whole by its manifest, and not what the model has.
    metadata = Path(text_run.RUN) / "checkpoints" / str(text_run.BEST) / "meta/metadata"
    text = metadata.read_text()
    metadata.write_text(text.replace(f'"eval_loss": {loss!r}', f'"eval_loss": {loss - 1e-9!r}', 1))
    assert metadata.read_text() != text
    monkeypatch.setattr("jaxlm.checkpoints.manifest.find_damage", lambda *_, **__: [])
    monkeypatch.setattr("jaxlm.checkpoints.verify.find_damage", lambda *_, **__: [])
    said = out("checkpoints", "verify", text_run.RUN, "--eval", code=1).splitlines()
    assert said[-2].endswith(f"found {loss!r}: not the same")


def test_eval_of_one_and_of_several(at_home: Path, out, capsys: pytest.CaptureFixture):
    losses = text_run.eval_losses(at_home / text_run.RUN)
    line = out("eval", text_run.RUN).splitlines()[-1]
    assert line.startswith(f"{text_run.RUN}@best (step 8): loss {losses[8]:.4f}, perplexity ")
    assert line.endswith(" 999 tokens held out of text:texts/*.txt")
    cli.command(["eval", f"{text_run.RUN}@8", f"{text_run.RUN}@12", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["loss"]) for row in found] == [(8, losses[8]), (12, losses[12])]
    assert [row["num_tokens"] for row in found] == [999, 999]
    cli.command(["eval", text_run.RUN, "--source", "text:texts/0*.txt", "--json"])
    other = json.loads(capsys.readouterr().out)
    assert other["loss"] != losses[8] and other["recorded_loss"] is None
    assert abs(other["loss"] - losses[8]) < 0.5  # the same tokenizer: words of one lexicon


def test_eval_of_two_tells_which_is_better(at_home: Path, out, capsys: pytest.CaptureFixture):
    losses = text_run.eval_losses(at_home / text_run.RUN)
    a, b = f"{text_run.RUN}@12", f"{text_run.RUN}@best"
    line = out("eval", a, b, "--paired").splitlines()[-1]
    assert line.startswith(f"difference: {losses[12] - losses[8]:+.5f} nats per token, 95% ")
    assert line.endswith(f" over 4 batches: {b} is better")
    assert out("eval", b, a, "--paired").splitlines()[-1].endswith(f": {b} is better")
    assert out("eval", b, b, "--paired").splitlines()[-1].endswith(": cannot tell")
    assert "found 1, expected two of them with --paired" in refusal(capsys, "eval", b, "--paired")


@pytest.mark.slow
def test_sample_streams_what_it_gives_as_json(
    at_home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    pieces, tell = [], print
    monkeypatch.setattr(
        "builtins.print", lambda *a, **k: (pieces.append((*a, "")[0]), tell(*a, **k))
    )
    args = ["sample", text_run.RUN, "--prompt", "the näin", "--max_tokens", "16", "--seed", "2"]
    cli.command(args)
    printed = capsys.readouterr()
    assert printed.err.startswith(f"Loaded step {text_run.BEST} of")
    assert len(pieces) > 6  # as they come
    cli.command([*args, "--json"])
    one = json.loads(capsys.readouterr().out)
    assert printed.out == printable(one["prompt"] + one["text"]) + "\n"
    cli.command([*args, "--num_samples", "2", "--json"])
    two = json.loads(capsys.readouterr().out)
    assert two[0] == one and two[1]["tokens"] != one["tokens"]
    tokenizer = load_tokenizer(Path(text_run.RUN) / "checkpoints")
    assert tokenizer.decode(one["tokens"]) == one["text"] and len(one["tokens"]) == 16


def test_sample_never_cuts_a_character(at_home: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = load_tokenizer(Path(text_run.RUN) / "checkpoints")
    text = "¿Qué? 漢字 🎯 x"
    ids = tokenizer.encode(text).ids
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)
    coming = [np.array([i]) for i in ids]
    monkeypatch.setattr("jaxlm.inference.sample.stream", lambda *_, **__: iter(coming))
    pieces: list[str] = []
    (found,) = sample_run(text_run.RUN, ["a "], write=pieces.append)
    assert "".join(pieces) == "a " + text and found.text == text
    assert "\ufffd" not in "".join(pieces) and len(pieces) > 5
    coming.pop(ids.index(ids[-3]))
    coming = coming[: len(ids) - 3]  # ends within the last character
    pieces.clear()
    (found,) = sample_run(text_run.RUN, [""], write=pieces.append)
    assert "".join(pieces) == found.text and found.text.endswith("\ufffd")


def test_sample_refuses_what_does_not_fit(at_home: Path, capsys: pytest.CaptureFixture):
    assert run_main(lambda: cli.command(["sample", text_run.RUN, "--max_tokens", "99"])) == 1
    assert "1 tokens and 99 new ones are 100, expected at most 32" in capsys.readouterr().err
    assert "num_samples: found 0" in refusal(capsys, "sample", text_run.RUN, "--num_samples", "0")
    assert "prompts: found 'a\\udcff', expected" in refusal(
        capsys, "sample", "x", "--prompt", "a\udcff"
    )
    assert "top_p: found 2.0" in refusal(capsys, "sample", text_run.RUN, "--top_p", "2")


@pytest.mark.slow
def test_a_run_ends_with_a_sample_that_changes_nothing_else(own_home: Path):
    flags = "--num_steps 4 --optim.learning_rate 1e-2 --run_dir runs/"
    code, said = text_run.launched(own_home, f"{flags}a --sample_prompt 'the rain'")
    assert code == 0 and re.search(r"\nsample: the rain.+\n(.*\n)*done: 4 steps", said)
    code, silent = text_run.launched(own_home, f"{flags}b")
    assert code == 0 and "\nsample: " not in silent
    a, b = (own_home / "runs" / name for name in "ab")
    assert text_run.eval_losses(a) == text_run.eval_losses(b) != {}
    assert diff_checkpoints(f"{a}@4", f"{b}@4") == []


@pytest.mark.slow
def test_a_sample_that_cannot_be_had_costs_the_run_nothing(own_home: Path, monkeypatch):
    monkeypatch.setattr(
        "jaxlm.inference.sample.sample_run", Mock(side_effect=RuntimeError("out of memory"))
    )
    flags = "--num_steps 4 --run_dir runs/a --sample_prompt 'the rain'"
    code, said = text_run.launched(own_home, flags)
    assert code == 0 and re.search(r"no sample: out of memory\n(.*\n)*done: 4 steps", said)


def test_prepare_and_cache(
    tmp_path: Path, out, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(text_run.make_home(tmp_path / "home"))
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    assert out("cache", "list") == f"nothing in {tmp_path}/cache\n"
    said = out("prepare", "--config", "configs/tiny.py", "--data.eval_tokens", "500")
    found = re.search(
        r"^main: ([\d,]+) training tokens in .* 500 held out in .*/cache/data/text-", said, re.M
    )
    assert found and said.count(found[1]) == 1  # said once
    again = out("prepare", "--config", "configs/tiny.py", "--data.eval_tokens", "500")
    assert said.startswith("Training a tokenizer") and said.endswith(f"\n{again}")
    out("prepare", "--config", "configs/tiny.py", "--data.eval_tokens", "600")
    assert not Path("runs").exists()

    first, second = [entry["name"] for entry in list_caches()]
    lines = out("cache", "list").splitlines()
    assert [line.split(":")[0] for line in lines] == [first, second]
    assert all("tokens of text:texts/*.txt" in line for line in lines)
    found = json.loads(out("cache", "list", "--json"))["data"]
    assert [entry["name"] for entry in found] == [first, second]
    assert all(entry["complete"] for entry in found)

    sizes = {entry["name"]: format_bytes(entry["num_bytes"]) for entry in list_caches()}
    would = [f"{name}: would be deleted, {size}" for name, size in sizes.items()]
    last = "deleted nothing; to delete, name the entries and add --delete"
    assert out("cache", "clear").splitlines() == [*would, last]
    assert out("cache", "clear", "data").splitlines() == [*would, last]
    assert out("cache", "clear", first).splitlines() == [would[0], last]
    assert "--delete: found no name" in refusal(capsys, "cache", "clear", "--delete")
    assert [entry["name"] for entry in list_caches()] == [first, second]
    assert out("cache", "clear", first, "--delete") == f"{first}: deleted, {sizes[first]}\n"
    assert [entry["name"] for entry in list_caches()] == [second]
    assert f"no {first} in" in refusal(capsys, "cache", "clear", first, "--delete")
    program = tmp_path / "cache/compiled/here/x-cache"
    program.parent.mkdir(parents=True)
    program.write_bytes(b"12345")
    assert out("cache", "list").splitlines()[-1] == "programs: 5 B of compiled programs"
    assert out("cache", "clear").splitlines()[-2:] == ["programs: would be deleted, 5 B", last]
    assert out("cache", "clear", "programs", "--delete") == "programs: deleted, 5 B\n"
    assert not program.exists() and [entry["name"] for entry in list_caches()] == [second]
    assert out("cache", "clear", "data", "programs", "--delete").startswith(f"{second}: deleted, ")
    assert list_caches() == [] and out("cache", "clear") == f"nothing in {tmp_path}/cache\n"
    elsewhere = ["--cache_dir", str(tmp_path / "other")]
    assert out("cache", "list", *elsewhere) == f"nothing in {tmp_path}/other\n"


def test_doctor(out):
    said = out("doctor")
    for line in (
        f"python {sys.version.split()[0]} on ",
        f"jax {jax.__version__}",
        "extras: ",
        "devices: 8 x cpu",
        "cores: ",
        "cache: ",
        "disk: ",
    ):
        assert re.search(f"^{re.escape(line)}", said, re.M), line
    assert os.environ["JAXLM_CACHE"] in said


ALL = (
    "prepare, batch, prove-resume, plan, cache, checkpoints, eval, benchmark, sample, export, "
    "import, report, doctor, completion"
)
EACH = [f"• {name} " for name in ALL.split(", ")]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["checkpoints", "lst", text_run.RUN], ["list, compare, diff, verify"]),
        (["doctr"], [ALL]),
        (["checkpoints", "list", text_run.RUN, "--jsn"], ["--jsn", "--json"]),
        (["cache", "list", "--cach_dir", "x"], ["Perhaps you meant", "--cache-dir"]),
        (["prepare", "--config", "configs/tiny.py", "--data.sorce", "x"], ["--data.source STR"]),
        ([], EACH),
        (["checkpoints"], ["• list ", "• verify "]),
        (["cache"], ["• clear "]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_a_wrong_word_gets_the_right_ones(
    at_home: Path, capsys: pytest.CaptureFixture, args: list[str], told: list[str]
):
    with pytest.raises(SystemExit) as stop:
        cli.command(args)
    assert stop.value.code == 2
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    for text in told:
        assert text in said


def jaxlm_apart(home: Path, *args: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(text_run.REPO)}
    return subprocess.run(
        [sys.executable, "-m", "jaxlm", *args],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_real_process(at_home: Path):
    differ = jaxlm_apart(at_home, "checkpoints", "diff", f"{text_run.RUN}@4", f"{text_run.RUN}@8")
    assert differ.returncode == 1 and differ.stderr == ""


@pytest.mark.slow
def test_other_real_processes(at_home: Path):
    unknown = jaxlm_apart(at_home, "checkpoints", "list", "runs/none")
    assert unknown.returncode == 1 and unknown.stdout == ""
    assert unknown.stderr.startswith("error: runs/none: ") and unknown.stderr.count("\n") == 1
    help_text = jaxlm_apart(at_home, "--help")
    assert help_text.returncode == 0
    assert all(f"• {name}" in help_text.stdout for name in cli.COMMANDS)
