import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_model import MODEL, Bigram, blueprint_of, names_and_leaves

from jaxlm.config import OptimConfig
from jaxlm.device.model import Transformer
from jaxlm.device.optim import decayed, make_optimizer, make_schedule, matrix_axes
from jaxlm.device.sharding import Dims

PEAK, NUM_STEPS, WARMUP = 0.5, 100, 10


def rates(**kwargs) -> np.ndarray:
    """The learning rate of steps 0 to NUM_STEPS."""
    config = OptimConfig(**({"learning_rate": PEAK, "warmup_steps": WARMUP} | kwargs))
    schedule = make_schedule(config, NUM_STEPS)
    return np.array([float(schedule(step)) for step in range(NUM_STEPS + 1)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_warmup_rises_to_the_peak_and_wastes_no_step(schedule):
    found = rates(schedule=schedule)
    expected = PEAK * np.arange(1, WARMUP + 1) / WARMUP
    np.testing.assert_allclose(found[:WARMUP], expected, rtol=1e-5)
    assert found[0] > 0
    np.testing.assert_allclose(found[WARMUP], PEAK, rtol=1e-5)
    assert found.max() <= PEAK * (1 + 1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_little_or_no_warmup_begins_at_the_peak(schedule, warmup):
    np.testing.assert_allclose(rates(schedule=schedule, warmup_steps=warmup)[0], PEAK, rtol=1e-6)


def test_cosine():
    found = rates(schedule="cosine", min_lr_ratio=0.1)
    progress = np.arange(NUM_STEPS - WARMUP + 1) / (NUM_STEPS - WARMUP)
    expected = PEAK * (0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2)
    np.testing.assert_allclose(found[WARMUP:], expected, rtol=1e-4)
    np.testing.assert_allclose(found[-1], 0.1 * PEAK, rtol=1e-4)


def test_wsd_is_stable_and_then_falls_in_a_line():
    found = rates(schedule="wsd", decay_fraction=0.2, min_lr_ratio=0.1)
    np.testing.assert_allclose(found[WARMUP:81], PEAK, rtol=1e-6)
    np.testing.assert_allclose(found[80:], np.linspace(PEAK, 0.1 * PEAK, 21), rtol=1e-4)


def test_wsd_whose_warmup_reaches_into_the_decay_still_ends_at_the_floor():
    found = rates(schedule="wsd", decay_fraction=1.0, min_lr_ratio=0.0)
    np.testing.assert_allclose(found[WARMUP:], np.linspace(PEAK, 0, 91), rtol=1e-4, atol=1e-7)


def test_wsd_without_decay_and_constant_stay_at_the_peak():
    for found in (rates(schedule="constant"), rates(schedule="wsd", decay_fraction=0.0)):
        np.testing.assert_allclose(found[WARMUP:NUM_STEPS], PEAK, rtol=1e-6)


def test_a_run_of_one_step_has_a_rate():
    for schedule in ("cosine", "wsd", "constant"):
        config = OptimConfig(learning_rate=PEAK, schedule=schedule)
        assert 0 < float(make_schedule(config, 1)(0)) <= PEAK


BLOCK_MATRICES = ["attention/w_k_DKH", "attention/w_o_NHD", "attention/w_q_DNH"]
BLOCK_MATRICES += ["attention/w_v_DKH", "mlp/w_down_FD", "mlp/w_gate_DF", "mlp/w_up_DF"]
BLOCK_SCALES = ["attention/k_norm/scale", "attention/q_norm/scale"]
BLOCK_SCALES += ["attention_norm/scale", "mlp_norm/scale"]
DECAYED = ["embedding_VD", "head_DV", *(f"layers/{n}/{m}" for n in (0, 1) for m in BLOCK_MATRICES)]
NOT_DECAYED = ["final_norm/scale", *(f"layers/{n}/{s}" for n in (0, 1) for s in BLOCK_SCALES)]


QK_NORM = partial(Transformer, dataclasses.replace(MODEL, qk_norm=True))


def qk_norm_params():
    return blueprint_of(model=QK_NORM).abstract.params


def optimizer_of(config: OptimConfig, **dims: Dims | None):
    """That of params of these names and dims."""
    return make_optimizer(config, {(name,): names for name, names in dims.items()})


def test_weight_decay_is_on_matrices_only_leaf_by_leaf():
    mask = names_and_leaves(decayed(qk_norm_params()))
    assert mask == dict.fromkeys(DECAYED, True) | dict.fromkeys(NOT_DECAYED, False)


def test_weight_decay_moves_just_those_leaves():
    params = jax.tree.map(lambda p: np.full(p.shape, 2.0, np.float32), qk_norm_params())
    tx = optimizer_of(OptimConfig("adamw", weight_decay=0.25))
    zeros = jax.tree.map(np.zeros_like, params)
    updates = jax.jit(lambda p: tx.update(zeros, tx.init(p), p)[0])(params)
    found = {name: float(leaf.ravel()[0]) for name, leaf in names_and_leaves(updates).items()}
    assert found == dict.fromkeys(DECAYED, 0.5) | dict.fromkeys(NOT_DECAYED, 0.0)


def adamw_by_hand(params, grads_of_steps, config: OptimConfig):
    """Updates of the last step, as the AdamW paper has them, before the learning rate."""
    m = {k: np.zeros(p.shape) for k, p in params.items()}
    v = {k: np.zeros(p.shape) for k, p in params.items()}
    for grads in grads_of_steps:
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        scale = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / norm)
        m = {k: config.beta1 * m[k] + (1 - config.beta1) * scale * g for k, g in grads.items()}
        v = {
            k: config.beta2 * v[k] + (1 - config.beta2) * (scale * g) ** 2 for k, g in grads.items()
        }
    t = len(grads_of_steps)
    m = {k: x / (1 - config.beta1**t) for k, x in m.items()}
    v = {k: x / (1 - config.beta2**t) for k, x in v.items()}
    return {
        k: m[k] / (np.sqrt(v[k]) + config.eps) + (config.weight_decay * p if p.ndim > 1 else 0)
        for k, p in params.items()
    }


# eps so large that Adam does not cancel the scale of a clipped gradient
@pytest.mark.parametrize("clip_norm", [None, 1.0, 1e3])
def test_three_steps_are_adamw(clip_norm):
    config = OptimConfig(clip_norm=clip_norm, eps=0.1)
    rng = np.random.RandomState(0)
    shapes = {"w": (3, 4), "scale": (4,)}
    params = {k: rng.randn(*s).astype(np.float32) for k, s in shapes.items()}
    steps = [{k: 3 * rng.randn(*s).astype(np.float32) for k, s in shapes.items()} for _ in range(3)]
    tx = optimizer_of(config)
    state = tx.init(params)
    for grads in steps:
        updates, state = jax.jit(tx.update)(grads, state, params)
    expected = adamw_by_hand(params, steps, config)
    for name in shapes:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-4, atol=1e-6)

    other = OptimConfig(clip_norm=1.0 if clip_norm != 1.0 else None, eps=0.1)
    unlike = adamw_by_hand(params, steps, other)
    assert not np.allclose(updates["w"], unlike["w"], rtol=1e-2)


# --- Muon


def params_of(optimizer: str, model: Any) -> set[str]:
    """The params that this optimizer has a moment of."""
    moments = f"opt_state/1/inner_states/{optimizer}/inner_state/"
    names = names_and_leaves(blueprint_of(model=model).abstract)
    found = [name.removeprefix(moments).partition("mu/") for name in names if moments in name]
    return {name for _, is_moment, name in found if is_moment}


def test_muon_is_for_the_hidden_matrices_leaf_by_leaf():
    hidden = {f"layers/{n}/{m}" for n in (0, 1) for m in BLOCK_MATRICES}
    assert params_of("muon", QK_NORM) == hidden
    assert params_of("adam", QK_NORM) == {"embedding_VD", "head_DV", *NOT_DECAYED}


def test_dims_decide_on_muon_and_no_spelling_does():
    class Own(Bigram):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.w_up_DF = nnx.Param(np.ones((4, 6), np.float32))
            self.w_up_EDF = nnx.Param(np.ones((3, 4, 6), np.float32))
            self.kernel = nnx.Param(np.ones((4, 6), np.float32), dims=("model", "mlp"))
            self.expert = nnx.Param(np.ones((3, 4, 6), np.float32), dims=(None, "model", "mlp"))

    assert params_of("muon", Own) == {"kernel"}
    assert params_of("adam", Own) == {"table_VV", "bias_V", "w_up_DF", "w_up_EDF", "expert"}


@pytest.mark.parametrize(
    ("dims", "axes"),
    [
        (("model", "mlp"), (0, (1,))),
        (("mlp", "model"), (1, (0,))),
        (("model", "model"), (0, (1,))),
        (("model", "kv_heads", "head_dim"), (0, (1, 2))),
        (("heads", "head_dim", "model"), (2, (0, 1))),
        (("experts", "model", "mlp"), (1, (2,))),
        (("model", "experts", "mlp"), (0, (2,))),
        (("experts", "model"), None),
        (("vocab", "model"), None),
        (("mlp", "heads"), None),
        (("model", None), None),
        (("model", "heads", None), None),
        (("model",), None),
        ((), None),
        (None, None),
    ],
)
def test_the_sides_of_a_matrix(dims: Dims | None, axes: Any):
    assert matrix_axes(dims) == axes


def muon_by_hand(grads_of_steps: list[np.ndarray], config: OptimConfig) -> np.ndarray:
    """The update of the last step for a matrix, as its author has it, in float64."""
    momentum = np.zeros(grads_of_steps[0].shape)
    for grad in grads_of_steps:
        momentum = config.muon_beta * momentum + (1 - config.muon_beta) * grad
    t, beta = len(grads_of_steps), config.muon_beta
    # Optax takes the bias out of both terms of Nesterov's momentum (as NAdam does).
    x = beta * momentum / (1 - beta ** (t + 1)) + (1 - beta) * grad / (1 - beta**t)
    if x.shape[0] > x.shape[1]:
        return muon_by_hand([grad.T for grad in grads_of_steps], config).T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return config.muon_rms * np.sqrt(max(x.shape)) * x


@pytest.mark.parametrize(
    ("dims", "shape", "matrix"),
    [(("model", "mlp"), (6, 10), (6, 10)), (("mlp", "model"), (10, 6), (10, 6))]
    + [(("model", "heads", "head_dim"), (6, 2, 4), (6, 8))]
    + [(("heads", "head_dim", "model"), (2, 4, 6), (8, 6))],
)
def test_three_steps_are_muon(dims: Dims, shape: tuple[int, ...], matrix: tuple[int, int]):
    config = OptimConfig(clip_norm=None, weight_decay=0.0, muon_rms=0.3)
    rng = np.random.RandomState(0)
    steps = [rng.randn(*shape).astype(np.float32) for _ in range(3)]
    tx, params = optimizer_of(config, w=dims), {"w": np.zeros(shape, np.float32)}
    state = tx.init(params)
    for grad in steps:
        updates, state = jax.jit(tx.update)({"w": grad}, state, params)
    expected = muon_by_hand([grad.reshape(matrix) for grad in steps], config).reshape(shape)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-3, atol=1e-4)
    other = muon_by_hand([grad.reshape(matrix) for grad in steps[1:]], config).reshape(shape)
    assert not np.allclose(updates["w"], other, rtol=1e-1)


