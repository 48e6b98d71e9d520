import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import (
    MODEL,
    NUM_STEPS,
    ONE_DEVICE,
    OPTIM,
    Bigram,
    blueprint_of,
    host_batch,
    mesh_of,
    put,
    transformer,
)

from jaxlm.config import OptimConfig
from jaxlm.device import sharding
from jaxlm.device.fingerprint import fingerprint
from jaxlm.device.guard import make_guard
from jaxlm.device.loss import next_token_loss
from jaxlm.device.model import Transformer
from jaxlm.device.optim import make_optimizer, make_schedule
from jaxlm.device.sharding import compiler_options, deterministic_options, put_batch
from jaxlm.device.state import ModelFactory, TrainState, make_blueprint
from jaxlm.device.step import make_eval_step, make_train_step, scheduled

ONE_LAYER = dataclasses.replace(MODEL, num_layers=1)
TRANSFORMER: ModelFactory = functools.partial(Transformer, ONE_LAYER)
SCHEDULE = make_schedule(OPTIM, NUM_STEPS)
CONSTANT = OptimConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant")


@functools.cache
def step_of(shape=ONE_DEVICE, model=TRANSFORMER, num_microbatches=1, optim=OPTIM, loss=None):
    update = make_train_step(
        blueprint_of(shape, model, optim),
        loss or next_token_loss(),
        mesh_of(*shape),
        num_microbatches,
    )
    return scheduled(update, make_schedule(optim, NUM_STEPS), mesh_of(*shape))


@functools.cache
def host_state(model: Any) -> TrainState:
    blueprint = blueprint_of(model=model)
    trained = nnx.to_pure_dict(nnx.state(transformer(ONE_LAYER)))
    params = trained if model is TRANSFORMER else blueprint.make(0).params
    zero = jnp.zeros((), jnp.int32)
    opt_state = blueprint.tx.init(params)
    return jax.device_get(TrainState(params, opt_state, zero, make_guard()))


def initial(shape=ONE_DEVICE, model=TRANSFORMER) -> TrainState:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, blueprint_of(shape, model).abstract)
    return jax.device_put(host_state(model), shardings)


def run(batches, shape=ONE_DEVICE, model=TRANSFORMER, **kwargs):
    """The last state, and the metrics of each step."""
    step, state, rows = step_of(shape, model, **kwargs), initial(shape, model), []
    for batch in batches:
        state, metrics = step(state, put(batch, mesh_of(*shape)))
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, rows


BATCHES = [host_batch(n) for n in range(5)]


@functools.cache
def on_one_device():
    return run(BATCHES)


def num_updates(state: TrainState) -> int:
    """As Adam counts them."""
    return int(state.opt_state[1].inner_states["adam"].inner_state.count)


def alike(found, expected) -> bool:
    """Losses and gradient norms to 1e-5, over all the steps."""
    return all(
        np.allclose([row[n] for row in found], [row[n] for row in expected], rtol=1e-5)
        for n in ("loss", "grad_norm")
    )


# --- one mesh = another


