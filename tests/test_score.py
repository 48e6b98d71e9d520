"""Checkpoints judged from outside: what is told of them is so, and how sure it is."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import text_run
from flax import nnx
from scipy import stats

from jaxlm import __main__ as cli
from jaxlm import load_model
from jaxlm.checkpoints import restore, verify
from jaxlm.checkpoints.folder import read_metadata, select
from jaxlm.checkpoints.manifest import write_manifest
from jaxlm.checkpoints.verify import verify_step
from jaxlm.corpus import overlap
from jaxlm.data import shards as shards_lib
from jaxlm.data.run_data import load_data
from jaxlm.data.shards import TokenShards, map_tokens
from jaxlm.device.likelihood import make_token_scores
from jaxlm.device.sharding import make_mesh
from jaxlm.evaluation.by_document import document_sums
from jaxlm.evaluation.paired import paired_difference
from jaxlm.evaluation.score import Scorer, score
from jaxlm.inference.load import restore_params
from jaxlm.training.inputs import held_out_batches
from jaxlm.training.setup import hold_out

NUM_TRIALS = 4000


def sums_of(rng: np.random.Generator, num_batches: int, gap: float) -> list[np.ndarray]:
    """Two checkpoints on batches that are hard or easy for both, the last one short."""
    tokens = np.full(num_batches, 100.0)
    tokens[-1] = 30
    hard = rng.normal(3, 0.5, num_batches)
    noise = (rng.gamma(4, 1 / 4, num_batches) - 1) * 0.02 / np.sqrt(tokens / 100)  # skewed
    losses = [(hard + gap + noise) * tokens, hard * tokens]
    return [np.stack([total, tokens], axis=1) for total in losses]


def coverage(num_batches: int, margin: Any = None) -> float:
    """The share of intervals that hold the true gap; `margin` replaces the interval's own."""
    rng, gap, held = np.random.default_rng(0), 0.01, 0
    for _ in range(NUM_TRIALS):
        a, b = sums_of(rng, num_batches, gap)
        found = paired_difference(a, b)
        half = (found.high - found.low) / 2 if margin is None else margin(a, b, found)
        held += abs(found.mean - gap) <= half
    return held / NUM_TRIALS


@pytest.mark.parametrize("num_batches", [5, 40, 200])
def test_95_of_100_intervals_hold_the_true_difference(num_batches: int) -> None:
    assert coverage(num_batches) == pytest.approx(0.95, abs=0.025)


def test_other_intervals_would_not() -> None:
    """The negative control: normal quantiles on few batches, and losses that are not paired."""

    def normal(a: np.ndarray, b: np.ndarray, found: Any) -> float:
        return (found.high - found.low) / 2 * 1.96 / stats.t.ppf(0.975, len(a) - 1)

    def unpaired(a: np.ndarray, b: np.ndarray, found: Any) -> float:
        means = [sums[:, 0] / sums[:, 1] for sums in (a, b)]
        return 1.96 * np.sqrt(sum(x.var(ddof=1) / len(x) for x in means))

    assert coverage(5, normal) < 0.91
    assert coverage(40, unpaired) == 1  # far too wide to tell anything


def test_the_difference_is_that_of_the_two_losses() -> None:
    rng = np.random.default_rng(1)
    a, b = (np.stack([rng.gamma(9, 10, 30), rng.integers(1, 100, 30)], axis=1) for _ in range(2))
    b[:, 1] = a[:, 1]
    losses = [sums[:, 0].sum() / sums[:, 1].sum() for sums in (a, b)]
    assert paired_difference(a, b).mean == pytest.approx(losses[0] - losses[1])
    unweighted = np.mean(a[:, 0] / a[:, 1]) - np.mean(b[:, 0] / b[:, 1])
    assert paired_difference(a, b).mean != pytest.approx(unweighted, rel=0.01)
    # Equal batches: the textbook interval of paired differences.
    a[:, 1] = b[:, 1] = 50
    expected = stats.ttest_rel(a[:, 0] / 50, b[:, 0] / 50).confidence_interval(0.95)
    found = paired_difference(a, b)
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_the_verdict() -> None:
    a, b = sums_of(np.random.default_rng(0), 40, 0.05)
    assert [paired_difference(*pair).better for pair in ((a, b), (b, a), (a, a))] == [1, 0, None]
    with pytest.raises(ValueError, match="found 1 batches .* expected at least 2"):
        paired_difference(a[:1], b[:1])


