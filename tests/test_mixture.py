"""Rows of several sources by weight: exact shares, any kill, any change on the way."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_events import KilledError
from text_run import damage
from tiny_run import tiny_config
from tokenizers import Tokenizer

from jaxlm.checkpoints import held
from jaxlm.checkpoints.folder import scan_folder
from jaxlm.config import Config, DataConfig, ModelConfig, OptimConfig
from jaxlm.corpus.tokenizer import train_tokenizer
from jaxlm.data import dataset, run_data
from jaxlm.data.batches import TrainBatches
from jaxlm.data.mixture import Mixture, Phase, add_phase, spread
from jaxlm.data.packing import Windows
from jaxlm.data.run_data import load_data
from jaxlm.data.shards import TokenShards, map_tokens
from jaxlm.evaluation.documents import rows_of_batch
from jaxlm.evaluation.score import score
from jaxlm.files.strict import read_json
from jaxlm.proof.attempt import compare_runs, untimed_rows
from jaxlm.report.diff import diff_checkpoints
from jaxlm.training.inputs import find_inputs
from jaxlm.training.loop import Callback
from jaxlm.training.train import train

SHARES = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 40), min_size=1).filter(
    lambda shares: any(shares.values())
)
BATCH = 4


def phases_of(*shares: dict[str, int], steps: tuple[int, ...] = (0, 3, 11)) -> list[Phase]:
    return [
        {"step": step, "shares": each, "stages": {}}
        for step, each in zip(steps, shares, strict=False)
    ]


def sources_of(mixture: Mixture, count: int) -> list[tuple[str, int]]:
    """(source, its row) of each of the first rows."""
    found: list[Any] = [None] * count
    for name, (own, rows) in mixture.split(np.arange(count)).items():
        for place, row in zip(np.flatnonzero(own), rows, strict=True):
            assert found[place] is None
            found[place] = name, int(row)
    return found


@given(shares=SHARES)
@settings(max_examples=200, deadline=None)
def test_at_any_row_each_source_has_its_share_but_for_less_than_one_row(shares):
    names, total = spread(shares), sum(shares.values())
    assert len(names) == total
    for name, share in shares.items():
        counts = np.cumsum([found == name for found in names])
        assert counts[-1] == share
        assert np.abs(counts - np.arange(1, total + 1) * share / total).max() < 1


@given(shares=st.lists(SHARES, min_size=1, max_size=3), data=st.data())
@settings(max_examples=100, deadline=None)
def test_each_row_is_of_one_source_and_none_of_its_rows_is_lost(shares, data):
    mixture = Mixture(phases_of(*shares), BATCH)
    found = sources_of(mixture, 90)
    for name in mixture.names:
        assert [row for source, row in found if source == name] == list(
            range(sum(source == name for source, _ in found))
        )
    stop = data.draw(st.integers(1, 90))
    start = data.draw(st.integers(0, stop - 1))
    alone = mixture.split(np.arange(start, stop))
    assert [source for source, _ in found[start:stop]] == [
        next(name for name, (own, _) in alone.items() if own[row]) for row in range(stop - start)
    ]
    for name, (own, rows) in alone.items():
        assert rows.tolist() == [found[start + place][1] for place in np.flatnonzero(own)]
        assert mixture.rows_before(name, stop) == rows[-1] + 1


def test_golden_spread():
    # Another order means that a run begun earlier would go on with other data.
    assert "".join(spread({"a": 5, "b": 3, "c": 2})) == "abacababac"
    assert "".join(spread({"a": 1, "b": 6})) == "bbbbbab"


def test_phases_are_appended_where_the_shares_change():
    begun = add_phase([], 0, {"a": 1, "b": 1}, {})
    assert add_phase(begun, 7, {"b": 1, "a": 1}, {}) == begun
    assert add_phase(begun, 7, {"a": 1, "b": 1, "c": 0}, {}) == begun
    changed = add_phase(begun, 7, {"a": 3, "b": 1}, {})
    assert changed == phases_of({"a": 1, "b": 1}, {"a": 3, "b": 1}, steps=(0, 7))
    # The run goes back to before the change, and on with the new shares or the old.
    assert add_phase(changed, 5, {"a": 3, "b": 1}, {})[-1]["step"] == 5
    assert add_phase(changed, 5, {"a": 1, "b": 1}, {}) == begun
    grown = add_phase(begun, 7, {"a": 1, "b": 1}, {"a": 2, "b": 1})
    assert grown[1:] == [{"step": 7, "shares": {"a": 1, "b": 1}, "stages": {"a": 2}}]
    assert add_phase(grown, 9, {"a": 1, "b": 1}, {"a": 2}) == grown
    assert add_phase(grown, 9, {"b": 1}, {})[-1]["stages"] == {"a": 2}  # a may come back


def test_a_far_row_takes_no_longer():
    mixture = Mixture(phases_of({"a": 2, "b": 1}, {"b": 5, "c": 2}), BATCH)
    (own, _), (_, rows) = (mixture.split(np.arange(2**60, 2**60 + 7))[name] for name in "bc")
    assert own.sum() == 5 and rows.min() > 2**57


# --- batches


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, TokenShards]:
    """Three sources, whose tokens are their own positions, from 0, 1,000 and 2,000 on."""
    found = {}
    for number, (name, length) in enumerate({"a": 101, "b": 51, "main": 101}.items()):
        (np.arange(length, dtype="<u2") + 1000 * number).tofile(tmp_path / name)
        found[name] = TokenShards([map_tokens(tmp_path / name, "<u2")])
    return found


def windows_of(
    tokens: dict[str, TokenShards], phases: list[Phase], count: int
) -> dict[int, list[int]]:
    """Source number -> its windows of 10 tokens in the order of training."""
    sources = {name: Windows(of, 10) for name, of in tokens.items()}
    batches = TrainBatches(sources, Mixture(phases, BATCH), batch_size=BATCH, seed=1)
    starts = np.concatenate([batches(n)["inputs"][:, 0] for n in range(count)])
    return {n: (starts[starts // 1000 == n] % 1000 // 10).tolist() for n in range(3)}


def test_each_source_has_epochs_of_its_own_through_changes(tokens):
    phases = phases_of({"a": 7, "b": 3}, {"a": 1, "b": 2}, {"b": 1, "main": 4})
    found = windows_of(tokens, phases, 60)
    for number, name in enumerate(("a", "b", "main")):
        (size,) = Windows(tokens[name], 10).sizes
        epochs = [found[number][i : i + size] for i in range(0, len(found[number]), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
    assert len(found[0]) < 40 < len(found[1])  # a ends with its phases, b begins its second epoch


def test_sources_of_equal_size_have_orders_of_their_own(tokens):
    found = windows_of(tokens, phases_of({"a": 1, "main": 1}), 5)
    assert sorted(found[0]) == sorted(found[2]) and found[0] != found[2]
    assert windows_of(tokens, phases_of({"main": 1}), 3)[2][:10] == found[2]  # as a source alone


def test_a_source_with_less_than_a_window_is_named(tokens):
    with pytest.raises(ValueError, match="corpus b: 51 training tokens.*takes 61"):
        sources = {"b": Windows(tokens["b"], 60)}
        TrainBatches(sources, Mixture(phases_of({"b": 1}), 1), batch_size=1, seed=0)


# --- runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, words in {"web": "to be or not", "code": "if x then y", "new": "11 12 13"}.items():
        lines = [json.dumps({"text": f"{words} {n} " * 9}) for n in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def run(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Trains on some of the texts, given as `name=weight`, under a name and to a step."""

    def start(
        to: str,
        num_steps: int,
        *,
        kill: int = 0,
        data: dict[str, Any] | None = None,
        branch_from: str | None = None,
        learning_rate: float = 1e-2,
        resume: Any = "auto",
        callbacks: Sequence[Callback] = (),
        **weights: float,
    ) -> Config:
        own = DataConfig(
            sources={name: f"text:{texts}/{name}.jsonl" for name in weights},
            weights=weights,
            eval_tokens=300,
            cache_dir=str(texts / "cache"),
        )
        model = ModelConfig(
            vocab_size=300, num_layers=1, d_model=8, d_ff=8, num_heads=1, num_kv_heads=1, head_dim=8
        )
        config = tiny_config(
            tmp_path / to,
            model=model,
            data=replace(own, **(data or {})),
            num_steps=num_steps,
            eval_interval=4,
            optim=OptimConfig(learning_rate=learning_rate, warmup_steps=0),
            branch_from=branch_from,
            resume=resume,
            checkpoint={"save_interval": 4, "keep_latest": 9},
        )

        monkeypatch.setenv("JAXLM_RECORD_BATCHES", f"{tmp_path / to}.batches")

        def killed(step: int, row: dict[str, float]) -> None:
            if step == kill:
                raise KilledError

        if kill:
            with pytest.raises(KilledError):
                train(config, callbacks=[killed])
        else:
            assert train(config, at_end=(), callbacks=callbacks).complete
        return config

    return start