@pytest.mark.parametrize(
    ("shape", "num_microbatches"),
    [
        ((2, 2, 2), 2),
        pytest.param((8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param((1, 4, 2), 1, marks=pytest.mark.slow),
    ],
)
def test_one_mesh_trains_as_another_in_any_number_of_microbatches(shape, num_microbatches):
    expected_state, expected = on_one_device()
    state, found = run(BATCHES, shape, num_microbatches=num_microbatches)
    assert alike(found, expected)
    for new, old in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True
    ):
        np.testing.assert_allclose(new, old, atol=2e-4)  # Adam's first steps are signs: 1e-2 each


def test_the_comparison_sees_a_row_taken_twice():
    rows = [0, 1, 2, 2, 4, 5, 6, 7]
    _, found = run([{name: x[rows] for name, x in batch.items()} for batch in BATCHES])
    assert not alike(found, on_one_device()[1])


# --- gradient accumulation


def masked(batch, weights):
    """Row r has its first weights[r] tokens in the loss."""
    mask = np.arange(9)[None, :] < np.array(weights)[:, None]
    return batch | {"loss_mask": mask.astype(np.float32)}


UNEVEN = [masked(batch, [9, 1, 0, 3, 9, 2, 7, 1]) for batch in BATCHES]


@pytest.mark.parametrize("num_microbatches", [2, 8])
def test_microbatches_make_the_full_batch(num_microbatches):
    _, expected = run(UNEVEN, model=Bigram)
    _, found = run(UNEVEN, model=Bigram, num_microbatches=num_microbatches)
    assert alike(found, expected)


def test_a_mean_of_means_would_not():
    def mean_of_means(model, batch):
        total, count = next_token_loss()(model, batch)
        return total / jnp.maximum(count, 1), jnp.float32(1)

    _, expected = run(UNEVEN, model=Bigram)
    _, found = run(UNEVEN, model=Bigram, num_microbatches=2, loss=mean_of_means)
    assert not alike(found, expected)


# --- a loss with terms


def run_with_z(**kwargs):
    return run(UNEVEN[:2], model=Bigram, loss=next_token_loss(z_loss=0.1), **kwargs)


def test_a_term_is_in_the_gradient_and_not_in_the_loss():
    state, found = run_with_z()
    expected_state, expected = run(UNEVEN[:2], model=Bigram)
    assert found[0]["loss"] == expected[0]["loss"] and "z_loss" not in expected[0]
    assert found[0]["z_loss"] > 0.1 and found[0]["grad_norm"] > 1.1 * expected[0]["grad_norm"]
    # The guard decides on the same loss, whatever the terms are.
    assert state.guard.losses[-2] == expected_state.guard.losses[-2] == found[0]["loss"]


def test_terms_add_up_over_microbatches():
    (_, expected), (_, found) = run_with_z(), run_with_z(num_microbatches=2)
    assert alike(found, expected)
    np.testing.assert_allclose(found[0]["z_loss"], expected[0]["z_loss"], rtol=1e-5)


def test_an_eval_leaves_out_the_terms():
    blueprint, mesh = blueprint_of(model=Bigram), mesh_of(*ONE_DEVICE)
    params, batch = blueprint.make(0).params, put(BATCHES[0], mesh)
    steps = [make_eval_step(blueprint, next_token_loss(z_loss=z), mesh) for z in (0.0, 0.1)]
    found = [jax.device_get(step(params, batch)) for step in steps]
    assert found[0] == found[1]


def test_a_term_that_is_not_finite_changes_nothing():
    def with_broken_term(model, batch):
        total, count = next_token_loss()(model, batch)
        return {"loss": total, "broken": jnp.inf * jnp.ones(())}, count

    before = fingerprint(initial(model=Bigram).params)
    state, rows = run(BATCHES[:1], model=Bigram, loss=with_broken_term)
    assert fingerprint(state.params) == before and int(state.guard.skipped_steps) == 1
    assert np.isfinite(rows[0]["loss"]) and rows[0]["broken"] == np.inf


# --- what an update is


def test_n_batches_make_n_updates():
    before = initial(model=Bigram)
    step, seen = step_of(model=Bigram), []
    state = before
    seen.append(np.asarray(before.params["table_VV"]))
    for n in range(1, NUM_STEPS + 1):
        state, metrics = step(state, put(host_batch(n), mesh_of(*ONE_DEVICE)))
        assert int(state.step) == num_updates(state) == n
        assert float(metrics["learning_rate"]) == pytest.approx(float(SCHEDULE(n - 1)))
        seen.append(np.asarray(state.params["table_VV"]))
    assert int(state.guard.skipped_steps) == 0
    changed = [(a != b).any() for a, b in zip(seen[:-1], seen[1:], strict=True)]
    assert changed == [True] * NUM_STEPS  # the first one too: no step is wasted on a rate of 0


def test_an_update_is_the_learning_rate_times_the_optimizers():
    state, batch = host_state(Bigram), BATCHES[0]
    graphdef, tx, *_ = blueprint_of(model=Bigram)

    def mean_loss(params):
        total, count = next_token_loss()(nnx.merge(graphdef, params), batch)
        return total / count

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(state.params)
    updates, _ = jax.jit(tx.update)(grads, state.opt_state, state.params)
    after, metrics = run([batch], model=Bigram)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
    assert metrics[0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)  # as it was before clipping
    for name, update in updates.items():
        expected = state.params[name] - SCHEDULE(0) * update
        np.testing.assert_allclose(after.params[name], expected, rtol=1e-4, atol=1e-6)


def test_grad_norm_is_that_before_clipping():
    clipping = OptimConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=1e-3)
    _, found = run(BATCHES[:1], model=Bigram, optim=clipping)
    _, expected = run(BATCHES[:1], model=Bigram)
    assert found[0]["grad_norm"] == expected[0]["grad_norm"] > 1e-2


