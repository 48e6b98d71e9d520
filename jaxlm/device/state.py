"""The train state: what it holds, how it is made on a mesh, and its fingerprint."""

import itertools
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh

from jaxlm.config import Config
from jaxlm.device.guard import Guard, make_guard
from jaxlm.device.model import model_factory
from jaxlm.device.optim import Path, make_optimizer
from jaxlm.device.sharding import Dims, batch_sharding, compiler_options, param_sharding, replicated

Params = Any  # nested dicts of arrays
ModelFactory = Callable[[nnx.Rngs], nnx.Module]
Optimizer = Callable[[Mapping[Path, Dims | None]], optax.GradientTransformation]
"""From the names of each param's dims, where it has any."""

_PARAM_DTYPES = ("float32", "bfloat16", "float16", "float64")


class TrainState(NamedTuple):
    """All that a step changes."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    """int32 []: batches taken in."""
    guard: Guard
    """What was out of the ordinary of late."""
    ema_params: Params | None = None
    """The moving average of the params, float32 at least, where the run keeps one."""

    @property
    def weights(self) -> Params:
        """What is evaluated, and used: the average where there is one, else the params."""
        return self.params if self.ema_params is None else cast_like(self.ema_params, self.params)

    def begin_ema(self) -> "TrainState":
        """The same state, with an average of no more than its own params."""
        return self._replace(ema_params=jax.tree.map(jnp.copy, in_float32(self.params)))


def in_float32(tree: Any) -> Any:
    """Params, gradients or sums, of which narrower ones are widened to float32.

    In bfloat16, moments and moving averages stand still: a change below 1/256 is rounded away. In
    float16, the norm of a gradient overflows: 256 squared is infinite.
    """
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def cast_like(params: Params, like: Params) -> Params:
    """Params in the dtypes of others."""
    return jax.tree.map(lambda p, other: p.astype(other.dtype), params, like)


class Blueprint(NamedTuple):
    """A model and its optimizer on a mesh, before any array exists."""

    graphdef: nnx.GraphDef
    tx: optax.GradientTransformation
    make: Callable[[int], TrainState]
    """Seed -> the initial state, made sharded."""
    abstract: TrainState
    """The state as `jax.ShapeDtypeStruct` leaves with their shardings."""
    compiler_options: dict[str, Any]
    """What XLA is told where it compiles a step of this model."""


def jit_with_model(
    function: Callable[[Any, Any], Any], blueprint: Blueprint, mesh: Mesh
) -> Callable[[Params, Any], Any]:
    """Compiles `(model, batch) -> arrays` as `(params, batch) -> arrays`, the same on all devices.

    Args:
      function: takes the model and a batch, whose arrays are split by rows.
      blueprint: of the model.
      mesh: the mesh.
    """

    def with_params(params: Params, batch: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(nnx.merge(blueprint.graphdef, params), batch)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, blueprint.abstract.params)
    return jax.jit(
        with_params,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
        compiler_options=blueprint.compiler_options,
    )


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as one name, such as `params/layers/0/mlp/w_up_DF`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def make_blueprint(
    model: ModelFactory,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    ema: bool = False,
    deterministic: bool = True,
) -> Blueprint:
    """Works out shapes and shardings by abstract evaluation.

    Args:
      model: makes the module.
      optimizer: makes the optimizer.
      mesh: the devices.
      ema: keep an average of the params.
      deterministic: compile for the same bits each time, on devices that do not do so anyway.

    Raises:
      ValueError: the model holds other than `nnx.Param` of floats, or the mesh does not divide it.
    """
    graphdef, variables = nnx.split(nnx.eval_shape(lambda: model(nnx.Rngs(params=0))))
    of_params: dict[Path, Any] = {}
    dims: dict[Path, Dims | None] = {}
    for path, variable in nnx.to_flat_state(variables):
        name = "/".join(map(str, path))
        _check_variable(name, variable)
        dims[path] = variable.get_metadata().get("dims")
        of_params[path] = param_sharding(name, variable.shape, dims[path], mesh)
    param_shardings = traverse_util.unflatten_dict(of_params)
    tx = optimizer(dims)

    def build(seed: jax.Array) -> TrainState:
        params = nnx.to_pure_dict(nnx.split(model(nnx.Rngs(params=jax.random.key(seed))))[1])
        opt_state = tx.init(in_float32(params))
        state = TrainState(params, opt_state, jnp.zeros((), jnp.int32), make_guard())
        return state.begin_ema() if ema else state

    whole: Any = replicated(mesh)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    opt_state_shardings = optax.tree_utils.tree_map_params(
        tx,
        lambda leaf, sharding: leaf if isinstance(leaf, optax.MaskedNode) else sharding,
        jax.eval_shape(build, seed).opt_state,
        param_shardings,
        transform_non_params=lambda _: whole,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),  # a param of another optimizer
    )
    ema_shardings = param_shardings if ema else None
    shardings = TrainState(param_shardings, opt_state_shardings, whole, whole, ema_shardings)
    init = jax.jit(build, out_shardings=shardings)
    options = compiler_options(mesh, deterministic)
    abstract = jax.eval_shape(init, seed)
    return Blueprint(graphdef, tx, lambda seed: init(np.uint32(seed)), abstract, options)


def _check_variable(name: str, variable: Any) -> None:
    if not isinstance(variable, nnx.Param):
        is_array = isinstance(variable, jax.ShapeDtypeStruct)
        kind = "an array" if is_array else f"a {type(variable).__name__}"
        raise ValueError(
            f"model: {name} is {kind}, expected only nnx.Param; "
            "a checkpoint holds params, so keep other state out of the model"
        )
    if str(variable.dtype) not in _PARAM_DTYPES:
        raise ValueError(
            f"model: {name} is an nnx.Param of {variable.dtype}, expected one of "
            f"{', '.join(_PARAM_DTYPES)}, since training moves every param along its gradient; "
            "make what stays as it is in __call__"
        )


def blueprint_of(config: Config, mesh: Mesh, model: ModelFactory | None = None) -> Blueprint:
    """That of a run, whose model is the decoder unless another is given.

    Raises:
      ValueError: as in `make_blueprint`.
    """
    return make_blueprint(
        model or model_factory(config.model, mesh.devices.flat[0].platform),
        partial(make_optimizer, config.optim),
        mesh,
        ema=config.optim.ema_decay is not None,
        deterministic=config.deterministic,
    )


def fingerprint(tree: Any) -> dict[str, list[Any]]:
    """Leaf name -> [dtype, shape, lane, lane]: what tells one array from another.

    A lane is the sum, modulo 2^32, of the leaf's 32-bit words, each mixed with its place in the
    *global* array. Integers add up to the same whatever the sharding; a single changed word changes
    both lanes for certain, any other damage goes unseen with odds of 2^-64.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # One after the other: of arrays of numpy, all at once may not fit on the device.
    of_each = (survey({path_name(path): leaf})()[0] for path, leaf in leaves)
    return {name: entry for entries in of_each for name, entry in entries.items()}


