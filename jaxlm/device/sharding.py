"""The mesh of devices, and the shardings of arrays from the names of their dims.

A mesh has *axes* (`data`, `fsdp`, `tensor`); an array has *dims* (`batch`, `vocab`, `heads`, …).
`AXES_OF` is the one table between the two.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.config import MeshConfig
from jaxlm.errors import InputError

AXES = ("data", "fsdp", "tensor")
AXES_OF: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "model": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "experts": (),
    None: (),
}
Dims = tuple[str | None, ...]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of those given.

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))
        raise InputError(
            f"mesh: {shape} makes {math.prod(sizes)} devices, but there are {len(devices)}; "
            "set mesh.data, mesh.fsdp and mesh.tensor so that they multiply to that number"
        )
    # Auto axes: GSPMD propagates the shardings, and the code names only the few that matter.
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over the data and fsdp axes, other dims replicated."""
    return NamedSharding(mesh, P(AXES_OF["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds in full."""
    return NamedSharding(mesh, P())


def param_sharding(
    name: str, shape: tuple[int, ...], dims: Dims | None, mesh: Mesh
) -> NamedSharding:
    """The sharding of one parameter.

    Args:
      name: its path, for errors.
      shape: its shape.
      dims: the names of its dims; None (a model that names none) splits the largest dim that the
        fsdp axis divides.
      mesh: the mesh.

    Raises:
      ValueError: the dims are not those of the array, or an axis does not divide one.
    """
    if dims is not None and (len(dims) != len(shape) or not set(dims) <= AXES_OF.keys()):
        known = ", ".join(map(str, AXES_OF))
        raise InputError(
            f"model: {name} of shape {list(shape)} has dims={dims}, expected a name for each dim, "
            f"out of {known}; leave dims out to name none"
        )
    if dims is None:
        fsdp = mesh.shape["fsdp"]
        divisible = [dim for dim, size in enumerate(shape) if fsdp > 1 and size % fsdp == 0]
        largest = max(divisible, key=lambda dim: shape[dim], default=None)
        axes = ("fsdp" if dim == largest else None for dim in range(len(shape)))
        return NamedSharding(mesh, P(*axes))
    for dim, size in zip(dims, shape, strict=True):
        ways = math.prod(mesh.shape[axis] for axis in AXES_OF[dim])
        if size % ways:
            raise InputError(
                f"mesh: {name} has {size} {dim}, which {' x '.join(AXES_OF[dim])} = {ways} does "
                f"not divide; choose a mesh.{AXES_OF[dim][0]} that divides {size}"
            )
    return NamedSharding(mesh, P(*(AXES_OF[dim] or None for dim in dims)))


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """`x` constrained to these dims on the mesh in context; unchanged without a mesh.

    Otherwise GSPMD may shard an activation like a param that `fsdp` splits, and all-gather the
    activations instead of the params.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(AXES_OF[dim] or None for dim in dims)))


def delay_all_gather(x: jax.Array, module: nnx.Module) -> nnx.Module:
    """The module, with the all-gather of its params delayed until `x` is computed.

    Unchanged without fsdp. XLA would otherwise all-gather every block's params before the first
    block runs.
    """
    if not _split_here():
        return module
    graphdef, params = nnx.split(module)
    params, _ = jax.lax.optimization_barrier((params, jax.lax.stop_gradient(x)))
    return nnx.merge(graphdef, params)


def shard_grads(grads: Any, shardings: Any) -> Any:
    """Gradients constrained to `shardings` as soon as they exist; unchanged without fsdp.

    XLA would otherwise keep each gradient replicated and slice it at every use.
    """
    if not _split_here():
        return grads
    grads = jax.lax.with_sharding_constraint(grads, shardings)
    return jax.tree.map(jax.lax.optimization_barrier, grads)


def _split_here() -> bool:
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def put_batch(
    rows_of: Callable[[slice], dict[str, np.ndarray]], mesh: Mesh, batch_size: int
) -> dict[str, jax.Array]:
    """A global batch on the mesh; this process makes only the rows of its own devices.

    Args:
      rows_of: slice of rows -> those rows of the batch, as host arrays [rows, …].
      mesh: the mesh.
      batch_size: rows of the global batch.
    """
    sharding = batch_sharding(mesh)

    @cache
    def made(start: int, stop: int) -> dict[str, np.ndarray]:
        # Copy: on a CPU, JAX uses an aligned host array in place, and a caller that refills its
        # buffers for the next batch would change this one under the step.
        return {
            key: np.array(value, order="C") for key, value in rows_of(slice(start, stop)).items()
        }

    def rows(index: Any) -> dict[str, np.ndarray]:
        start, stop, _ = index[0].indices(batch_size)
        return made(start, stop)

    mine = sharding.addressable_devices_indices_map((batch_size,)).values()
    example = rows(next(iter(mine)))
    return {
        key: jax.make_array_from_callback(
            (batch_size, *value.shape[1:]), sharding, lambda index, key=key: rows(index)[key]
        )
        for key, value in example.items()
    }


def deterministic_options(mesh: Mesh) -> dict[str, Any]:
    """Compiler options under which a program gives the same bits each time, on these devices.

    By default XLA:GPU uses reductions of varying order and chooses kernels by autotuning. Triton
    GEMMs need autotuning too, so they are off and cuBLAS computes every matmul. CPU and TPU need
    no option.
    """
    if mesh.devices.flat[0].platform != "gpu":
        return {}
    return {"xla_gpu_deterministic_ops": True, "xla_gpu_enable_triton_gemm": False}


def compiler_options(mesh: Mesh, deterministic: bool) -> dict[str, Any]:
    """Compiler options of XLA for a step on these devices.

    XLA:TPU would run a matmul with an fsdp-sharded param as a windowed einsum, one shard at a time,
    and reread the activations for each shard. The high threshold makes XLA all-gather the param
    first. With `tensor`, the activations are sharded too, so the default stays.
    """
    options = deterministic_options(mesh) if deterministic else {}
    if mesh.devices.flat[0].platform == "tpu" and mesh.shape["fsdp"] > 1 == mesh.shape["tensor"]:
        options["xla_jf_spmd_threshold_for_windowed_einsum_mib"] = 1 << 20
    return options
