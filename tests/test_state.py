import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_model import MODEL, Bigram, blueprint_of, mesh_of, names_and_leaves

from jaxlm.config import OptimConfig
from jaxlm.device import fingerprint as fingerprint_module
from jaxlm.device.fingerprint import _fingerprint_leaf, fingerprint, fingerprint_async
from jaxlm.device.guard import Guard
from jaxlm.device.optim import make_optimizer
from jaxlm.device.state import make_blueprint

# --- the state

ADAM, MUON = (f"opt_state/1/inner_states/{name}/inner_state" for name in ("adam", "muon"))


def test_golden_paths_of_the_state():
    names = list(names_and_leaves(blueprint_of().abstract))
    params = [name.removeprefix("params/") for name in names if name.startswith("params/")]
    assert len(params) == 3 + 9 * MODEL.num_layers
    hidden = [name for name in params if re.search(r"_[A-Z]*D[A-Z]*$", name) and "V" not in name]
    assert len(hidden) == 7 * MODEL.num_layers
    others = [name for name in params if name not in hidden]
    adam = ["count", *(f"{moment}/{name}" for moment in ("mu", "nu") for name in others)]
    muon = ["0/count", *(f"0/mu/{name}" for name in hidden), "0/ns_coeffs"]
    counters = ["step", *(f"guard/{name}" for name in Guard._fields)]
    assert names == [
        *(f"params/{name}" for name in params),
        *(f"{ADAM}/{name}" for name in adam),
        *(f"{MUON}/{name}" for name in muon),
        *counters,
    ]


def test_golden_paths_of_the_state_with_adam_alone():
    names = list(names_and_leaves(blueprint_of(optim=OptimConfig(name="adamw")).abstract))
    params = [name.removeprefix("params/") for name in names if name.startswith("params/")]
    moments = [f"opt_state/1/{moment}/{name}" for moment in ("mu", "nu") for name in params]
    assert [n for n in names if n.startswith("opt_state")] == ["opt_state/1/count", *moments]


def test_the_state_is_made_as_it_was_planned():
    blueprint = blueprint_of((2, 2, 2), Bigram)
    state = blueprint.make(0)
    for name, planned in names_and_leaves(blueprint.abstract).items():
        made = names_and_leaves(state)[name]
        assert (made.shape, made.dtype) == (planned.shape, planned.dtype), name
        assert made.sharding.is_equivalent_to(planned.sharding, made.ndim), name
    assert int(state.step) == int(state.guard.skipped_steps) == 0


def test_params_and_moments_are_split_alike_and_really():
    blueprint = blueprint_of((2, 2, 2))
    leaves = names_and_leaves(blueprint.abstract)
    spec = P("fsdp", "tensor", None)
    for root in ("params", f"{MUON}/0/mu"):
        found = leaves[f"{root}/layers/0/attention/w_q_DNH"].sharding
        assert found.is_equivalent_to(NamedSharding(mesh_of(2, 2, 2), spec), 3), root
    split = [n for n, x in leaves.items() if not x.sharding.is_fully_replicated]
    matrices = [n for n, x in leaves.items() if x.ndim >= 2 and "ns_coeffs" not in n]
    assert split == matrices  # all but scales, counters and constants


def test_a_model_without_named_dims_is_split_by_fsdp():
    leaves = names_and_leaves(blueprint_of((1, 4, 2), Bigram).abstract)
    mesh = mesh_of(1, 4, 2)
    for root in ("params", f"{ADAM}/mu", f"{ADAM}/nu"):
        table, bias = leaves[f"{root}/table_VV"], leaves[f"{root}/bias_V"]
        assert table.sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp", None)), 2)
        assert bias.sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp")), 1)
        assert table.sharding.shard_shape(table.shape) == (8, 32)
    assert names_and_leaves(blueprint_of((8, 1, 1), Bigram).abstract)[
        "params/table_VV"
    ].sharding.is_fully_replicated


