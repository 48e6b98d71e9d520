import dataclasses
import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import (
    MODEL,
    blueprint_of,
    host_batch,
    initial_params,
    names_and_leaves,
    transformer,
)

from jaxlm.device.attention import blocked_attention
from jaxlm.device.loss import next_token_loss, total
from jaxlm.device.model import RMSNorm, Transformer, compute_dtype, rope, silu
from jaxlm.launch import load_config

ONE_LAYER = dataclasses.replace(MODEL, num_layers=1)
T = 9
TOKENS = jnp.arange(T, dtype=jnp.int32)[None]  # a row of the embedding each


def leak(model, segment_ids=None) -> np.ndarray:
    """How much the logits of each time [T] depend on the token of each time [S], by gradient."""
    graphdef, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    weights_V = jnp.asarray(np.random.RandomState(1).randn(MODEL.vocab_size), jnp.float32)

    def at_times(embedding_VD):
        merged = nnx.merge(graphdef, params | {"embedding_VD": embedding_VD})
        return merged(TOKENS, segment_ids)[0] @ weights_V

    jacobian_TVD = jax.jit(jax.jacrev(at_times))(params["embedding_VD"])
    return np.asarray(jnp.abs(jacobian_TVD).sum(-1))[:, TOKENS[0]]


FUTURE = np.triu(np.ones((T, T), bool), 1)


def test_no_gradient_flows_from_the_future():
    found = leak(transformer(attention=partial(blocked_attention, block_size=4)))
    assert (found[FUTURE] == 0).all() and (found[~FUTURE] > 0).all()


def test_no_gradient_flows_from_another_document():
    document = np.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
    unseen = FUTURE | (document[:, None] != document[None, :])
    found = leak(transformer(), jnp.asarray(document[None], jnp.int32))
    assert (found[unseen] == 0).all() and (found[~unseen] > 0).all()


def test_a_leak_is_seen():
    found = leak(transformer(attention=lambda q, k, v, _: jax.nn.dot_product_attention(q, k, v)))
    assert (found[FUTURE] > 0).all()


@jax.jit
def logits_of(model):
    return model(jnp.asarray(host_batch(0)["inputs"]))


@jax.jit
def loss_of(logits_BTV):
    total, count = next_token_loss()(lambda *_: logits_BTV, host_batch(0))
    return total / count


def test_the_initial_loss_is_that_of_a_uniform_guess():
    uniform = math.log(MODEL.vocab_size)
    initial = nnx.merge(blueprint_of().graphdef, initial_params())
    assert abs(loss_of(logits_of(initial)) - uniform) < 0.02
    assert (
        abs(loss_of(logits_of(transformer())) - uniform) > 0.2
    )  # weights of another scale guess otherwise


def test_the_initial_weights_have_their_scale():
    zero = ("w_o_NHD", "w_down_FD", "head_DV")  # a block adds nothing, and all tokens are equal
    for name, leaf in names_and_leaves(initial_params()).items():
        if leaf.ndim == 1:
            assert (leaf == 1).all(), name
        else:
            std = 0 if name.endswith(zero) else MODEL.init_std
            np.testing.assert_allclose(np.std(leaf), std, rtol=0.2, err_msg=name)


def test_silu_has_the_derivative_of_autodiff():
    x = jnp.linspace(-8, 8, 101)

    def value_and_slope(function):
        return jax.jit(jax.vmap(jax.value_and_grad(function)))(x)

    value, slope = value_and_slope(lambda x: x * jax.nn.sigmoid(x))
    found_value, found_slope = value_and_slope(silu)
    np.testing.assert_allclose(found_value, value, rtol=1e-6)
    np.testing.assert_allclose(found_slope, slope, rtol=1e-5, atol=1e-6)
    assert not np.allclose(value_and_slope(jax.nn.gelu)[1], slope, atol=1e-2)


def scores(rotated_q_TH, rotated_k_TH) -> np.ndarray:
    return np.asarray(rotated_q_TH @ rotated_k_TH.T)