def test_each_expert_is_a_matrix_of_its_own():
    config = OptimConfig(clip_norm=None, weight_decay=0.0, muon_rms=0.3)
    grads = np.random.RandomState(0).randn(3, 6, 10).astype(np.float32)
    tx, params = optimizer_of(config, w=("experts", "model", "mlp")), {"w": np.zeros_like(grads)}
    found = jax.jit(tx.update)({"w": grads}, tx.init(params), params)[0]["w"]
    expected = [muon_by_hand([grad], config) for grad in grads]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    as_one = muon_by_hand([grads.reshape(18, 10)], config).reshape(3, 6, 10)
    assert not np.allclose(found, as_one, rtol=1e-1)


def test_the_updates_of_muon_have_the_same_size_in_every_shape():
    rng = np.random.RandomState(0)
    params = {"a": np.zeros((16, 64), np.float32), "b": np.zeros((4, 8, 16), np.float32)}
    params["c"] = np.zeros((32, 32), np.float32)
    dims = {"a": ("model", "mlp"), "b": ("heads", "head_dim", "model"), "c": ("model", "mlp")}
    grads = jax.tree.map(lambda p: rng.randn(*p.shape).astype(np.float32) * p.size, params)
    tx = optimizer_of(OptimConfig(muon_rms=0.1, weight_decay=0.0), **dims)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for name, update in updates.items():
        # Five iterations leave the singular values between 0.7 and 1.2.
        assert np.sqrt(np.mean(np.square(update))) == pytest.approx(0.1, rel=0.3), name