def test_the_recorded_loss_to_the_bit(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shared_home)
    losses = text_run.eval_losses(Path(text_run.RUN))
    found = score([f"{text_run.RUN}@{step}" for step in losses])
    assert [one.loss for one in found] == list(losses.values())
    assert all(one.as_recorded and not one.differences for one in found)
    near = found[0]._replace(recorded_loss=found[0].loss * (1 + 1e-12))
    assert not near.as_recorded and near._replace(differences=["x"]).as_recorded
    assert not near._replace(differences=["x"], recorded_loss=found[0].loss * 1.01).as_recorded


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_devices(
    shared_home: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.chdir(shared_home)
    devices = jax.devices()[:count]
    monkeypatch.setattr(jax, "device_count", lambda: count)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    (found,) = score([text_run.RUN])
    assert found.loss == pytest.approx(text_run.eval_losses(Path(text_run.RUN))[8], rel=1e-5)
    assert found.as_recorded and any("mesh.data: was 8, is" in what for what in found.differences)


def like_tiny(name: str, **config: Any) -> str:
    """A run that says of its best checkpoint that it was made with another config."""
    run = Path(shutil.copytree(text_run.RUN, f"runs/{name}"))
    path = run / "checkpoints" / str(text_run.BEST)
    metadata = read_metadata(path.parent, text_run.BEST)
    data = {**metadata.config["data"], **config.pop("data", {})}
    metadata = replace(metadata, config={**metadata.config, **config, "data": data})
    _, found = load_data(metadata.run_config())
    fingerprint = found.first.fingerprint
    metadata = replace(metadata, data=found.prepared, eval_set=f"main {fingerprint}")
    (path / "meta" / "metadata").write_text(json.dumps(metadata.to_json()))
    write_manifest(path)
    return str(run)


@pytest.mark.slow
def test_pairs_without_common_batches_are_refused(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_home)
    said = "runs/tiny@best and runs/{}@best differ in {}, so they have no batches in common"
    short = like_tiny("short", seq_len=16)
    with pytest.raises(ValueError, match=said.format("short", "seq_len")):
        score([text_run.RUN, short], paired=True)
    fewer = like_tiny("fewer", data={"eval_tokens": 600})
    with pytest.raises(ValueError, match=said.format("fewer", ".*held-out set")):
        score([text_run.RUN, fewer], paired=True)
    # Batches of another size are no hindrance.
    small = like_tiny("small", batch_size=4)
    sums = [one.sums for one in score([text_run.RUN, small], paired=True)]
    assert np.array_equal(*sums) and len(score([small])[0].sums) == 2 * len(sums[0])


def test_other_data_than_that_of_the_run_is_refused(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_home)
    monkeypatch.setenv("JAXLM_CACHE", str(own_home / "cache"))  # where nothing is prepared
    (own_home / "texts" / "01.txt").write_text("other words in what is held out " * 99)
    with pytest.raises(ValueError, match="found data .*, expected that of the run, .*--source"):
        score([text_run.RUN])


@pytest.mark.slow
def test_all_of_a_source_is_scored_and_what_was_trained_on_is_said(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.chdir(own_home)
    monkeypatch.setenv("JAXLM_CACHE", str(own_home / "cache"))
    (unknown,) = score([text_run.RUN], source="text:texts/*.txt")
    assert any("is not compared with these documents" in line for line in lines)
    score([text_run.RUN])  # prepares the run's own data
    lines.clear()
    (whole,) = score([text_run.RUN], source="text:texts/*.txt")
    (part,) = score([text_run.RUN], source="text:texts/*.txt", held_out=True)
    assert whole.sums.tolist() == unknown.sums.tolist() and part.num_tokens < whole.num_tokens / 9
    assert part.source == "text:texts/*.txt, held out" and whole.source == "text:texts/*.txt"
    said = [line for line in lines if "the training data of" in line]
    assert re.search(r"holds (\d+) of these (\d+) documents \(.* of [\d,]+ tokens\)", said[0])
    (own_home / "new.txt").write_text("one document of words that no run has seen")
    lines.clear()
    (one,) = score([text_run.RUN], source="text:new.txt")
    assert one.num_tokens > 5 and not any("training data of" in line for line in lines)
    with pytest.raises(ValueError, match="held_out: found no source"):
        score([text_run.RUN], held_out=True)


def test_documents_in_common_are_found_across_chunks_and_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(1, 50, rng.integers(1, 9)).tolist(), 0] for _ in range(60)]
    documents[3] = documents[12]  # twice in what is held out
    monkeypatch.setattr(shards_lib, "_CHUNK_TOKENS", 7)

    def shards(name: str, chosen: list[list[int]]) -> TokenShards:
        tokens = np.concatenate(chosen).astype("<u2")
        paths = [tmp_path / f"{name}{n}" for n in (0, 1)]
        for path, part in zip(paths, np.array_split(tokens, 2), strict=True):
            part.tofile(path)
        return TokenShards([map_tokens(path, "<u2") for path in paths])

    found = overlap.find_overlap(shards("a", documents[:20]), [shards("b", documents[10:])], 0)
    train = {tuple(document) for document in documents[10:]}
    expected = [document for document in documents[:20] if tuple(document) in train]
    assert found.num_documents == len(expected) >= 11
    assert found.num_tokens == sum(map(len, expected)) and found.of_documents == 20