@pytest.mark.slow
def test_a_run_killed_around_a_change_goes_on_to_the_same_bits(run, tmp_path):
    run("whole", 6, web=0.7, code=0.3)
    run("whole", 12, web=0.2, code=0.3, new=0.5)
    run("cut", 6, web=0.7, code=0.3, kill=5)
    run("cut", 6, web=0.7, code=0.3)
    run("cut", 12, web=0.2, code=0.3, new=0.5, kill=7)  # nothing is saved since the change
    run("cut", 12, web=0.2, code=0.3, new=0.5)
    assert compare_runs(tmp_path / "whole", tmp_path / "cut") == []
    latest = scan_folder(tmp_path / "cut" / "checkpoints").sound[12]
    assert latest.phases == [
        {"step": 0, "shares": {"code": 3, "web": 7}, "stages": {}},
        {"step": 6, "shares": {"code": 3, "new": 5, "web": 2}, "stages": {}},
    ]
    assert latest.data.keys() == {"web", "code", "new"}


def test_best_is_judged_by_the_sets_that_the_run_began_with(run, tmp_path):
    run("a", 4, web=1, code=3)
    run("a", 8, web=1, code=1, new=1)
    first, second = (row for row in untimed_rows(tmp_path / "a") if "eval/loss" in row)
    assert {"eval/web/loss", "eval/code/loss", "eval/code/bits_per_byte"} <= first.keys()
    assert second.keys() - first.keys() == {
        f"eval/new/{metric}" for metric in ("loss", "perplexity", "bits_per_byte")
    }
    assert min(first["eval/web/loss"], first["eval/code/loss"]) < first["eval/loss"]
    with pytest.raises(ValueError, match="data.sources: found web, new, without code, whose held"):
        run("a", 12, web=1, new=1)
    with pytest.raises(ValueError, match="data.best_by: was 'code.web', is 'web'"):
        run("a", 12, web=1, code=1, new=1, data={"best_by": "web"})
    run("a", 12, web=0, code=0, new=1)  # a source of weight 0 still judges