def test_the_initial_state_is_a_function_of_the_seed_alone():
    one, eight = blueprint_of((1, 1, 1), Bigram), blueprint_of((1, 4, 2), Bigram)
    expected = fingerprint(one.make(5))
    assert fingerprint(eight.make(5)) == expected
    assert fingerprint(one.make(6)) != expected
    assert fingerprint(one.make(2**32 - 1)) != expected


def test_a_model_that_holds_more_than_params_is_refused():
    class Counting(Bigram):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.seen = nnx.BatchStat(jnp.zeros(()))

    with pytest.raises(ValueError, match=r"^model: seen is a BatchStat, expected only nnx.Param"):
        make_blueprint(Counting, lambda _: optax.identity(), mesh_of(1, 1, 1))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (lambda: jnp.arange(3), "int32"),
        (lambda: jnp.ones(3, bool), "bool"),
        (lambda: jax.random.key(0), "key<fry>"),
        (lambda: jnp.ones(3, jnp.complex64), "complex64"),
        (lambda: jnp.ones(3, jnp.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_a_param_that_cannot_be_trained_is_refused(value, dtype):
    class Frozen(Bigram):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.fixed = nnx.Param(value())

    message = f"^model: fixed is an nnx.Param of {dtype}, expected one of float32, .* in __call__$"
    with pytest.raises(ValueError, match=message):
        make_blueprint(Frozen, lambda _: optax.identity(), mesh_of(1, 1, 1))


def test_a_plain_array_in_a_model_is_called_an_array():
    class Holding(Bigram):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.table = np.arange(3)

    with pytest.raises(ValueError, match="^model: table is an array, expected only nnx.Param"):
        make_blueprint(Holding, lambda _: optax.identity(), mesh_of(1, 1, 1))


def test_the_fingerprint_of_no_elements_has_its_dtype_and_shape():
    assert fingerprint({"x": jnp.zeros((3, 0))}) == {"x": ["float32", [3, 0], 0, 0]}
    assert fingerprint_async({"x": jnp.zeros((0,), jnp.bfloat16)})()[1] == []


def test_a_mesh_that_does_not_divide_the_model_names_the_leaf_and_the_axis():
    with pytest.raises(ValueError) as error:
        blueprint_of((1, 2, 4))
    assert "w_k_DKH has 2 kv_heads, which tensor = 4 does not divide" in str(error.value)


def test_the_optimizer_may_have_no_moments():
    blueprint = make_blueprint(Bigram, lambda _: optax.sgd(0.1), mesh_of(2, 2, 2))
    assert jax.tree.leaves(blueprint.abstract.opt_state) == []
    no_clip = functools.partial(make_optimizer, OptimConfig(clip_norm=None))
    paths = names_and_leaves(make_blueprint(Bigram, no_clip, mesh_of(1, 1, 1)).abstract)
    assert paths.keys() == names_and_leaves(blueprint_of(model=Bigram).abstract).keys()


# --- the fingerprint

DTYPES = ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "uint32", "uint16"]
DTYPES += ["float8_e4m3fn", "complex64", "bool"]
SHAPE = (5, 7)


def mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def lanes_in_numpy(array: np.ndarray) -> list[int]:
    """The fingerprint from the bytes of the array, little end first."""
    size = array.dtype.itemsize
    raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), f"<u{min(size, 4)}")
    words = raw.astype(np.uint32)
    places = np.arange(words.size, dtype=np.uint32)
    odds = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77)
    spread = [(places * odd) ^ (places * odd >> np.uint32(15)) for odd in odds]
    return [int(mix(words ^ place).sum(dtype=np.uint32)) for place in spread]


def random_array(dtype: str, shape=SHAPE) -> np.ndarray:
    rng = np.random.RandomState(0)
    if dtype == "bool":
        return rng.rand(*shape) < 0.5
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * kind.itemsize), kind).reshape(shape)