def is_relative(scores_TS) -> bool:
    """Whether a score depends on the distance alone: equal along every diagonal."""
    return bool(np.allclose(scores_TS[1:, 1:], scores_TS[:-1, :-1], atol=1e-4))


def test_rope_sees_distances_only():
    rng = np.random.RandomState(0)
    q_TH, k_TH = (np.tile(rng.randn(8).astype(np.float32), (12, 1)) for _ in range(2))
    turn = jax.jit(lambda x_TH: rope(x_TH[None, :, None], 100.0)[0, :, 0])
    found = scores(turn(q_TH), turn(k_TH))
    assert is_relative(found)
    assert np.ptp(found) > 0.1  # distance does matter
    assert not is_relative(scores(turn(q_TH), k_TH))


def test_rope_is_a_rotation_of_the_pairs_h_and_h_plus_half():
    x = np.random.RandomState(0).randn(2, 7, 3, 8)
    frequencies = 100.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
        1j * np.arange(7)[None, :, None, None] * frequencies
    )
    expected = np.concatenate([turned.real, turned.imag], -1)
    found = jax.jit(rope, static_argnums=1)(jnp.asarray(x, jnp.float32), 100.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rmsnorm_is_its_definition_and_computes_in_float32():
    norm = RMSNorm(6, eps=0.5)
    scale = np.linspace(0.5, 2, 6).astype(np.float32)
    norm.scale[...] = jnp.asarray(scale)
    x = np.random.RandomState(0).randn(2, 3, 6).astype(np.float32)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.5) * scale
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)

    narrow = jnp.asarray(x, jnp.bfloat16)
    found = norm(narrow)
    assert found.dtype == jnp.bfloat16
    exact = norm(narrow.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found.astype(jnp.float32), exact.astype(jnp.float32))


@cache
def loss_and_grads(config=ONE_LAYER, **options: Any):
    graphdef, params = nnx.split(transformer(config))
    batch = host_batch(0)

    def loss(params):
        model = nnx.merge(graphdef, params)
        return total(next_token_loss(**options), model, batch, None).objective()

    lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
    value, grads = lowered.compile()(params)
    num_products = lowered.as_text().count("dot_general")
    return value, names_and_leaves(nnx.to_pure_dict(grads)), num_products


@pytest.mark.parametrize("remat", ["products", "full"])
def test_remat_changes_the_program_and_nothing_else(remat: Any):
    value, grads, num_products = loss_and_grads()
    again, grads_again, num_again = loss_and_grads(dataclasses.replace(ONE_LAYER, remat=remat))
    # The two products of attention are made again; with nothing kept, all but the layer's last.
    assert num_again - num_products == {"products": 2, "full": 8}[remat]
    np.testing.assert_allclose(again, value, rtol=1e-6)
    for name, grad in grads.items():
        assert np.abs(grad).max() > 0, name
        np.testing.assert_allclose(grads_again[name], grad, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "eos_id": 0}])
