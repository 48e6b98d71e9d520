"""The train state, its abstract form, and its sharded initialization."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding

from jaxlm.config import Config
from jaxlm.device.guard import Guard, make_guard
from jaxlm.device.model import model_factory
from jaxlm.device.optim import ParamPath, make_optimizer
from jaxlm.device.sharding import Dims, batch_sharding, compiler_options, param_sharding, replicated
from jaxlm.errors import InputError

Params = Any  # nested dicts of arrays
ModelFactory = Callable[[nnx.Rngs], nnx.Module]
Optimizer = Callable[[Mapping[ParamPath, Dims | None]], optax.GradientTransformation]
"""Path -> dim names of each param (None without names) -> optimizer."""

_OUTSIDE = (
    "a checkpoint holds params, so keep other state out of the model (dropout takes the `rngs` of "
    "__call__)"
)
_PARAM_DTYPES = ("float32", "bfloat16", "float16", "float64")


class TrainState(NamedTuple):
    """Everything that a step changes."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    """int32 []: batches taken in."""
    guard: Guard
    """History that decides whether a step is applied."""
    ema_params: Params | None = None
    """Moving average of the params, float32 or wider; None if the run keeps none."""

    @property
    def weights(self) -> Params:
        """The weights to evaluate and use: the average if the run keeps one, else the params."""
        return self.params if self.ema_params is None else cast_like(self.ema_params, self.params)

    def begin_ema(self) -> "TrainState":
        """The same state, with its params as the start of the moving average."""
        return self._replace(ema_params=jax.tree.map(jnp.copy, in_float32(self.params)))


def in_float32(tree: Any) -> Any:
    """Params, gradients or sums, with narrower dtypes widened to float32.

    In bfloat16, moments and moving averages would stand still: a change below 1/256 is rounded
    away. In float16, the norm of a gradient would overflow: 256 squared is infinite.
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
    """Compiler options of XLA for a step of this model."""


