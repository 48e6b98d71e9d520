"""The environment of a run: versions, devices and settings that change its bits."""

import os
import platform
import re
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.checkpoints.metadata import flat
from jaxlm.compilation_cache import cpu_info, num_cores, xla_flags
from jaxlm.extras import versions

# JAX's settings of precision, dtypes, random numbers and optimisation, and their defaults. They are
# recorded where they differ from these, so that metadata stays short.
_JAX_DEFAULTS: dict[str, Any] = {
    "jax_allow_f16_reductions": True,
    "jax_cpu_collectives_implementation": "gloo",
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_disable_most_optimizations": False,
    "jax_enable_x64": False,
    "jax_exec_time_optimization_effort": 0.0,
    "jax_memory_fitting_effort": 0.0,
    "jax_memory_fitting_level": "O2",
    "jax_numpy_dtype_promotion": "standard",
    "jax_optimization_level": "UNKNOWN",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
    "jax_use_shardy_partitioner": True,
}
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
# Flags of XLA that change no bit: dumps, places, compile threads; the mesh has the device count.
_HARMLESS = (
    "xla_dump_",
    "xla_force_host_platform_device_count",
    "xla_gpu_cuda_data_dir",
    "xla_gpu_force_compilation_parallelism",
    "xla_hlo_profile",
)
# The vector and matrix instructions of x86 and ARM, by which XLA chooses how a sum is split.
_VECTOR = re.compile(r"\b(?:amx|avx|fma|f16c|asimd|fphp|sve|bf16|i8mm)\w*")


def describe_environment(mesh: Mesh) -> dict[str, Any]:
    """Versions, devices, cores, and the settings of XLA and JAX that change bits; JSON values."""
    device = mesh.devices.flat[0]
    return {
        "versions": versions(),
        "device_kind": device.device_kind,
        **({"processor": _processor()} if device.platform == "cpu" else {}),
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "cores": num_cores(),
        **{name: flags for name in _FLAGS if (flags := _flags_that_matter(name))},
        **_jax_settings(),
    }


def compare_environments(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences, each as `name: was …, is …`."""
    was, is_now = flat(before), flat(now)
    return [
        f"{name}: was {was.get(name, 'not set')}, is {is_now.get(name, 'not set')}"
        for name in sorted(was.keys() | is_now.keys())
        if was.get(name) != is_now.get(name)
    ]


def _processor() -> str:
    # The instructions, not the name: two names with the same instructions are one to the compiler.
    return " ".join([platform.machine(), *sorted(set(_VECTOR.findall(cpu_info())))])


def _flags_that_matter(variable: str) -> str:
    flags = xla_flags() if variable == "XLA_FLAGS" else os.environ.get(variable, "")
    if not flags.startswith("-"):  # a number, or the error of reading a file of flags
        return flags
    # The last setting of a flag wins; the order of different flags does not matter.
    by_name = {flag.lstrip("-").partition("=")[0]: flag for flag in flags.split()}
    return " ".join(sorted(f for name, f in by_name.items() if not name.startswith(_HARMLESS)))


def _jax_settings() -> dict[str, Any]:
    recorded = {}
    for name, default in _JAX_DEFAULTS.items():
        # The attribute, where there is one, also sees `with jax.enable_x64(True)` around a run.
        value = getattr(jax.config, name, jax.config.values.get(name, default))
        if (value := getattr(value, "value", value)) != default:  # of an enum
            recorded[name] = value
    return recorded