Survey = Callable[[], tuple[dict[str, list[Any]], list[str]]]
"""Waits for the fingerprint, and the names of leaves with a NaN or an infinity."""


def survey(tree: Any) -> Survey:
    """Begins one pass over the memory of all leaves, which may be donated from then on."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    about = {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()}
    # A program for each layer: they are alike, and few enough that the host need not wait for room.
    names = sorted(leaves, key=_layer_of)
    groups = itertools.groupby(names, _layer_of)
    on_device = [_survey_all([leaves[name] for name in group]) for _, group in groups]

    def finish() -> tuple[dict[str, list[Any]], list[str]]:
        found = dict(zip(names, np.concatenate(on_device).tolist(), strict=True))
        fingerprints = {name: [*about[name], *found[name][:2]] for name in about}
        return fingerprints, [name for name in about if found[name][2]]

    return finish


def _layer_of(name: str) -> str:
    # `layers/3` in all trees of the state.
    return (re.findall(r"\w+/\d+(?=/)", name) or [""])[-1]


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32 [n, …]: narrow types widened, 64-bit ones as two words."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    x = x.reshape(x.shape or (1,))
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    # The finalizer of MurmurHash3 (public domain): one to one, and every bit decides half of them.
    # Words that were only weighted would not do: two flipped signs cancel, whatever the weights.
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _spread(place: jax.Array, odd: int) -> jax.Array:
    # A high power of two apart, products alone differ by one bit: its flip in both would cancel.
    place = place * np.uint32(odd)
    return place ^ (place >> 15)


@jax.jit
def _survey_all(leaves: list[jax.Array]) -> jax.Array:
    # uint32 [n, 3], whole on each device.
    found = jnp.stack([_survey(leaf) for leaf in leaves])
    mesh: Any = jax.typeof(leaves[0]).sharding.mesh  # an abstract one
    return found if mesh.empty else jax.lax.with_sharding_constraint(found, replicated(mesh))


@jax.jit  # traced once for all leaves of a shape
def _survey(x: jax.Array) -> jax.Array:
    # uint32 [3]: two lanes, and whether anything is not finite.
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
    is_float = jnp.issubdtype(x.dtype, jnp.inexact)
    bad = ~jnp.isfinite(x) if is_float else jnp.zeros(x.shape, bool)
    bad = bad.reshape(*x.shape, *[1] * (words.ndim - x.ndim))
    # One reduce of three operands: as sums of their own they take 25 times as long, and temporaries
    # of the size of the leaf.
    found = jax.lax.reduce(
        (
            _mix(words ^ _spread(place, 0x9E3779B1)),
            _mix(words ^ _spread(place, 0x85EBCA77)),
            jnp.broadcast_to(bad, words.shape).astype(jnp.uint32),
        ),
        (np.uint32(0), np.uint32(0), np.uint32(0)),
        lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] | b[2]),
        tuple(range(words.ndim)),
    )
    return jnp.stack(found)


def num_bytes(tree: Any) -> int:
    """Bytes of all leaves, each counted once however many devices hold it."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