@pytest.mark.slow
def test_checkpoints_of_different_tokenizers_are_compared_by_document(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(own_home)
    small = "--run_dir runs/small --model.vocab_size 300 --num_steps 4"
    assert text_run.launched(own_home, small)[0] == 0
    runs = [text_run.RUN, "runs/small"]
    found = score(runs, source="text:texts/0*.txt", paired=True)
    texts = [path.read_text() for path in sorted(Path("texts").glob("0*.txt"))]
    for one in found:
        assert one.unit == "bits per byte" and len(one.sums) == len(texts) - 1
        assert {*one.sums[:, 1]} < {*map(len, texts)}
        bits, num_bytes = one.sums.sum(axis=0)
        assert bits / num_bytes == pytest.approx(one.bits_per_byte, rel=0.02)
    np.testing.assert_array_equal(found[0].sums[:, 1], found[1].sums[:, 1])
    difference = paired_difference(*(one.sums for one in found))
    assert difference.num_parts == 9 and difference.better == 0  # it was trained for longer
    assert cli.command(["eval", *runs, "--source", "text:texts/0*.txt", "--paired"]) == 0
    said = capsys.readouterr().out
    assert f"difference: {difference.mean:+.5f} bits per byte" in said and "9 documents" in said


def test_the_loss_of_each_document_is_that_of_its_tokens(
    shared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the logits of windows, token by token."""
    monkeypatch.chdir(shared_home)
    scorer = Scorer("text:texts/0*.txt")
    (dataset,) = scorer.find(text_run.RUN).datasets
    model, metadata = load_model(text_run.RUN)
    config = metadata.run_config()
    mesh = make_mesh(config.mesh)
    held_out = hold_out(config, mesh, held_out_batches(config, dataset))
    blueprint, params = restore_params(select(text_run.RUN), mesh)
    scores = make_token_scores(blueprint, mesh, None)
    found = document_sums(dataset, held_out.put, held_out.num_batches, scores, params)
    ids = dataset.eval.read(0, dataset.eval.num_tokens).astype(int)
    windows = np.zeros((-(-(len(ids) - 1) // config.seq_len), config.seq_len), int)
    windows.ravel()[: len(ids) - 1] = ids[:-1]
    logits = np.asarray(nnx.jit(lambda model, x: model(x))(model, windows), np.float64).reshape(
        windows.size, -1
    )
    bits = [0.0]
    for row, target in zip(logits, ids[1:], strict=False):
        bits[-1] += (np.log(np.exp(row).sum()) - row[target]) / np.log(2)
        if target == dataset.eos_id:
            bits.append(0.0)
    np.testing.assert_allclose(found.sums[:, 0], bits[1:-1], rtol=1e-4)


# --- verification, while a trainer is at work


def test_a_changed_array_is_found_behind_a_sound_manifest(
    shared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def altered(path: Path, items: tuple[str, ...]) -> dict[str, Any]:
        arrays = whole(path, items)
        if "params" in arrays:
            embedding = arrays["params"]["embedding_VD"] = arrays["params"]["embedding_VD"].copy()
            embedding.view(np.uint32)[3, 5] ^= 1
        return arrays

    whole = restore.restore_numpy
    folder = shared_home / text_run.RUN / "checkpoints"
    assert verify_step(folder, 8) == []
    monkeypatch.setattr(restore, "restore_numpy", altered)
    assert verify_step(folder, 8) == ["params/embedding_VD differs from what was saved"]


def test_a_step_deleted_or_replaced_meanwhile_is_no_damage(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_home / text_run.RUN / "checkpoints"
    find_damage, whole = verify.find_damage, own_home / "whole"
    shutil.copytree(folder / "8", whole)
    looks: list[Path] = []

    def look(path: Path) -> list[str]:
        looks.append(path)
        shutil.rmtree(path / "params", ignore_errors=True)  # a trainer has begun
        found = find_damage(path)
        if len(looks) == 1:
            shutil.rmtree(path)
            if path.name == "8":
                shutil.copytree(whole, path)
                monkeypatch.setattr(verify, "find_damage", find_damage)
        return found

    monkeypatch.setattr(verify, "find_damage", look)
    assert verify_step(folder, 4) is None
    looks.clear()
    assert verify_step(folder, 8) == []
    (folder / "8" / "params" / "_METADATA").unlink()
    assert verify_step(folder, 8) == ["params/_METADATA: missing"]