def test_one_of_several_sets_may_judge(run, texts, tmp_path):
    more = {"held_out": {"more": f"text:{texts}/new.jsonl"}, "best_by": "more"}
    config = run("a", 4, web=1, data=more)
    row = untimed_rows(tmp_path / "a")[-1]
    assert row["eval/loss"] == row["eval/more/loss"] != row["eval/web/loss"]
    changed = {**more, "held_out": {"more": f"text:{texts}/code.jsonl"}}
    with pytest.raises(ValueError, match="whose files are not those of .*new.jsonl, which the run"):
        run("a", 8, web=1, data=changed)
    assert scan_folder(Path(config.checkpoint_dir)).sound[4].best_eval_loss == row["eval/loss"]


def test_a_run_of_one_source_takes_in_others(run, texts, tmp_path):
    alone = {"sources": {}, "weights": {}, "source": f"text:{texts}/web.jsonl"}
    run("a", 4, data=alone)
    with pytest.raises(ValueError, match="whose files are not those of .*web.jsonl"):
        run("a", 8, data={**alone, "source": f"text:{texts}/code.jsonl"})
    main = {"sources": {"main": alone["source"], "code": f"text:{texts}/code.jsonl"}}
    run("a", 8, main=1, code=1, data=main)
    tokenizers = {path.read_bytes() for path in (texts / "cache").rglob("text-*/tokenizer.json")}
    assert (tmp_path / "a/checkpoints/tokenizer.json").read_bytes() in tokenizers
    assert "eval/code/loss" in untimed_rows(tmp_path / "a")[-1]