def jit_with_model(
    function: Callable[[Any, Any], Any], blueprint: Blueprint, mesh: Mesh
) -> Callable[[Params, Any], Any]:
    """`(model, batch) -> arrays` compiled as `(params, batch) -> replicated arrays`.

    Args:
      function: takes the model and a batch, whose arrays are sharded by rows.
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
    try_update: bool = False,
) -> Blueprint:
    """The blueprint of a model and optimizer; shapes and shardings by abstract evaluation.

    Args:
      model: makes the module.
      optimizer: makes the optimizer.
      mesh: the devices.
      ema: keep an average of the params.
      deterministic: compile for the same bits each time (a GPU needs options for that).
      try_update: trace an update first: a caller's optimizer may need more than gradients, state
        and params.

    Raises:
      ValueError: the model holds state other than `nnx.Param` of floats, or the mesh does not
        divide a param.
    """
    graphdef, variables = _split(model)
    of_params: dict[ParamPath, Any] = {}
    dims: dict[ParamPath, Dims | None] = {}
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
    shapes = jax.eval_shape(build, seed)
    _check_opt_state(shapes.opt_state)
    if try_update:
        _try_update(tx, shapes)

    def sharding_of(leaf: Any, sharding: NamedSharding, param: Any) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        return sharding if leaf.shape == param.shape else whole  # Adafactor's factors are smaller

    opt_state_shardings = optax.tree_utils.tree_map_params(
        tx,
        sharding_of,
        shapes.opt_state,
        param_shardings,
        shapes.params,
        transform_non_params=lambda _: whole,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),  # a param of another optimizer
    )
    ema_shardings = param_shardings if ema else None
    shardings = TrainState(param_shardings, opt_state_shardings, whole, whole, ema_shardings)
    init = jax.jit(build, out_shardings=shardings)
    options = compiler_options(mesh, deterministic)
    abstract = jax.eval_shape(init, seed)
    return Blueprint(graphdef, tx, lambda seed: init(np.uint32(seed)), abstract, options)


def _split(model: ModelFactory) -> tuple[nnx.GraphDef, nnx.State]:
    # The graphdef and the abstract variables; no array is allocated.
    try:
        return nnx.split(nnx.eval_shape(lambda: model(nnx.Rngs(params=0))))
    except (AttributeError, KeyError) as error:
        if "RngStream" not in str(error):
            raise
        raise InputError(f"model: found more randomness than for params; {_OUTSIDE}") from error


def _check_variable(name: str, variable: Any) -> None:
    if not isinstance(variable, nnx.Param):
        is_array = isinstance(variable, jax.ShapeDtypeStruct)
        kind = "an array" if is_array else f"a {type(variable).__name__}"
        raise InputError(f"model: {name} is {kind}, expected only nnx.Param; {_OUTSIDE}")
    if str(variable.dtype) not in _PARAM_DTYPES:
        raise InputError(
            f"model: {name} is an nnx.Param of {variable.dtype}, expected one of "
            f"{', '.join(_PARAM_DTYPES)}, since training moves every param along its gradient; "
            "make what stays as it is in __call__"
        )


def _check_opt_state(opt_state: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # which Orbax cannot restore
            raise InputError(
                f"optimizer: found {leaf.dtype} in its state ({path_name(path)}), expected "
                "numbers; a random key may be a `jax.random.PRNGKey`"
            )


def _try_update(tx: optax.GradientTransformation, state: TrainState) -> None:
    def update(params: Params, opt_state: optax.OptState) -> Any:
        return tx.update(in_float32(params), opt_state, in_float32(params))

    try:
        jax.eval_shape(update, state.params, state.opt_state)
    except TypeError as error:
        raise InputError(
            "optimizer: expected to be called as optimizer.update(gradients, state, params), "
            f"without the loss; {error}"
        ) from error


class Own(NamedTuple):
    """Model, optimizer and frozen params of the caller, instead of the config's."""

    model: ModelFactory | None = None
    optimizer: optax.GradientTransformation | None = None
    """Its updates, learning rate included, are added to the params."""
    frozen: Callable[[str], bool] | None = None
    """Name of a param, such as `layers/0/mlp/w_up_DF` -> whether the param is frozen."""


AS_CONFIGURED = Own()


def blueprint_of(config: Config, mesh: Mesh, own: Own = AS_CONFIGURED) -> Blueprint:
    """The blueprint of a run.

    Raises:
      ValueError: as in `make_blueprint`.
    """

    def optimizer(dims: Mapping[ParamPath, Dims | None]) -> optax.GradientTransformation:
        if own.optimizer is None and own.frozen is None:
            return make_optimizer(config.optim, dims)
        return _in_place_of(make_optimizer(config.optim, dims), own)

    return make_blueprint(
        own.model or model_factory(config.model, mesh.devices.flat[0].platform),
        optimizer,
        mesh,
        ema=config.optim.ema_decay is not None,
        deterministic=config.deterministic,
        try_update=own.optimizer is not None,
    )


def _in_place_of(tx: optax.GradientTransformation, own: Own) -> optax.GradientTransformation:
    tx = own.optimizer or tx

    def hold(tree: Any) -> Any:
        if own.frozen is None:
            return tree
        frozen = own.frozen
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.zeros_like(x) if frozen(path_name(path)) else x, tree
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # Zero gradients before: frozen params would count in the norm. Zero updates after: weight
        # decay would change frozen params.
        updates, state = tx.update(hold(updates), state, params)
        if own.optimizer is not None:  # the step subtracts updates
            updates = jax.tree.map(jnp.negative, updates)
        return hold(updates), state

    return optax.GradientTransformation(tx.init, update)


def model_of(config: Config, state: TrainState, model: ModelFactory | None = None) -> nnx.Module:
    """The model with the weights of a state, which the next step of a run consumes."""
    factory = model or model_factory(config.model, jax.default_backend())
    return nnx.merge(_split(factory)[0], state.weights)


def num_bytes(tree: Any) -> int:
    """Bytes of all leaves; a leaf counts once, whatever its sharding."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
