"""Compiles the training step for devices that this machine lacks.

Compilation runs in a child process, since a compiler aborts its process on an unknown topology.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from jaxlm.config import Config, from_dict
from jaxlm.device.loss import next_token_loss
from jaxlm.device.sharding import batch_sharding, make_mesh
from jaxlm.device.state import Blueprint, blueprint_of
from jaxlm.errors import InputError, MissingPackageError
from jaxlm.extras import needs
from jaxlm.plan.hlo import read_costs
from jaxlm.training.setup import check_batch, lower_step

_COMMAND = (sys.executable, "-c", "from jaxlm.plan.ahead import main; main()")
# Keeps libtpu from looking for chips or a metadata server, and allows several plans at once.
_ENV_TPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_ID": "0"}
_ENV_TPU |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
_ENV_TPU["TPU_WORKER_HOSTNAMES"] = "localhost"
# The plugin would check versions of CUDA libraries that compilation does not need.
_ENV_CUDA = {"JAX_PLATFORMS": "", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
# An H100 SXM, from XLA's GPU specs (openxla/xla, h100_sxm.txtpb).
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 2 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def examine(config: Config, platform: str, layout: str) -> dict[str, Any]:
    """The result of `examine_step`, run in a child process.

    Returns:
      As `examine_step`; or only `refused`, the compiler's message, if the step needs more memory
      than the device has.

    Raises:
      ValueError: the topology is not known, or the config does not fit it.
      ImportError: the compiler is not installed.
    """
    request = json.dumps({"config": asdict(config), "platform": platform, "layout": layout})
    env = os.environ | (_ENV_TPU if platform == "tpu" else _ENV_CUDA)
    child = subprocess.run(_COMMAND, input=request, capture_output=True, text=True, env=env)
    last = child.stdout.splitlines()[-1:]
    found = json.loads(last[0]) if child.returncode == 0 and last else None
    if found is None:
        lines = [line for line in child.stderr.splitlines() if line.strip()] or ["nothing"]
        # An abort prints its reason first, then its stack.
        message = next((line for line in lines if "Check failed" in line), lines[-1])
        found = {"failed": f"{message.strip()} (exit code {child.returncode})"}
    if "failed" in found:
        raise InputError(
            f"--topology: the compiler for {layout} failed: {found['failed']}; try one that it "
            "knows, such as v5e-16 or v5e:4x8, or a config of other sizes"
        )
    if "missing" in found:
        raise MissingPackageError(found["missing"])
    if "wrong" in found:
        raise InputError(found["wrong"])
    return found


def main() -> None:
    """The child: reads a request from stdin, prints the result as the last line of stdout."""
    request = json.load(sys.stdin)
    try:
        devices = find_devices(request["platform"], request["layout"])
        found = examine_step(from_dict(request["config"]), devices)
    except ImportError as error:
        found = {"missing": str(error)}
    except ValueError as error:
        found = {"wrong": str(error)}
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        found = {"refused" if "RESOURCE_EXHAUSTED" in message else "failed": message}
    print(json.dumps(found))


def find_devices(platform: str, layout: str) -> list[Any]:
    """The devices of a topology, for compilation only.

    Raises:
      ImportError: the compiler for them is not installed.
    """
    if platform == "tpu":
        needs("libtpu", "a plan for TPUs")
        one_chip = {"chips_per_host_bounds": [1, 1, 1]} if layout.endswith(":1x1") else {}
        return topologies.get_topology_desc(layout, "tpu", **one_chip).devices
    needs("jax_cuda13_plugin", "a plan for GPUs")
    jax.devices()  # registers the plugins
    return topologies.get_topology_desc(
        "h100", "cuda", target_config=_H100, topology=layout
    ).devices


def lower_ahead(config: Config, devices: list[Any]) -> tuple[jax.stages.Lowered, Blueprint]:
    """The lowered training step for these devices, and the blueprint of its state.

    Raises:
      ValueError: the mesh divides neither batch nor model.
    """
    mesh = make_mesh(config.mesh, devices)
    check_batch(config, mesh)
    blueprint = blueprint_of(config, mesh)
    mask = 0 if config.model.document_mask else None
    loss = next_token_loss(z_loss=config.z_loss, eos_id=mask, num_chunks=config.loss_chunks)
    shape = config.batch_size, config.seq_len
    tokens = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh))
    example = {"inputs": tokens, "targets": tokens}
    return lower_step(config, blueprint, loss, mesh, example), blueprint


def examine_step(config: Config, devices: list[Any]) -> dict[str, Any]:
    """Compiles the training step for these devices, and measures the program.

    Returns:
      `device_kind`, `mesh`, `memory` (bytes of one device by kind) and `costs` (of one device), as
      JSON values.

    Raises:
      ValueError: the mesh divides neither batch nor model.
      jax.errors.JaxRuntimeError: the step does not fit, or the topology is not known.
    """
    lowered, blueprint = lower_ahead(config, devices)
    compiled = lowered.compile()
    sizes: Any = compiled.memory_analysis()
    abstract = blueprint.abstract
    state = {"params": abstract.params, "optimizer": abstract.opt_state}
    state |= {} if abstract.ema_params is None else {"average": abstract.ema_params}
    memory = {name: _bytes_per_device(tree) for name, tree in state.items()}
    memory |= {
        "batch_and_padding": sizes.argument_size_in_bytes - sum(memory.values()),
        "temporaries": sizes.temp_size_in_bytes,
        "results": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
    }
    costs = read_costs(compiled.as_text() or "")
    collectives = {kind: found._asdict() for kind, found in costs.collectives.items()}
    return {
        "device_kind": devices[0].device_kind,
        "mesh": dict(make_mesh(config.mesh, devices).shape),
        "memory": memory,
        "costs": costs._asdict() | {"collectives": collectives},
    }


def _bytes_per_device(tree: Any) -> int:
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
