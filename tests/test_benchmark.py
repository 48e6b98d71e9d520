"""What lm-eval is told of a checkpoint is what the model's logits say, token by token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import text_run
from flax import nnx

from jaxlm import __main__ as cli
from jaxlm import load_model
from jaxlm.inference.reader import Likelihood, ScoringModel

SEQ_LEN = 32


@pytest.fixture(scope="module")
def reader(shared_home: Path) -> ScoringModel:
    with text_run.working_in(shared_home):
        return ScoringModel.of_run(text_run.RUN)


@pytest.fixture(scope="module")
def model(shared_home: Path):
    graphdef, params = nnx.split(load_model(str(shared_home / text_run.RUN))[0])
    forward = jax.jit(lambda tokens_BT: nnx.merge(graphdef, params)(tokens_BT))

    def logits_TV(tokens: list[int]) -> np.ndarray:
        padded_BT = np.zeros((1, SEQ_LEN), np.int32)
        padded_BT[0, : len(tokens)] = tokens
        return np.asarray(forward(padded_BT), np.float64)[0, : len(tokens)]

    return logits_TV


def direct(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One row as it is, log-softmax in float64 on the host, one target after the other."""
    total, greedy = 0.0, True
    row = [*context, *continuation][-SEQ_LEN - 1 :]
    logits_TV = model(row[:-1])
    for at in range(len(row) - 1 - len(continuation), len(row) - 1):
        logits_V, target = logits_TV[at], row[at + 1]
        total += logits_V[target] - np.log(np.exp(logits_V).sum())
        greedy &= int(logits_V.argmax()) == target
    return total, greedy


def some_pairs() -> list[tuple[list[int], list[int]]]:
    """Of all lengths, in no order; some too long for the model."""
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (1, 32), (3, 2), (15, 2), (16, 1), (40, 5), (31, 1), (32, 1), (5, 28)]
    sizes += [tuple(rng.integers(1, 20, 2)) for _ in range(12)]
    return [tuple(rng.integers(0, 512, n).tolist() for n in pair) for pair in sizes]


def same(found: list[Likelihood], expected: list[tuple[float, bool]]) -> bool:
    close = np.allclose([x.logprob for x in found], [x[0] for x in expected], rtol=1e-5, atol=1e-5)
    return close and [x.is_greedy for x in found] == [x[1] for x in expected]


def test_likelihoods_are_those_of_the_logits(reader: ScoringModel, model) -> None:
    pairs = some_pairs()
    for context in ([7], list(range(20))):  # and some whose continuation is the greedy one
        (new,) = reader.continue_greedily([context], 3, lambda _: False)
        pairs.append((context, new))
    counts: list[int] = []
    found = reader.likelihoods(pairs, counts.append)
    expected = [direct(model, *pair) for pair in pairs]
    assert same(found, expected) and sum(counts) == len(pairs)
    assert [x.is_greedy for x in found[-2:]] == [True, True]
    assert not all(x.is_greedy for x in found)
    # The controls: a target too early, a context uncut on the other side, another order.
    shifted = [(c[:-1], [c[-1], *t]) if len(c) > 1 else (c, t) for c, t in pairs]
    assert not same(reader.likelihoods([(c, t[:-1] or t) for c, t in shifted]), expected)
    assert not same(reader.likelihoods([(c[:20], t) for c, t in pairs]), expected)
    assert not same(found[::-1], expected)


def test_few_programs_are_compiled(reader: ScoringModel) -> None:
    pairs = [([1] * n, [2]) for n in range(1, 33)]
    reader.likelihoods(pairs)
    assert reader._token_scores._cache_size() <= 2  # padded to 16 and 32


def test_what_cannot_be_scored_is_refused(reader: ScoringModel, shared_home: Path) -> None:
    for pair in (([], [1]), ([1], []), ([1], [1] * 33)):
        with pytest.raises(ValueError, match="expected 1 to 32"):
            reader.likelihoods([pair])
    with pytest.raises(ValueError, match="max_gen_toks: found 32, expected 1 to 31"):
        reader.continue_greedily([[1]], 32, lambda _: False)
    with pytest.raises(ValueError, match="batch_size: found 0, expected at least 1"):
        ScoringModel.of_run(f"{shared_home}/{text_run.RUN}", batch_size=0)


def test_greedy_tokens_are_those_of_the_model_row_by_row(reader: ScoringModel, model) -> None:
    prompts = [[5], list(range(25)), list(range(100, 160))]
    found = reader.continue_greedily(prompts, 6, lambda new: len(new) == 4)
    for prompt, new in zip(prompts, found, strict=True):
        row = prompt[6 - SEQ_LEN :]
        for token in new:
            assert int(model(row)[-1].argmax()) == token
            row = [*row, token]
        assert 0 < len(new) <= 4
    assert found != reader.continue_greedily([p[:-1] or [6] for p in prompts], 6, lambda _: False)


