"""Sampling: the cache changes nothing, and tokens are chosen as it says."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import MODEL, blueprint_of, transformer

from jaxlm.config import ModelConfig
from jaxlm.device.decode import Knobs, Rule, candidates, choose, make_programs
from jaxlm.device.kv_cache import make_cache
from jaxlm.device.model import Transformer
from jaxlm.inference.sample import Sampling, sample, stream

B, T, S = 2, 12, 16
TOKENS_BT = np.random.RandomState(0).randint(0, 32, (B, T)).astype(np.int32)
PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(19)), [2, 7]]
GREEDY = Sampling(max_tokens=20, temperature=0)
VARIANTS = [
    MODEL,
    dataclasses.replace(MODEL, num_layers=1, qk_norm=True, tie_embeddings=True, remat="full"),
]
ONE_LAYER = dataclasses.replace(MODEL, num_layers=1)


@functools.cache
def model_of(config: ModelConfig = ONE_LAYER) -> Transformer:
    return transformer(config)


@nnx.jit
def extend(model: Any, tokens: Any, cache: Any, positions: Any) -> Any:
    x, cache = model.hidden(tokens, cache=cache, positions_BT=positions)
    return model.readout()(x), cache


def cached_logits(model: Transformer, sizes: list[int], shift: int = 0) -> np.ndarray:
    """Logits [B, T, V] by calls of so many tokens each; `shift` puts the later ones elsewhere."""
    cache, at, found = make_cache(model.config, B, S, jnp.dtype("float32")), 0, []
    for size in sizes:
        times = np.arange(at, at + size, dtype=np.int32) + (shift if at else 0)
        positions = np.broadcast_to(times, (B, size))
        logits, cache = extend(model, TOKENS_BT[:, at : at + size], cache, positions)
        found.append(logits)
        at += size
    assert at == T
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("config", VARIANTS)
def test_cached_decoding_is_the_full_forward_at_every_position(config: ModelConfig):
    model = model_of(config)
    expected = nnx.jit(lambda model: model(TOKENS_BT))(model)
    for sizes in ([1] * T, [5, *[1] * 7], [1, 5, 5, 1]):
        np.testing.assert_allclose(cached_logits(model, sizes), expected, rtol=1e-5, atol=1e-5)
    wrong = cached_logits(model, [5, *[1] * 7], shift=1)
    assert np.abs(wrong - expected)[:, :5].max() < 1e-5
    assert np.abs(wrong - expected)[:, 5:].max(axis=(0, 2)).min() > 1e-3


@nnx.jit
def forward(model: Any, tokens: Any) -> Any:
    return model(tokens)


def greedy_by_hand(model: Any, prompt: list[int], num_tokens: int, eos_id: int = -1) -> list[int]:
    """By full forwards of a length that is always the same."""
    row = list(prompt)
    while len(row) < len(prompt) + num_tokens and eos_id not in row[len(prompt) :]:
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(row)] = row
        row.append(int(np.argmax(forward(model, padded)[0, len(row) - 1])))
    return row[len(prompt) :]


def test_prompts_of_any_length_give_in_a_batch_what_they_give_alone():
    model = model_of()
    together = sample(model, PROMPTS, GREEDY)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,) = sample(model, [prompt], GREEDY)
        assert found.tolist() == alone.tolist() == greedy_by_hand(model, prompt, 20)
    assert len({tuple(row) for row in together}) == len(PROMPTS)


def test_padding_that_is_seen_is_found(monkeypatch: pytest.MonkeyPatch):
    seen = make_programs.__wrapped__
    monkeypatch.setattr("jaxlm.device.decode.NOWHERE", 0)
    monkeypatch.setattr("jaxlm.inference.sample.make_programs", seen)
    (found,) = sample(model_of(), [PROMPTS[0]], GREEDY)
    assert found.tolist() != greedy_by_hand(model_of(), PROMPTS[0], 20)


@pytest.mark.slow
def test_a_row_is_sampled_alone_as_in_a_batch_at_the_same_row():
    sampling = Sampling(max_tokens=20, seed=3)
    together = sample(model_of(), PROMPTS, sampling)
    (alone,) = sample(model_of(), PROMPTS[:1], sampling)
    assert alone.tolist() == together[0].tolist()


def test_a_row_ends_at_eos_and_the_others_go_on():
    whole = sample(model_of(), PROMPTS, GREEDY)
    eos_id = int(whole[2][4])
    found = sample(model_of(), PROMPTS, GREEDY, eos_id=eos_id)
    for row, full in zip(found, whole, strict=True):
        ends = np.flatnonzero(full == eos_id)
        stop = ends[0] + 1 if len(ends) else 20
        assert row.tolist() == full[:stop].tolist()
    assert len(found[2]) <= 5 < max(map(len, found))
    steps = list(stream(model_of(), PROMPTS[2:3] * 4, GREEDY, eos_id=eos_id))
    assert len(steps) == len(found[2])  # nothing is made after the last end


def test_the_same_seed_gives_the_same_tokens():
    def tokens(seed: int, **rule: Any) -> list[list[int]]:
        sampling = Sampling(max_tokens=20, seed=seed, **rule)
        return [row.tolist() for row in sample(model_of(), PROMPTS[2:3] * 4, sampling)]

    assert tokens(1) == tokens(1) != tokens(2)
    assert len({tuple(row) for row in tokens(1)}) == 4  # rows differ
    greedy = [row.tolist() for row in sample(model_of(), PROMPTS[2:3] * 4, GREEDY)]
    for rule in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert tokens(1, **rule) == greedy


LOGITS_V = np.random.RandomState(1).randn(32).astype(np.float32) * 2


def distribution(temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """The definition, in float64."""
    order = np.argsort(-LOGITS_V)
    probs = np.exp(LOGITS_V.astype(np.float64) / temperature)
    probs[order[top_k or 32 :]] = 0
    probs /= probs.sum()
    if top_p is not None:
        count = next(n for n in range(1, 33) if probs[order[:n]].sum() >= top_p or n == 32)
        probs[order[count:]] = 0
    return probs / probs.sum()


CASES = [(1.0, None, None), (0.7, 5, None), (1.5, None, 0.8), (2.0, 8, 0.5), (1.0, 99, 0.1)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_tokens_follow_the_distribution(temperature: float, top_k: Any, top_p: Any):
    rows, rule = 20_000, Rule(top_k=top_k, use_top_p=top_p is not None)
    knobs = Knobs(np.uint32(0), np.float32(temperature), np.float32(top_p or 1))
    few = jax.jit(candidates, static_argnums=1)
    scaled, tokens = few(jnp.asarray(LOGITS_V)[None], rule, knobs.temperature, knobs.top_p)
    found = np.zeros(32)
    found[np.asarray(tokens[0])] = jax.nn.softmax(scaled[0])
    expected = distribution(temperature, top_k, top_p)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)

    logits = jnp.broadcast_to(jnp.asarray(LOGITS_V)[None], (rows, 32))
    counts = np.bincount(jax.jit(choose, static_argnums=1)(logits, rule, knobs, 0), minlength=32)
    error = np.abs(counts / rows - expected)
    assert (error <= 5 * np.sqrt(expected / rows)).all()  # 0 where the probability is 0
    other = distribution(temperature * 1.5, top_k, top_p)
    assert (expected.max() == 1) or (np.abs(other - expected) > 5 * np.sqrt(expected / rows)).any()


@pytest.mark.slow
def test_the_same_tokens_on_eight_devices():
    prompts = PROMPTS[:3]  # three rows are not for four groups of devices
    blueprint = blueprint_of((2, 2, 2), functools.partial(Transformer, ONE_LAYER))
    params = nnx.to_pure_dict(nnx.state(model_of()))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, blueprint.abstract.params)
    model = nnx.merge(blueprint.graphdef, jax.device_put(params, shardings))
    found = sample(model, prompts, GREEDY)
    expected = [greedy_by_hand(model_of(), prompt, 20) for prompt in prompts]
    assert [row.tolist() for row in found] == expected


def test_few_programs_are_compiled():
    before = make_programs.cache_info().misses
    for prompts, seed in ((PROMPTS[:2], 0), ([[1] * 9, [2] * 16], 1), ([[5], [6]], 2)):
        of_seed = Sampling(max_tokens=12, seed=seed, temperature=1 + seed, top_k=9)
        sample(model_of(), prompts, of_seed)
    programs = make_programs(nnx.split(model_of())[0], None, Rule(top_k=9))
    sizes = [program._cache_size() for program in programs]  # pyright: ignore
    assert make_programs.cache_info().misses == before + 1 and sizes == [1, 1]


def test_a_model_of_documents_does_not_see_those_before():
    model = transformer(dataclasses.replace(ONE_LAYER, document_mask=True))
    (found,) = sample(model, [[4, 8, 0, 3, 1]], GREEDY, eos_id=0)
    (alone,) = sample(model, [[3, 1]], GREEDY, eos_id=0)
    (end,) = sample(model, [[4, 8, 0]], GREEDY, eos_id=0)
    assert found.tolist() == alone.tolist() and len(end)
    across = greedy_by_hand(model_of(), [4, 8, 0, 3, 1], 20, eos_id=0)
    assert across != alone.tolist()


@pytest.mark.slow
def test_bfloat16_gives_the_tokens_of_its_own_full_forward():
    model = transformer(ONE_LAYER, dtype="bfloat16")
    (found,) = sample(model, [[3, 1, 4]], GREEDY)
    assert found[:6].tolist() == greedy_by_hand(model, [3, 1, 4], 6)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "prompts: found an empty one, or none"),
        ([[1], []], {}, "prompts: found an empty one"),
        ([[1, 32]], {}, "found ids 1 to 32, expected 0 to 31"),
        ([[1] * 5], {"max_tokens": 6}, "5 tokens and 6 new ones are 11, .* at most 10, .* to 5 or"),
        ([[1] * 10], {}, "10 tokens and 1 new ones are 11, .*; shorten the prompt$"),
        ([[1]], {"max_tokens": 0}, "max_tokens: found 0, expected at least 1"),
        ([[1]], {"temperature": -1.0}, "temperature: found -1.0, expected 0, or"),
        ([[1]], {"temperature": 1e-46}, "temperature: found 1e-46, expected 0, or 1e-4 to 1e4"),
        ([[1]], {"temperature": float("nan")}, "temperature: found nan"),
        ([[1]], {"top_k": 0}, "top_k: found 0, expected at least 1"),
        ([[1]], {"top_p": 0.0}, "top_p: found 0.0, expected above 0 and at most 1"),
        ([[1]], {"seed": -1}, "seed: found -1, expected 0 to"),
    ],
)
def test_refused_before_anything_is_compiled(prompts: Any, changes: Any, message: str):
    before = make_programs.cache_info()
    with pytest.raises(ValueError, match=message):
        sample(model_of(), prompts, Sampling(**changes), seq_len=10)
    assert make_programs.cache_info() == before


def test_what_fills_the_context_is_not_refused():
    found = sample(model_of(), [[1] * 5] * 2, Sampling(top_k=9), seq_len=10)
    assert [len(row) for row in found] == [5, 5]
