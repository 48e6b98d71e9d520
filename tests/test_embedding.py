"""The embedding's gradient for a GPU equals the plain one, on any mesh."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import TRANSFORMER, blueprint_of, host_batch, mesh_of, put, trained_params

from jaxlm.device.embedding import Lookup, lookup_for, plain_lookup, sorted_lookup
from jaxlm.device.loss import Batch, next_token_loss
from jaxlm.device.state import Params

D = 6
# (rows, time, vocabulary): one token, a block that is not full, a full one, ids that go over
# several blocks, more ids than tokens. A block has 128 tokens.
CASES = [(1, 1, 7), (3, 11, 40), (2, 64, 40), (4, 300, 3), (5, 100, 900)]


def inputs(B: int, T: int, V: int, dtype: str = "float32"):
    rng = np.random.RandomState(T)
    tokens_BT = np.minimum(rng.zipf(1.3, (B, T)) - 1, V - 1).astype(np.int32)
    table_VD, grad_BTD = rng.randn(V, D), rng.randn(B, T, D)
    return jnp.asarray(table_VD, "float32"), jnp.asarray(tokens_BT), jnp.asarray(grad_BTD, dtype)


def value_and_grad(lookup: Lookup, table_VD, tokens_BT, grad_BTD):
    @jax.jit
    def run(table_VD, tokens_BT, grad_BTD):
        x, pullback = jax.vjp(lambda table: lookup(table, tokens_BT, grad_BTD.dtype), table_VD)
        return x, *pullback(grad_BTD)

    return run(table_VD, tokens_BT, grad_BTD)


def by_hand(table_VD, tokens_BT, grad_BTD):
    """The gradient in float64, one row after the other."""
    total_VD = np.zeros(table_VD.shape)
    np.add.at(total_VD, np.asarray(tokens_BT), np.asarray(grad_BTD, np.float64))
    return total_VD


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "lookup", [pytest.param(plain_lookup, marks=pytest.mark.slow), sorted_lookup]
)
def test_both_give_the_rows_and_the_sum_of_their_gradients(lookup, case):
    given = inputs(*case)
    x, grad = value_and_grad(lookup, *given)
    np.testing.assert_array_equal(x, given[0][given[1]])
    np.testing.assert_allclose(grad, by_hand(*given), rtol=1e-5, atol=1e-4)
    assert grad.dtype == given[0].dtype
    with pytest.raises(AssertionError):  # another token's gradient would be seen
        moved = given[0], (given[1] + 1) % case[2], given[2]
        np.testing.assert_allclose(grad, by_hand(*moved), rtol=1e-5, atol=1e-4)


def test_narrow_gradients_are_added_up_in_float32():
    given = inputs(4, 300, 3, "bfloat16")
    errors = [
        np.abs(value_and_grad(lookup, *given)[1] - by_hand(*given)).max()
        for lookup in (sorted_lookup, plain_lookup)
    ]
    assert errors[0] < 1e-4 < 1e-2 < errors[1]


def test_no_scatter_is_left_that_a_gpu_would_sort():
    given = inputs(3, 11, 40)
    sorted_ones, plain_ones = (
        jax.jit(partial(value_and_grad, lookup)).lower(*given).as_text()
        for lookup in (sorted_lookup, plain_lookup)
    )
    assert "unique_indices = true" in sorted_ones and "unique_indices = false" not in sorted_ones
    assert "unique_indices = false" in plain_ones


@cache
def grads_on(shape: tuple[int, int, int], lookup: Lookup) -> Params:
    """Gradients of a Transformer's loss on a mesh."""
    mesh, blueprint = mesh_of(*shape), blueprint_of(shape, partial(TRANSFORMER, lookup=lookup))

    @jax.jit
    def grads_of(params: Params, batch: Batch) -> Params:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            loss = next_token_loss()
            return jax.grad(lambda p: loss(nnx.merge(blueprint.graphdef, p), batch)[0])(params)

    params = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, like.sharding),
        trained_params(),
        blueprint.abstract.params,
    )
    return jax.device_get(grads_of(params, put(host_batch(0), mesh)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_model_has_the_same_gradients_with_either_on_any_mesh(shape):
    found, expected = grads_on(shape, sorted_lookup), grads_on((1, 1, 1), plain_lookup)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected)
    assert np.abs(expected["embedding_VD"]).max() > 1


def test_each_platform_has_its_lookup():
    found = [lookup_for(platform) for platform in ("cpu", "gpu", "tpu")]
    assert found == [plain_lookup, sorted_lookup, plain_lookup]