def test_greedy_text_ends_with_the_document(reader: ScoringModel, monkeypatch) -> None:
    (new,) = reader.continue_greedily([[5]], 6, lambda _: False)
    monkeypatch.setattr(reader, "eos_id", new[2])
    assert reader.continue_greedily([[5]], 6, lambda _: False) == [new[: new.index(new[2])]]


def test_a_run_on_batches_of_its_own_has_no_text(own_home: Path) -> None:
    path = own_home / text_run.RUN / "checkpoints" / str(text_run.BEST)
    (path / "meta/metadata").write_text(
        json.dumps(json.loads((path / "meta/metadata").read_text()) | {"eos_id": None})
    )
    (path / text_run.manifest.NAME).unlink()
    text_run.manifest.write_manifest(path)
    with pytest.raises(ValueError, match="found no tokenizer, since the run was trained on custom"):
        ScoringModel.of_run(str(own_home / text_run.RUN))


# --- through lm-eval

TASKS = {
    "choice": """
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "generate": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{greedy}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 5}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture
def task_home(own_home: Path, reader: ScoringModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="no lm-eval")
    monkeypatch.chdir(own_home)
    (own_home / "tasks").mkdir()
    text = (own_home / "texts/00.txt").read_text()
    encode, decode = reader.tokenizer.encode, reader.tokenizer.decode
    docs = []
    for number, prompt in enumerate([text[:50].strip(), "tain or", ""]):
        tokens = encode(prompt).ids or [reader.eos_id]
        (new,) = reader.continue_greedily([tokens], 5, lambda _: False)
        docs.append({"text": prompt, "choices": [" en", " or no"], "answer": number % 2})
        docs[-1] |= {"greedy": decode(new), "long": text[: 40 + 400 * number]}
    (own_home / "tasks/docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 1}}\n"
        head += "dataset_kwargs: {data_files: {test: tasks/docs.jsonl}}\n"
        (own_home / f"tasks/{name}.yaml").write_text(head + body)
    return own_home


def benchmark(home: Path, names: str, code: int = 0, run: str = text_run.RUN) -> dict | str:
    """In a process of its own, since lm-eval warns, with the Hub off."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxlm", "benchmark", run, "--tasks", names]
        + ["--include-path", "tasks", "--json"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HOME": str(home), "HF_HOME": str(home / "hf")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code else json.loads(done.stdout)


@pytest.mark.slow
def test_local_tasks_give_what_the_model_gives(
    task_home: Path, reader: ScoringModel, model
) -> None:
    found = benchmark(task_home, "choice,rolling,generate")
    assert found["step"] == text_run.BEST and list(found["tasks"]) == [
        "choice",
        "rolling",
        "generate",
    ]
    docs = list(map(json.loads, (task_home / "tasks/docs.jsonl").read_text().splitlines()))

    def encode(text: str) -> list[int]:
        return reader.tokenizer.encode(text).ids

    right = 0
    for doc in docs:
        scores = []
        for choice in doc["choices"]:
            context = encode(doc["text"])
            whole = encode(doc["text"] + choice)
            scores.append(direct(model, context or [reader.eos_id], whole[len(context) :])[0])
        right += int(np.argmax(scores)) == doc["answer"]
    assert found["tasks"]["choice"]["acc,none"] == pytest.approx(right / 3)

    total, words = 0.0, 0
    for doc in docs:  # windows by hand: as many full ones as there are, then one that ends the text
        tokens = encode(doc["long"])
        full = min(SEQ_LEN, len(tokens))
        total += direct(model, [reader.eos_id], tokens[:full])[0]
        for start in range(full, len(tokens), SEQ_LEN):
            part = tokens[start : start + SEQ_LEN]
            total += direct(model, tokens[:start], part)[0]
        words += len(doc["long"].split())
    expected = np.exp(-total / words)
    assert found["tasks"]["rolling"]["word_perplexity,none"] == pytest.approx(expected, rel=1e-4)
    assert found["tasks"]["generate"]["exact_match,none"] == 1
    assert found["tasks"]["generate"]["samples"] == 3


@pytest.mark.slow
def test_a_task_that_is_nowhere_is_refused_with_names_like_it(task_home: Path) -> None:
    said = benchmark(task_home, "choise", code=1)
    assert "tasks: found choise, expected the name of a task" in said
    assert "did you mean choice" in said


def test_without_lm_eval_it_says_what_to_install(
    shared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shared_home)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"jaxlm benchmark: needs the extra lm-eval \("):
        cli.command(["benchmark", text_run.RUN, "--tasks", "x"])
