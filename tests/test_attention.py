from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_model import mesh_of

from jaxlm.device.attention import (
    blocked_attention,
    cudnn_attention,
    for_platform,
    reference_attention,
    splash_attention,
)

B, H = 2, 6
# (T, N, K, segments): odd lengths, one token, one block, blocks that do not fill, GQA and not.
CASES = [(1, 2, 1, False), (11, 4, 2, True), (11, 4, 2, False), (8, 2, 2, True), (13, 3, 1, True)]

BOTH = [reference_attention, partial(blocked_attention, block_size=4)]


def inputs(T: int, N: int, K: int, with_segments: bool):
    rng = np.random.RandomState(T)
    q, k, v = (jnp.asarray(rng.randn(B, T, n, H), jnp.float32) for n in (N, K, K))
    segments = np.cumsum(rng.rand(B, T) < 0.3, axis=1).astype(np.int32)
    if with_segments:
        assert len(np.unique(segments[0])) > 1
    return q, k, v, jnp.asarray(segments) if with_segments else None


def by_hand(q, k, v, segments):
    """The definition, one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        kv = n // (q.shape[2] // k.shape[2])
        seen = [s for s in range(t + 1) if segments is None or segments[b, s] == segments[b, t]]
        scores = np.exp(k[b, seen, kv] @ q[b, t, n] / np.sqrt(H))
        out[b, t, n] = scores / scores.sum() @ v[b, seen, kv]
    return out


def value_and_grads(attention, q, k, v, segments):
    weights = jnp.asarray(np.random.RandomState(7).randn(*q.shape), jnp.float32)

    @jax.jit
    def run(q, k, v):
        out, pullback = jax.vjp(lambda *qkv: attention(*qkv, segments), q, k, v)
        return out, *pullback(weights)

    return run(q, k, v)


@cache
def by_reference(*case):
    return value_and_grads(reference_attention, *inputs(*case))


def close(found, expected) -> bool:
    return all(
        np.allclose(f, e, rtol=1e-5, atol=1e-5) for f, e in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_definition(case):
    expected = by_hand(*inputs(*case))
    np.testing.assert_allclose(by_reference(*case)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_blocked_equals_reference_in_value_and_gradient(case):
    found = value_and_grads(partial(blocked_attention, block_size=4), *inputs(*case))
    assert close(found, by_reference(*case))


def test_blocks_of_the_default_size():
    case = inputs(130, 2, 1, True)
    assert close([jax.jit(blocked_attention)(*case)], [jax.jit(reference_attention)(*case)])


# --- the kernel for TPU, interpreted on a CPU

SPLASH = partial(splash_attention, interpret=True)


def test_splash_equals_reference_in_value_and_gradient():
    case = (256, 2, 2, False)
    assert close(value_and_grads(SPLASH, *inputs(*case)), by_reference(*case))


@pytest.mark.slow
def test_splash_on_a_mesh_is_splash_on_one_device():
    q, k, v, segments = (jnp.concatenate([x, x + 1]) for x in inputs(128, 4, 2, True))
    expected = value_and_grads(reference_attention, q, k, v, segments)
    mesh = mesh_of(2, 2, 2)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    heads = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
    q, k, v = (jax.device_put(x, heads) for x in (q, k, v))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = value_and_grads(SPLASH, q, k, v, jax.device_put(segments, rows))
    assert close(found, expected)
    assert [x.sharding.spec for x in found] == [heads.spec] * 4


def test_a_kernel_is_called_only_with_what_it_takes():
    """`interpret` is off: on a CPU the kernel itself would fail."""
    case = inputs(130, 2, 1, True)
    assert close([jax.jit(splash_attention)(*case)], [jax.jit(reference_attention)(*case)])
    with pytest.raises(ValueError, match="interpret mode"):
        splash_attention(*inputs(128, 2, 1, True))


@pytest.mark.parametrize(
    ("dtype", "size", "with_segments", "taken"),
    [
        ("bfloat16", 64, False, True),
        ("float16", 128, False, True),
        ("float32", 64, False, False),
        ("bfloat16", 64, True, False),
        ("bfloat16", 136, False, False),
        ("bfloat16", 12, False, False),
    ],
)
def test_cudnn_is_called_only_with_what_it_takes(monkeypatch, dtype, size, with_segments, taken):
    """Lowered for a GPU, which need not be here."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90_800)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    q, k = (jnp.ones((1, 128, heads, size), dtype) for heads in (4, 2))
    segments = jnp.zeros((1, 128), jnp.int32) if with_segments else None
    traced = jax.jit(jax.grad(lambda *qkv: cudnn_attention(*qkv, segments).sum(), (0, 1, 2)))
    text = traced.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert ("__cudnn$fmhaSoftmax" in text) == ("__cudnn$fmhaSoftmaxBackward" in text) == taken