def every_flip(array: np.ndarray) -> np.ndarray:
    """The array with each of its bits flipped in turn, [bits, …]; of a bool there is one bit."""
    raw = np.frombuffer(array.tobytes(), np.uint8)
    bits = 1 if array.dtype == bool else 8
    flips = np.repeat(raw[None], raw.size * bits, axis=0)
    for number in range(len(flips)):
        flips[number, number // bits] ^= 1 << (number % bits)
    return np.frombuffer(flips.tobytes(), array.dtype).reshape(-1, *array.shape)


def every_swap(array: np.ndarray) -> np.ndarray:
    """The array with each pair of unlike elements swapped, [pairs, …]."""
    flat = array.ravel()
    bits = flat.view(f"u{array.dtype.itemsize}")
    pairs = [(i, j) for i in range(flat.size) for j in range(i) if bits[i] != bits[j]]
    swaps = np.repeat(flat[None], len(pairs), axis=0)
    for number, (i, j) in enumerate(pairs):
        swaps[number, [i, j]] = flat[[j, i]]
    return swaps.reshape(-1, *array.shape)


lanes_of_each = jax.jit(jax.vmap(lambda x: _fingerprint_leaf(x)[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_and_every_swap_is_found(dtype):
    array = random_array(dtype)
    expected = lanes_in_numpy(array)
    copies = np.repeat(array[None], 3, axis=0)
    flips, swaps = every_flip(array), every_swap(array)
    assert len(flips) == array.size * (1 if dtype == "bool" else 8 * array.dtype.itemsize)
    assert len(swaps) > 100
    damaged = np.asarray(lanes_of_each(np.concatenate([copies, flips, swaps])))
    np.testing.assert_array_equal(damaged[:3], [expected] * 3)
    assert (damaged[3 : 3 + len(flips)] != expected).all()  # in both lanes: the mix is one to one
    assert (damaged[3:] != expected).any(axis=1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_bit_flipped_in_two_places_or_in_all_is_found(dtype):
    """An even number of signs is the hardest: in a weighted sum of the words they cancel."""
    array = random_array(dtype)
    bits = array.view(f"u{array.dtype.itemsize}").ravel()
    pairs = [[i, j] for i in range(bits.size) for j in range(i)]
    flips = []
    for bit in range(8 * array.dtype.itemsize):
        for places in [*pairs, slice(None)]:
            flips.append(bits.copy())
            flips[-1][places] ^= bits.dtype.type(1 << bit)
    damaged = lanes_of_each(np.stack(flips).view(array.dtype).reshape(-1, *SHAPE))
    assert len(flips) == 8 * array.dtype.itemsize * 596
    assert (np.asarray(damaged) != np.asarray(lanes_of_each(array[None]))).all()  # in both lanes


def test_every_flipped_bit_of_a_key_is_found():
    key = jax.random.key(7)
    flips = every_flip(np.asarray(jax.random.key_data(key)))
    damaged = np.asarray(lanes_of_each(jax.random.wrap_key_data(flips)))
    expected = lanes_in_numpy(np.asarray(jax.random.key_data(key)))
    assert fingerprint({"key": key})["key"] == ["key<fry>", [], *expected]
    assert len(damaged) == 64 and (damaged != expected).any(axis=1).all()


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
def test_every_flipped_bit_of_64_is_found(dtype):
    with jax.enable_x64(True):
        array = random_array(dtype, (3, 5))
        damaged = np.asarray(lanes_of_each(np.concatenate([array[None], every_flip(array)])))
        assert jnp.asarray(array).dtype == dtype
    expected = lanes_in_numpy(array)
    assert list(damaged[0]) == expected
    assert len(damaged) == 1 + 15 * 64 and (damaged[1:] != expected).any(axis=1).all()


def test_a_sum_of_bits_would_miss_a_swap():
    swaps = every_swap(random_array("float32"))
    sums = swaps.view(np.uint32).sum(axis=(1, 2), dtype=np.uint32)
    assert len(set(sums)) == 1  # the same for every swap, as for the whole array


def test_name_shape_and_dtype_are_part_of_it():
    zeros = {"a": jnp.zeros((2, 3))}
    assert fingerprint(zeros) == {"a": ["float32", [2, 3], 2071553522, 2833809747]}
    for other in (
        {"b": jnp.zeros((2, 3))},
        {"a": jnp.zeros((3, 2))},
        {"a": jnp.zeros((2, 3), jnp.int32)},
    ):
        assert fingerprint(other) != fingerprint(zeros)


def test_golden_fingerprint():
    """Kept in every checkpoint: a change here makes old checkpoints look damaged."""
    tree = {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "n": jnp.int32(-1)}
    assert fingerprint(tree) == {
        "n": ["int32", [], 2180083513, 2180083513],
        "w": ["float32", [2, 3], 2587216886, 1395824984],
    }


@pytest.mark.parametrize(
    ("mesh", "spec"),
    [
        ((8, 1, 1), P("data")),
        ((2, 2, 2), P("tensor", ("data", "fsdp"))),
        ((2, 2, 2), P(None, "fsdp")),
        ((1, 4, 2), P("fsdp", "tensor")),
    ],
)
def test_the_fingerprint_is_the_same_over_every_sharding(mesh, spec):
    array = random_array("bfloat16", (16, 24))
    split = jax.device_put(array, NamedSharding(mesh_of(*mesh), spec))
    assert fingerprint({"x": split})["x"][2:] == lanes_in_numpy(array)


def temporaries(function, leaf) -> float:
    """Bytes that the compiled function needs besides its input, as a share of it."""
    analysis = jax.jit(function).lower(leaf).compile().memory_analysis()
    return analysis.temp_size_in_bytes / (leaf.size * leaf.dtype.itemsize)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_the_fingerprint_of_a_large_leaf_takes_no_memory(dtype):
    leaf = jax.ShapeDtypeStruct((4096, 1024), jnp.dtype(dtype))
    assert temporaries(_fingerprint_leaf, leaf) < 0.01
    assert temporaries(lambda x: jnp.sort(x, axis=0).sum(), leaf) > 0.01  # so it would show


def test_a_fingerprint_has_one_array_in_each_program(monkeypatch):
    given, real = [], fingerprint_module._fingerprint_group
    monkeypatch.setattr(
        fingerprint_module, "_fingerprint_group", lambda x: given.append(len(x)) or real(x)
    )
    tree = {"w": np.ones((2, 3)), "layers": {0: {"a": np.ones(2), "b": np.ones(2)}}}
    assert fingerprint(tree) == fingerprint_async(tree)()[0]
    assert given[:3] == [1, 1, 1] and sorted(given[3:]) == [1, 2]


def test_what_is_surveyed_may_be_donated_at_once():
    tree = {str(n): jax.random.normal(jax.random.key(n), (512, 256)) for n in range(20)}
    expected = fingerprint(tree)
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    jax.block_until_ready(change(jax.tree.map(jnp.copy, tree)))  # compiled: it would begin at once
    finish = fingerprint_async(tree)
    changed = change(tree)
    assert all(leaf.is_deleted() for leaf in tree.values())
    assert finish()[0] == expected != fingerprint(changed)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad):
    tree = {
        "w": jnp.ones((2, 3)),
        "scalar": jnp.ones(()),
        "narrow": jnp.ones(3, jnp.bfloat16),
        "n": jnp.int32(-1),  # the bits of a NaN
        "key": jax.random.key(0),
    }
    assert fingerprint_async(tree)()[1] == []
    for name in ("w", "scalar", "narrow"):
        leaf = tree[name]
        spoilt = leaf.at[(1,) * leaf.ndim].set(bad)
        assert fingerprint_async(tree | {name: spoilt})()[1] == [name]