def test_the_loss_in_chunks_is_the_loss_without_all_logits_in_memory(options: dict[str, Any]):
    value, grads, num_products = loss_and_grads(**options)
    again, grads_again, num_again = loss_and_grads(num_chunks=3, **options)
    assert num_again == num_products + 1  # the logits, again
    np.testing.assert_allclose(again, value, rtol=1e-6)
    for name, grad in grads.items():
        np.testing.assert_allclose(grads_again[name], grad, rtol=1e-4, atol=1e-5, err_msg=name)
    model, batch, V = transformer(ONE_LAYER), host_batch(0), MODEL.vocab_size
    B, T = batch["inputs"].shape
    text = [jax.jit(next_token_loss(num_chunks=n)).lower(model, batch).as_text() for n in (1, 3)]
    assert f"{B}x{T}x{V}xf32" in text[0] and f"{B}x{T}x{V}xf32" not in text[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_in_chunks_sums_the_gradients_of_the_head_in_the_dtype_of_compute(dtype: str):
    """Else devices send each other twice the bytes of it."""
    graphdef, params = nnx.split(transformer(ONE_LAYER, dtype=dtype))
    loss = next_token_loss(num_chunks=3)
    grad = jax.grad(lambda params: loss(nnx.merge(graphdef, params), host_batch(0))[0])
    loops = [e for e in jax.make_jaxpr(grad)(params).eqns if e.primitive.name == "scan"]
    head = [
        out.aval.dtype.name
        for loop in loops
        for out in loop.outvars
        if out.aval.shape == (MODEL.d_model, MODEL.vocab_size)
    ]
    assert head == [dtype]


def test_bfloat16_compute_is_close_and_keeps_float32_params_and_logits():
    narrow = transformer(dtype="bfloat16")
    assert {p.dtype for p in jax.tree.leaves(nnx.split(narrow)[1])} == {jnp.dtype("float32")}
    found, expected = logits_of(narrow), logits_of(transformer())
    assert found.dtype == jnp.float32
    error = float(jnp.abs(found - expected).max() / jnp.abs(expected).max())
    assert 1e-4 < error < 0.03  # bfloat16 rounds to 0.4%; below 1e-4 it would not be bfloat16
    assert abs(loss_of(found) - loss_of(expected)) < 0.05


def test_compute_dtype_follows_the_platform():
    for platform, expected in (("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")):
        assert compute_dtype(MODEL, platform) == jnp.dtype(expected)
    forced = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    assert compute_dtype(forced, "cpu") == jnp.bfloat16


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0)))
    params = nnx.to_pure_dict(nnx.split(model)[1])
    return {name: leaf.shape for name, leaf in names_and_leaves(params).items()}


# Checkpoints are read by these names: a change here makes old checkpoints unreadable.
LAYER = {
    "attention/w_k_DKH": (16, 2, 6),
    "attention/w_o_NHD": (4, 6, 16),
    "attention/w_q_DNH": (16, 4, 6),
    "attention/w_v_DKH": (16, 2, 6),
    "attention_norm/scale": (16,),
    "mlp/w_down_FD": (24, 16),
    "mlp/w_gate_DF": (16, 24),
    "mlp/w_up_DF": (16, 24),
    "mlp_norm/scale": (16,),
}
QK_NORM = {"attention/k_norm/scale": (6,), "attention/q_norm/scale": (6,)}
ENDS = {"embedding_VD": (32, 16), "final_norm/scale": (16,)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_golden_param_paths(tied, qk_norm):
    config = dataclasses.replace(MODEL, tie_embeddings=tied, qk_norm=qk_norm)
    layer = LAYER | (QK_NORM if qk_norm else {})
    expected = ENDS | {f"layers/{n}/{name}": s for n in (0, 1) for name, s in layer.items()}
    assert shapes_of(config) == expected | ({} if tied else {"head_DV": (16, 32)})


def test_tied_embeddings_are_the_head():
    tied = transformer(dataclasses.replace(ONE_LAYER, tie_embeddings=True))
    untied = transformer(ONE_LAYER)
    graphdef, params = nnx.split(untied)
    same = nnx.to_pure_dict(nnx.split(tied)[1])
    same |= {"head_DV": same["embedding_VD"].T}
    run = jax.jit(lambda model: model(TOKENS))
    np.testing.assert_allclose(run(tied), run(nnx.merge(graphdef, same)), rtol=1e-6, atol=1e-6)


def test_180m_has_180_million_parameters(request):
    config = load_config(str(request.config.rootpath / "configs/180m.py"))
    count = sum(math.prod(shape) for shape in shapes_of(config.model).values())
    assert abs(count - 180e6) < 0.02 * 180e6
    assert config.model.head_dim == 128
    assert abs(config.tokens_per_step - 131e3) < 1e3
    assert (config.num_steps, config.checkpoint.save_interval, config.eval_interval) == (
        30_000,
        500,
        500,
    )
