from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.device.loss import cross_entropy, next_token_loss, segments

B, T, V, EOS = 3, 5, 17, 0
rng = np.random.RandomState(0)
LOGITS = jnp.asarray(4 * rng.randn(B, T, V), jnp.float32)
TARGETS = jnp.asarray(rng.randint(0, V, (B, T)), jnp.int32)
BATCH = {"inputs": TARGETS, "targets": TARGETS}


def test_cross_entropy_is_that_of_optax_in_value_and_gradient():
    reference = optax.softmax_cross_entropy_with_integer_labels

    @partial(jax.jit, static_argnums=0)
    def value_and_grad(of: Any, targets: jax.Array) -> Any:
        value, pullback = jax.vjp(lambda x: of(x, targets), LOGITS)
        return value, *pullback(jnp.ones_like(value))

    found, expected = value_and_grad(cross_entropy, TARGETS), value_and_grad(reference, TARGETS)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    shifted, _ = value_and_grad(cross_entropy, jnp.roll(TARGETS, 1, axis=1))
    assert not np.allclose(shifted, expected[0], rtol=1e-2)


def test_the_cross_entropy_has_second_derivatives():
    logits_1TV, targets_1T = jnp.arange(6.0).reshape(1, 2, 3), jnp.array([[2, 0]])

    def loss(logits_1TV: jax.Array) -> jax.Array:
        return cross_entropy(logits_1TV, targets_1T)

    p = jax.nn.softmax(logits_1TV[0, 0])
    found = jax.jit(jax.hessian(loss))(logits_1TV)[0, 0, 0, 0, :, 0, 0]
    np.testing.assert_allclose(found, jnp.diag(p) - jnp.outer(p, p), rtol=1e-5, atol=1e-7)


def test_the_gradient_needs_no_scatter():
    ours, reference = (
        jax.jit(jax.grad(lambda x, of=of: of(x, TARGETS).sum())).lower(LOGITS).as_text()
        for of in (cross_entropy, optax.softmax_cross_entropy_with_integer_labels)
    )
    assert "scatter" not in ours and "scatter" in reference


@jax.jit
def sums_with_z(logits: jax.Array) -> Any:
    return next_token_loss(z_loss=0.1)(lambda *_: logits, BATCH)[0]


def test_z_loss_is_the_squared_log_normalizer():
    z = np.log(np.exp(np.asarray(LOGITS, np.float64)).sum(-1))
    np.testing.assert_allclose(sums_with_z(LOGITS)["z_loss"], 0.1 * (z**2).sum(), rtol=1e-4)
    assert np.abs(z).min() > 0.1  # else it would show nothing

    # d (z^2) / d logits = 2 z softmax, whose sum over V is 2 z
    grads = jax.jit(jax.grad(lambda x: sum(sums_with_z(x).values())))(LOGITS)
    np.testing.assert_allclose(grads.sum(-1), 0.2 * z, rtol=1e-4)


def test_the_loss_beside_a_z_loss_is_the_loss_without():
    alone, _ = jax.jit(lambda x: next_token_loss()(lambda *_: x, BATCH))(LOGITS)
    assert sums_with_z(LOGITS)["loss"] == alone


def test_z_loss_alone_sees_a_shift_of_the_logits():
    sums, moved = sums_with_z(LOGITS), sums_with_z(LOGITS + 3)
    np.testing.assert_allclose(moved["loss"], sums["loss"], rtol=1e-4, atol=1e-5)
    assert not np.allclose(moved["z_loss"], sums["z_loss"], rtol=1e-1)


def test_large_and_narrow_logits():
    huge = cross_entropy(LOGITS * 1e4, TARGETS)
    assert np.isfinite(huge).all()
    narrow = LOGITS.astype(jnp.bfloat16)
    assert cross_entropy(narrow, TARGETS).dtype == jnp.float32
    np.testing.assert_array_equal(
        cross_entropy(narrow, TARGETS), cross_entropy(narrow.astype(jnp.float32), TARGETS)
    )


def test_the_loss_is_a_sum_and_a_count_of_unmasked_tokens():
    each = np.asarray(cross_entropy(LOGITS, TARGETS), np.float64)
    total, count = next_token_loss()(lambda *_: LOGITS, BATCH)
    np.testing.assert_allclose(total, each.sum(), rtol=1e-6)
    assert count == B * T

    mask = np.zeros((B, T), np.float32)
    mask[0, 1] = mask[2, 3] = 1
    total, count = next_token_loss()(lambda *_: LOGITS, BATCH | {"loss_mask": jnp.asarray(mask)})
    np.testing.assert_allclose(total, each[0, 1] + each[2, 3], rtol=1e-6)
    assert count == 2


def segments_by_hand(tokens):
    out = np.zeros_like(tokens)
    for row in range(len(tokens)):
        document = 0
        for t, token in enumerate(tokens[row]):
            out[row, t] = document
            document += token == EOS  # an EOS still belongs to the document that it ends
    return out


@pytest.mark.parametrize("seed", range(3))
def test_segments_end_with_their_eos(seed):
    tokens = np.random.RandomState(seed).randint(0, 3, (4, 12)).astype(np.int32)
    tokens[0], tokens[1] = 1, EOS  # no EOS, and nothing else
    found = segments(jnp.asarray(tokens), EOS)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, segments_by_hand(tokens))


def test_the_model_gets_segments_where_there_is_an_eos_and_else_none():
    seen = []
    batch = {"inputs": TARGETS, "targets": TARGETS}

    def model(tokens, segment_ids):
        seen.append(segment_ids)
        return LOGITS

    next_token_loss()(model, batch)
    next_token_loss(eos_id=EOS)(model, batch)
    assert seen[0] is None
    np.testing.assert_array_equal(seen[1], segments_by_hand(np.asarray(TARGETS)))