def test_without_cudnn_it_is_the_reference():
    q = jnp.ones((1, 8, 2, 64), "bfloat16")
    assert (jax.jit(cudnn_attention)(q, q, q) == jax.jit(reference_attention)(q, q, q)).all()


@pytest.mark.parametrize("breakage", ["keys", "heads", "segments", "causality"])
def test_the_comparison_sees_a_broken_attention(breakage):
    case = (11, 4, 2, True)

    def broken(q, k, v, segments):
        if breakage == "keys":  # a block that forgets the keys of the one before
            parts = [(q[:, t : t + 4], k[:, t : t + 4], v[:, t : t + 4]) for t in (0, 4, 8)]
            cuts = [segments[:, t : t + 4] for t in (0, 4, 8)]
            outs = [reference_attention(*p, c) for p, c in zip(parts, cuts, strict=True)]
            return jnp.concatenate(outs, axis=1)
        if breakage == "heads":  # query heads dealt out to key heads in turn
            return reference_attention(q[:, :, jnp.array([0, 2, 1, 3])], k, v, segments)
        if breakage == "segments":
            return reference_attention(q, k, v, None)
        return jax.nn.dot_product_attention(q, k, v)

    assert not close(value_and_grads(broken, *inputs(*case)), by_reference(*case))


def leak(attention, segments=None) -> np.ndarray:
    """How much the output at each time [T] depends on each key and value [S]."""
    q, k, v, _ = inputs(11, 4, 2, False)

    def at_times(k, v):
        return jnp.sum(attention(q, k, v, segments), axis=(0, 2, 3))

    to_k, to_v = jax.jit(jax.jacrev(at_times, argnums=(0, 1)))(k, v)
    return np.asarray(jnp.abs(to_k).sum((1, 3, 4)) + jnp.abs(to_v).sum((1, 3, 4)))


@pytest.mark.parametrize(
    "attention", [reference_attention, partial(blocked_attention, block_size=4)]
)
def test_no_gradient_from_the_future_or_another_document(attention):
    future = np.triu(np.ones((11, 11), bool), 1)
    found = leak(attention)
    assert (found[future] == 0).all() and (found[~future] > 0).all()

    document = np.array([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2])
    segments = jnp.asarray(np.stack([document] * B), jnp.int32)
    unseen = future | (document[:, None] != document[None, :])
    found = leak(attention, segments)
    assert (found[unseen] == 0).all() and (found[~unseen] > 0).all()


def test_a_leak_is_seen():
    future = np.triu(np.ones((11, 11), bool), 1)
    open_attention = lambda q, k, v, _: jax.nn.dot_product_attention(q, k, v)  # noqa: E731
    assert (leak(open_attention)[future] > 0).all()


def test_scores_are_float32_and_the_output_keeps_its_dtype():
    case = inputs(11, 4, 2, True)
    narrow = tuple(x.astype(jnp.bfloat16) for x in case[:3])
    expected = jax.jit(reference_attention)(*(x.astype(jnp.float32) for x in narrow), case[3])
    for attention in BOTH:
        out = jax.jit(attention)(*narrow, case[3])
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0.02, atol=0.02)
    scores = [
        eqn.outvars[0].aval
        for eqn in jax.make_jaxpr(reference_attention)(*case[:3]).eqns
        if eqn.primitive.name == "dot_general"
    ]
    assert scores[0].dtype == jnp.float32


def test_each_platform_has_its_form():
    assert for_platform("cpu") is blocked_attention
    assert for_platform("gpu") is cudnn_attention
    assert for_platform("tpu") is splash_attention