def test_training_learns():
    _, rows = run([BATCHES[0]] * 40, model=Bigram, optim=CONSTANT)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3


def test_the_step_consumes_its_state():
    state = initial(model=Bigram)
    new, _ = step_of(model=Bigram)(state, put(BATCHES[0], mesh_of(*ONE_DEVICE)))
    assert state.params["table_VV"].is_deleted()
    assert not new.params["table_VV"].is_deleted()


# --- steps that are not finite


def exploding(model, batch):
    """The next-token loss; a batch of inputs 31 breaks it, in the way that its targets say."""
    total, count = next_token_loss()(model, batch)
    broken, kind = (batch["inputs"] == 31).all(), batch["targets"][0, 0]
    broken_loss = jnp.where(kind == 0, jnp.nan, jnp.where(kind == 1, jnp.inf, 0))
    # sqrt has a value at 0, and no finite slope there.
    bias_V = model.bias_V[...]
    root = jnp.sqrt(jnp.where(broken & (kind == 2), bias_V * 0, bias_V * 0 + 1)).sum()
    return total + root + jnp.where(broken, broken_loss, 0), count


def bad(kind: int) -> dict[str, np.ndarray]:
    return {k: np.full((8, 9), v, np.int32) for k, v in (("inputs", 31), ("targets", kind))}


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["nan loss", "inf loss", "nan gradient"])
def test_a_step_that_is_not_finite_changes_only_its_counters(kind):
    step, mesh = step_of(model=Bigram, optim=CONSTANT, loss=exploding), mesh_of(*ONE_DEVICE)
    state, _ = step(initial(model=Bigram), put(BATCHES[0], mesh))
    before = fingerprint(state)
    state, metrics = step(state, put(bad(kind), mesh))
    after = fingerprint(state)
    assert np.isfinite(metrics["loss"]) == (kind == 2)
    assert np.isfinite(metrics["grad_norm"]) == (kind != 2)
    assert {name for name in after if after[name] != before[name]} == {
        "step",
        "guard/skipped_steps",
        "guard/consecutive_skips",
    }
    assert (int(state.step), int(state.guard.skipped_steps)) == (2, 1)
    assert num_updates(state) == 1

    # And training goes on as if that batch had not been.
    state, metrics = step(state, put(BATCHES[1], mesh))
    quiet = initial(model=Bigram)
    for batch in BATCHES[:2]:
        quiet, _ = step(quiet, put(batch, mesh))
    assert fingerprint(state.params) == fingerprint(quiet.params)
    assert fingerprint(state.opt_state) == fingerprint(quiet.opt_state)
    assert (int(state.step), int(state.guard.skipped_steps)) == (3, 1)
    assert int(metrics["skipped_steps"]) == 1


def test_a_batch_without_a_token_changes_nothing():
    before = fingerprint(initial(model=Bigram).params)
    state, _ = run([masked(BATCHES[0], [0] * 8)], model=Bigram)
    assert fingerprint(state.params) == before
    assert int(state.guard.skipped_steps) == 1


def test_a_finite_step_changes_every_leaf():
    before = fingerprint(initial(model=Bigram))
    after = fingerprint(run(BATCHES[:1], model=Bigram)[0])
    assert {name for name in after if after[name] == before[name]} == {
        "opt_state/1/inner_states/muon/inner_state/0/ns_coeffs",  # constants
        "guard/skipped_steps",
        "guard/consecutive_skips",
    }


