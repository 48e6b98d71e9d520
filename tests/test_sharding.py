import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_model import mesh_of

from jaxlm.config import MeshConfig
from jaxlm.device.sharding import (
    AXES,
    batch_sharding,
    constrain,
    make_mesh,
    param_sharding,
    put_batch,
    replicated,
)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(1, -1, 2), (1, 4, 2)),
        (MeshConfig(2, 2, 2), (2, 2, 2)),
        (MeshConfig(2, 4, -1), (2, 4, 1)),
    ],
)
def test_the_open_axis_takes_what_is_left(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MeshConfig(2, 2, 1), "data 2 x fsdp 2 x tensor 1 makes 4 devices, but there are 8"),
        (MeshConfig(-1, 3, 1), "data 2 x fsdp 3 x tensor 1 makes 6 devices, but there are 8"),
        (MeshConfig(-1, 16, 1), "data 1 x fsdp 16 x tensor 1 makes 16 devices, but there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, said):
    with pytest.raises(ValueError, match=f"^mesh: {said}; set mesh.data"):
        make_mesh(config)


def test_named_dims_go_to_their_axes():
    mesh = mesh_of(2, 2, 2)
    table = {
        ("vocab", "model"): P("tensor", "fsdp"),
        ("model", "heads", None): P("fsdp", "tensor", None),
        ("model", "kv_heads", None): P("fsdp", "tensor", None),
        ("model", "mlp"): P("fsdp", "tensor"),
        (None,): P(None),
    }
    for dims, spec in table.items():
        sharding = param_sharding("w", (8,) * len(dims), dims, mesh)
        assert sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), len(dims)), dims


def test_an_axis_that_does_not_divide_is_named():
    with pytest.raises(ValueError) as error:
        param_sharding("layers/0/w_q_DNH", (8, 3, 4), ("model", "heads", None), mesh_of(2, 2, 2))
    for part in ("layers/0/w_q_DNH", "3 heads", "tensor = 2", "mesh.tensor"):
        assert part in str(error.value)


@pytest.mark.parametrize("dims", [("model",), ("model", "mlp", None), ("model", "expert")])
def test_dims_that_are_not_those_of_the_array_are_refused(dims):
    with pytest.raises(
        ValueError, match=r"^model: w of shape \[8, 4\] has dims=.*, expected a name"
    ):
        param_sharding("w", (8, 4), dims, mesh_of(1, 1, 1))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 16), P(None, "fsdp")),
        ((16, 7), P("fsdp", None)),
        ((12, 30), P("fsdp", None)),  # 4 divides 12 and not the larger 30
        ((6,), P()),
        ((), P()),
    ],
)
def test_without_named_dims_fsdp_splits_the_largest_dim_that_it_divides(shape, spec):
    mesh = mesh_of(1, 4, 2)
    found = param_sharding("w", shape, None, mesh)
    assert found.is_equivalent_to(jax.NamedSharding(mesh, spec), len(shape))
    assert param_sharding("w", shape, None, mesh_of(8, 1, 1)).is_fully_replicated


def test_constrain_pins_to_the_mesh_in_context_and_else_does_nothing():
    x = jnp.ones((8, 4))
    assert constrain(x, "batch", None) is x
    mesh = mesh_of(2, 2, 2)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        pinned = jax.jit(lambda x: constrain(x, "batch", "mlp"), in_shardings=replicated(mesh))(x)
    expected = jax.NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
    assert pinned.sharding.is_equivalent_to(expected, 2)
    np.testing.assert_array_equal(pinned, x)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Int32 zeros at an address that JAX on a CPU would take as it is."""
    num_bytes = 4 * math.prod(shape)
    memory = np.zeros(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes].view(np.int32).reshape(shape)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_a_batch_stays_as_it_is_when_its_maker_fills_the_same_buffer_again(shape):
    mesh, buffer, ones = mesh_of(*shape), aligned((16, 64)), aligned((16, 64))
    ones[:] = 1
    kept = jax.device_put(ones, jax.devices()[0])
    batch = put_batch(lambda rows: {"x": buffer[rows]}, mesh, 16)
    jax.block_until_ready((batch, kept))
    buffer[:], ones[:] = 7, 7
    assert (kept == 7).all()  # so it would show
    assert (batch["x"] == 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_put_batch_puts_every_row_in_its_place_and_makes_it_once(shape):
    mesh = mesh_of(*shape)
    host = {"a": np.arange(16 * 3).reshape(16, 3), "b": np.arange(16, dtype=np.float32)}
    made = []

    def rows_of(rows):
        made.extend(range(*rows.indices(16)))
        return {name: array[rows] for name, array in host.items()}

    batch = put_batch(rows_of, mesh, 16)
    for name, array in host.items():
        np.testing.assert_array_equal(batch[name], array)
        assert batch[name].sharding == batch_sharding(mesh)
    assert sorted(made) == list(range(16))
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    assert {len(shard.data) for shard in batch["a"].addressable_shards} == {16 // ways}