def test_the_tokenizer_of_several_sources_has_words_of_all(run, tmp_path):
    run("a", 1, web=1, code=0.01, data={"eval_tokens": 100})
    vocabulary = json.loads((tmp_path / "a/checkpoints/tokenizer.json").read_text())["model"]
    assert {"Ġnot", "Ġthen"} <= vocabulary["vocab"].keys()


def test_rows_of_whole_documents(run, tmp_path, capsys):
    packed = {"packing": "documents"}
    config = run("whole", 8, web=3, code=1, data=packed)
    assert re.search(
        r"web: [\d,]+ rows of whole documents, \d+\.\d+% of them padding",
        capsys.readouterr().out,
    )
    run("cut", 8, web=3, code=1, data=packed, kill=5)
    run("cut", 8, web=3, code=1, data=packed)
    assert compare_runs(tmp_path / "whole", tmp_path / "cut") == []
    texts = [row.pieces for row in rows_of_batch(config.run_dir, 2)]
    pieces = [piece for of_row in texts for piece in of_row]
    assert all(piece.text.endswith("<|endoftext|>") or piece.num_tokens == 17 for piece in pieces)
    with pytest.raises(ValueError, match="data.packing: was 'documents', is 'windows'"):
        run("cut", 12, web=3, code=1)


# --- a plan that outgrows its data