# --- params in narrow dtypes


class Scalars(nnx.Module):
    """Four params, whose gradient is the batch."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any):
        self.w = nnx.Param(jnp.ones((4,), dtype))


def step_of_scalars(dtype: str, gradients: list[float], **optim: Any) -> Any:
    """The blueprint of `Scalars`, its state after steps of these gradients, and their norms."""
    config = OptimConfig(learning_rate=1e-2, weight_decay=0.0, **optim)
    factory = functools.partial(Scalars, dtype=jnp.dtype(dtype))
    mesh, blueprint = mesh_of(*ONE_DEVICE), blueprint_of(model=factory, optim=config)

    def loss(model: Scalars, batch: Any) -> Any:
        return (model.w[...] * batch["g"][0]).sum(), jnp.ones(())

    update, state, norms = make_train_step(blueprint, loss, mesh), blueprint.make(0), []
    for gradient in gradients:
        host = np.full((1, 4), gradient, np.float32)
        batch = put_batch(lambda rows, host=host: {"g": host[rows]}, mesh, 1)
        state, metrics = update(state, batch, jnp.float32(1e-2), jax.random.key(0))
        norms.append(float(metrics["grad_norm"]))
    return blueprint, state, norms


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_step_keeps_every_dtype_and_moments_are_in_float32(dtype: str):
    blueprint, state, _ = step_of_scalars(dtype, [1.0, 1.0])
    for leaf, planned in zip(
        jax.tree.leaves(state), jax.tree.leaves(blueprint.abstract), strict=True
    ):
        assert (leaf.dtype, leaf.shape) == (planned.dtype, planned.shape)
    assert state.params["w"].dtype == dtype and (state.params["w"] != 1).all()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}


def test_the_norm_of_a_float16_gradient_does_not_overflow():
    _, state, norms = step_of_scalars("float16", [1000.0], clip_norm=1.0)
    assert norms == [2000.0] and int(state.guard.skipped_steps) == 0
    assert (state.params["w"] != 1).all()


def test_a_float16_gradient_that_overflows_changes_nothing():
    _, state, norms = step_of_scalars("float16", [1e6])
    assert norms == [np.inf] and int(state.guard.skipped_steps) == 1
    assert (state.params["w"] == 1).all()


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_compiler_is_told_to_give_the_same_bits(deterministic, monkeypatch):
    # An option that no compiler knows shows that all of them get there.
    monkeypatch.setattr(
        sharding, "deterministic_options", lambda mesh: {"xla_no_such_option": True}
    )
    mesh = mesh_of(*ONE_DEVICE)
    optimizer = functools.partial(make_optimizer, OPTIM)
    blueprint = make_blueprint(Bigram, optimizer, mesh, deterministic=deterministic)
    batch = put(host_batch(0), mesh)
    train_step = make_train_step(blueprint, next_token_loss(), mesh)
    eval_step: Any = make_eval_step(blueprint, next_token_loss(), mesh)
    for lowered in (
        train_step.lower(blueprint.abstract, batch, jnp.float32(1e-3), jax.random.key(0)),
        eval_step.lower(blueprint.abstract.params, batch),
    ):
        if deterministic:
            with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
                lowered.compile()
        else:
            lowered.compile()


def mesh_on(platform: str, **axes: int) -> Any:
    shape = {"data": 1, "fsdp": 1, "tensor": 1} | axes
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]), shape=shape)


def test_only_a_gpu_needs_to_be_told():
    assert (
        deterministic_options(mesh_of(*ONE_DEVICE)) == deterministic_options(mesh_on("tpu")) == {}
    )
    assert deterministic_options(mesh_on("gpu"))["xla_gpu_deterministic_ops"] is True


def test_params_are_gathered_whole_where_they_alone_are_split():
    others = [mesh_on("tpu"), mesh_on("tpu", fsdp=4, tensor=2), mesh_on("gpu", fsdp=4)]
    assert [compiler_options(mesh, deterministic=False) for mesh in others] == [{}, {}, {}]
    assert len(compiler_options(mesh_on("tpu", data=2, fsdp=4), deterministic=False)) == 1