def test_a_longer_plan_adds_tokens_to_those_of_the_run(run, texts, tmp_path):
    # The held-out set is not full when the first limit is reached.
    before, after = ({"max_tokens": limit, "eval_tokens": 5000} for limit in (900, 2900))
    run("whole", 4, web=1, code=1, data=before)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.copy(tmp_path / "whole.batches", tmp_path / "cut.batches")
    config = run("whole", 12, web=1, code=1, data=after)
    run("cut", 12, web=1, code=1, data=after, kill=6)
    (texts / "cache").rename(texts / "gone")  # the tokens are made again, and are the same
    run("cut", 12, web=1, code=1, data=after)
    assert compare_runs(tmp_path / "whole", tmp_path / "cut") == []
    sound = scan_folder(Path(config.checkpoint_dir)).sound
    assert sound[4].data["web"]["limits"] == [450] and sound[12].data["web"]["limits"] == [
        450,
        1450,
    ]
    assert sound[12].phases[1:] == [
        {"step": 4, "shares": {"code": 1, "web": 1}, "stages": {"code": 2, "web": 2}}
    ]
    assert sound[12].eval_set == sound[4].eval_set
    # One time through what it had, then through what is new.
    _, data = load_data(
        config, sound[12].recorded_data(tmp_path / "whole/checkpoints/tokenizer.json")
    )
    (first, count) = data.sources["web"].stages
    assert (first, count) == (450, 1450)
    windows = [
        row.window for step in range(1, 13) for row in rows_of_batch(config.run_dir, step)
        if row.source == "web"
    ]  # fmt: skip
    known = (first - 1) // 16
    assert len(windows) == 48 and sorted(windows[:known]) == list(range(known))
    assert min(windows[known : (count - 1) // 16]) >= known
    # In one piece it has the same tokens, with as many held out.
    alone = DataConfig(
        source=config.data.sources["web"],
        tokenizer=str(tmp_path / "whole/checkpoints/tokenizer.json"),
        eval_tokens=data.sources["web"].eval.num_tokens,
        cache_dir=config.data.cache_dir,
    )
    straight = run_data.load_dataset(alone, vocab_size=300, limits=[count])
    tokens = [of.read(0, count) for of in (straight.train, data.sources["web"].train)]
    np.testing.assert_array_equal(*tokens)


@pytest.mark.slow
def test_a_plan_that_outgrows_a_source_that_is_gone(run, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_data, "default_max_tokens", lambda config, n: config.max_tokens or n)
    for change, why in {"gone": "no file matches", "changed": "has changed since"}.items():
        path = texts / f"{change}.jsonl"
        path.write_text((texts / "web.jsonl").read_text())
        source = {"sources": {"web": f"text:{path}"}}
        run(change, 4, web=1, data=source)
        if change == "gone":
            path.unlink()
        else:
            path.write_text((texts / "code.jsonl").read_text())
        with pytest.raises(ValueError, match=f"takes 950 .* 512 are prepared, .*{why}"):
            run(change, 8, web=1, data={**source, "max_tokens": 950})
        capsys.readouterr()
        run(change, 8, web=1, data=source)
        said = capsys.readouterr().out
        assert re.search(f"takes 1,024 .*, 512 are prepared, .*{why}.* repeats those", said)
        assert "from the beginning" not in said
        latest = scan_folder(tmp_path / change / "checkpoints").sound[8]
        assert latest.data["web"]["limits"] == [512] and len(latest.phases) == 1
    assert not [path for path in (texts / "cache/data").glob("*/progress.json")]


@pytest.mark.slow
def test_a_start_that_goes_back_takes_the_data_of_where_it_goes_back_to(run, tmp_path, monkeypatch):
    # As if the arrays were large: the first look at a folder skips them.
    look = held.agree_on_scan
    monkeypatch.setattr(held, "agree_on_scan", lambda folder, check: look(folder, check=False))
    bounded = {"cache_dir": str(tmp_path / "cache")}
    run("a", 4, web=1, data={**bounded, "max_tokens": 450})
    config = run("a", 8, web=1, data={**bounded, "max_tokens": 950})
    damage(Path(config.checkpoint_dir) / "8")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    kept = {**bounded, "max_tokens": 450}
    run("a", 12, web=1, data=kept)
    run("b", 12, web=1, data=kept, kill=7)
    run("b", 12, web=1, data=kept)
    assert diff_checkpoints(f"{tmp_path}/a@12", f"{tmp_path}/b@12") == []
    latest = scan_folder(tmp_path / "a/checkpoints").sound[12]
    assert latest.data["web"]["limits"] == [450] and len(latest.phases) == 1


@pytest.mark.slow
def test_resume_best_takes_the_data_of_the_best(run, tmp_path):
    bounded = {"cache_dir": str(tmp_path / "cache"), "eval_tokens": 60}
    run("a", 4, web=1, data={**bounded, "max_tokens": 450})
    run("a", 8, web=1, data={**bounded, "max_tokens": 950}, learning_rate=3.0)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    kept = {**bounded, "max_tokens": 450}
    run("a", 12, web=1, data=kept, resume="best")
    run("b", 12, web=1, data=kept, resume="best", kill=6)
    run("b", 12, web=1, data=kept, resume="best")
    assert diff_checkpoints(f"{tmp_path}/a@12", f"{tmp_path}/b@12") == []
    assert scan_folder(tmp_path / "a/checkpoints").sound[12].data["web"]["limits"] == [450]


@pytest.mark.slow
def test_a_branch_after_a_growth_may_train_on_other_text(run, tmp_path):
    bounded = {"cache_dir": str(tmp_path / "cache")}
    run("a", 4, web=1, data={**bounded, "max_tokens": 450})
    run("a", 8, web=1, data={**bounded, "max_tokens": 950})
    other = {"sources": {"web": f"text:{tmp_path}/other.jsonl"}, **bounded}
    lines = (json.dumps({"text": f"more of {n} " * 9}) for n in range(60))
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    run("b", 12, web=1, data=other, branch_from=f"{tmp_path}/a@8")
    phases = scan_folder(tmp_path / "b/checkpoints").sound[12].phases
    assert [phase["stages"] for phase in phases] == [{}, {}]


@pytest.mark.slow
def test_a_branch_keeps_the_held_out_set_of_its_run_without_the_cache(run, tmp_path):
    data = {"cache_dir": str(tmp_path / "cache"), "eval_tokens": 60}
    run("a", 4, web=1, data=data)
    data["eval_tokens"] = 200
    run("b", 40, web=1, data=data, branch_from=f"{tmp_path}/a@4", kill=9)
    shutil.rmtree(tmp_path / "cache")
    run("b", 12, web=1, data=data)
    sound = [scan_folder(tmp_path / name / "checkpoints").sound for name in "ab"]
    assert sound[0][4].eval_set == sound[1][12].eval_set


# --- the documents behind a batch


def test_the_documents_of_a_row_are_those_of_its_tokens(run, texts, tmp_path):
    lines = (texts / "web.jsonl").read_text().splitlines()
    web = {"web": f"text:{texts}/gaps.jsonl", "code": f"text:{texts}/code.jsonl"}
    gaps = [json.dumps({"text": ""}), *lines[:30], json.dumps({"text": ""}), *lines[30:]]
    (texts / "gaps.jsonl").write_text("\n".join(gaps))
    config = run("a", 4, web=0.7, code=0.3, data={"sources": web})
    loaded = Tokenizer.from_file(str(tmp_path / "a/checkpoints/tokenizer.json"))
    _, inputs = find_inputs(config, None, None, None)
    batch = inputs.rows_of(inputs.phases([], 0))(2, slice(None))
    rows = rows_of_batch(config.run_dir, 3)
    assert {row.source for row in rows} == {"web", "code"} and len(rows) == config.batch_size
    for row, tokens in zip(rows, batch["inputs"], strict=True):
        text = "".join(piece.text for piece in row.pieces)
        assert text == loaded.decode(tokens.tolist(), skip_special_tokens=False)
        assert sum(piece.num_tokens for piece in row.pieces) == config.seq_len
        path = texts / ("gaps.jsonl" if row.source == "web" else "code.jsonl")
        of_source = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for piece in row.pieces:
            number = int(re.findall(r"document (\d+) of", piece.place)[0])
            assert piece.text.removesuffix("<|endoftext|>") in of_source[number]
            before = loaded.encode(of_source[number]).ids[: piece.first]
            assert of_source[number].startswith(loaded.decode(before) + piece.text[:5])
    assert rows_of_batch(config.run_dir, 3, 5) == rows[5:6]
    with pytest.raises(ValueError, match="--row: found 8, expected 0 to 7"):
        rows_of_batch(config.run_dir, 3, 8)
    with pytest.raises(ValueError, match="--step: found 5, expected 1 to 4"):
        rows_of_batch(config.run_dir, 5)


@pytest.mark.slow
def test_after_the_cache_is_cleared_the_same_tokens_are_made(run, texts, tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache"), "max_tokens": 2000}
    run("a", 4, web=0.9, code=0.1, data=cache)
    run("a", 8, web=0.2, code=0.5, new=0.3, data=cache)
    before = scan_folder(tmp_path / "a/checkpoints").sound[8].data
    shutil.rmtree(tmp_path / "cache")
    run("a", 12, web=0.2, code=0.5, new=0.3, data=cache)
    assert scan_folder(tmp_path / "a/checkpoints").sound[12].data == before
    config = run("b", 1, web=0.9, code=0.1, data=cache)
    _, data = load_data(config)
    tokens = {name: of.train.num_tokens for name, of in data.sources.items()}
    assert tokens == {"web": 1800, "code": 200}  # each its share of the limit


def test_the_loss_that_decides_is_that_of_all_tokens(run, tmp_path):
    config = run("a", 4, web=1, code=1, data={"eval_tokens": 120})
    row = untimed_rows(tmp_path / "a")[-1]
    _, data = load_data(config)
    sizes = {name: (of.eval.num_tokens - 1, of.eval_bytes) for name, of in data.sources.items()}
    nats = sum(row[f"eval/{name}/loss"] * count for name, (count, _) in sizes.items())
    count, num_bytes = map(sum, zip(*sizes.values(), strict=True))
    assert row["eval/loss"] == pytest.approx(nats / count, rel=1e-9)
    assert row["eval/bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-9)
    metadata = scan_folder(tmp_path / "a/checkpoints").sound[4]
    assert metadata.bits_per_byte == pytest.approx(row["eval/bits_per_byte"], rel=1e-9)


# --- the data of a run is that of its checkpoints


def test_a_name_stands_for_one_corpus(run, texts):
    run("a", 2, web=1, code=1, data={"best_by": "web"})
    run("a", 4, web=1)
    again = {"sources": {"web": f"text:{texts}/web.jsonl", "code": f"text:{texts}/new.jsonl"}}
    with pytest.raises(ValueError, match="whose files are not those of .*code.jsonl, which"):
        run("a", 6, web=1, code=1, data=again)
    run("a", 6, web=1, code=1)


@pytest.mark.slow
def test_a_run_has_one_tokenizer(run, texts, tmp_path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer(["to be or not " * 9], 280).save(str(path))
    given = {"tokenizer": str(path)}
    run("a", 2, web=1, data={**given, "best_by": "web"})
    own = (tmp_path / "a/checkpoints/tokenizer.json").read_bytes()
    train_tokenizer(["if x then y " * 9], 280).save(str(path))  # another one, under its name
    for num_steps, weights in ((4, {"new": 1, "web": 1}), (6, {"web": 1, "code": 3})):
        run("a", num_steps, data=given, **weights)
        assert (tmp_path / "a/checkpoints/tokenizer.json").read_bytes() == own
    path.unlink()
    run("a", 8, web=1, data=given)
    config = run("b", 10, web=1, code=1, data={"tokenizer": "train"}, branch_from=f"{tmp_path}/a@8")
    assert (Path(config.checkpoint_dir) / "tokenizer.json").read_bytes() == own


@pytest.mark.slow
def test_a_branch_sees_the_batches_of_its_run(run, tmp_path):
    bounded = {"cache_dir": str(tmp_path / "cache"), "max_tokens": 2000}
    run("a", 6, web=1, code=1, data=bounded)
    run("a", 8, web=3, code=1, data=bounded)
    shutil.copytree(tmp_path / "a", tmp_path / "whole")
    shutil.copy(tmp_path / "a.batches", tmp_path / "whole.batches")
    run("a", 12, web=3, code=1, data=bounded)
    run("b", 12, web=3, code=1, data=bounded, branch_from=f"{tmp_path}/whole@8")
    sound = [scan_folder(tmp_path / run / "checkpoints").sound[12] for run in "ab"]
    assert sound[0].phases == sound[1].phases and sound[0].data == sound[1].data
    losses = [
        [row["train/loss"] for row in untimed_rows(tmp_path / run) if "train/loss" in row]
        for run in "ab"
    ]
    assert losses[0][8:] == losses[1]


@pytest.mark.slow
def test_damage_before_a_change_of_weights_is_told(run, tmp_path, capsys):
    run("a", 6, web=0.9, code=0.1)
    run("a", 12, web=0.1, code=0.9, kill=11)
    for step in (6, 8):
        damage(tmp_path / "a" / "checkpoints" / str(step))
    capsys.readouterr()
    run("a", 12, web=0.1, code=0.9)
    assert "changed from step 4 on: data.weights: was" in capsys.readouterr().out
    phases = scan_folder(tmp_path / "a/checkpoints").sound[12].phases
    assert [phase["step"] for phase in phases] == [0, 4]


@pytest.mark.slow
def test_a_source_of_weight_0_has_rows_once_it_has_a_weight(run, tmp_path):
    run("a", 2, web=0, code=1)
    run("a", 4, web=1, code=0, new=0)
    run("a", 6, web=0, code=1, new=1)
    phases = scan_folder(tmp_path / "a/checkpoints").sound[6].phases
    assert [phase["shares"] for phase in phases] == [
        {"code": 1, "web": 0}, {"code": 0, "new": 0, "web": 1}, {"code": 1, "new": 1, "web": 0}
    ]  # fmt: skip


def test_files_that_change_under_a_run_are_not_saved_as_its_data(run, texts, tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}

    def rewrite(step: int, row: dict[str, float]) -> None:
        if step == 5:
            (path,) = (tmp_path / "cache").rglob("train-*.bin")
            with open(path, "r+b") as file:  # not cut: the run has mapped it
                file.write(path.read_bytes()[::-1])

    with pytest.raises(RuntimeError, match="train-00000.bin has changed since this start"):
        run("a", 8, web=1, data=cache, callbacks=[rewrite])
    assert max(scan_folder(tmp_path / "a/checkpoints").sound) == 4


def test_a_bit_that_flips_on_the_disk_is_found_during_the_run(run, texts, tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}

    def wait(step: int, row: dict[str, float]) -> None:
        if step == 2:
            for thread in threading.enumerate():
                if thread.name == "verification":
                    thread.join()

    run("a", 4, web=1, data=cache, callbacks=[wait])
    (path,) = (tmp_path / "cache").rglob("train-*.bin")
    content = bytearray(path.read_bytes())
    content[99] ^= 1
    path.write_bytes(content)
    # As for a bit that the file system knows nothing of.
    manifest = read_json(path.parent / dataset.MANIFEST, dataset.Manifest)
    stamps = [dataset._stamp(path.parent, record) for record in dataset.records_of(manifest)]
    dataset.checked_path(path.parent).write_text(json.dumps(stamps))
    with pytest.raises(RuntimeError, match="train-00000.bin has crc32c .*prepares it again"):
        run("a", 8, web=1, data=cache, callbacks=[wait])
    assert max(scan_folder(tmp_path / "a/checkpoints").sound) == 4


def test_held_out_sets_are_found_without_their_files(run, texts, tmp_path):
    path = texts / "kept.jsonl"
    path.write_text((texts / "new.jsonl").read_text())
    more = {"held_out": {"kept": f"text:{path}"}}
    run("a", 4, web=1, data=more)
    loss = untimed_rows(tmp_path / "a")[-1]["eval/kept/loss"]
    path.unlink()
    assert score([str(tmp_path / "a")])[0].as_recorded
    run("a", 8, web=1, data=more)
    assert untimed_rows(tmp_path / "a")[-1]["eval/kept/loss"] < loss
    both = {"sources": {"web": f"text:{texts}/web.jsonl", "kept": f"text:{path}"}}
    with pytest.raises(ValueError, match="found kept, which was a held-out set up to step 8"):
        run("a", 12, web=1, kept=1, data=both)
