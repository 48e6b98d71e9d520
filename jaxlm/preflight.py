"""What a run will need, found before its first step."""

import shutil
from pathlib import Path
from typing import Any

import jax

from jaxlm.config import Config
from jaxlm.console import format_bytes, format_count
from jaxlm.state import TrainState

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "OUT_OF_MEMORY")


def count_bytes(abstract: Any) -> int:
    """Bytes of all leaves, each counted once however many devices hold it."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def describe(config: Config, abstract: TrainState, memory: Any, mesh_size: int) -> str:
    """Parameters, tokens and memory, in a line or two.

    Args:
      config: the run.
      abstract: its state.
      memory: `memory_analysis()` of the compiled step, or None where the backend has none.
      mesh_size: number of devices.
    """
    num_params = sum(leaf.size for leaf in jax.tree.leaves(abstract.params))
    text = (
        f"{format_count(num_params)} parameters; {format_count(config.tokens_per_step)} tokens a "
        f"step, {format_count(config.tokens_per_step * config.num_steps)} in all"
    )
    if memory is not None:
        state_bytes, temporary_bytes = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        text += (
            f"\nmemory on each of {mesh_size} device(s): {format_bytes(state_bytes)} state and "
            f"batch, {format_bytes(temporary_bytes)} temporaries"
        )
    return text


def checkpoint_bytes(config: Config, abstract: TrainState) -> int:
    """Bytes that the checkpoints of this plan take at most, besides those kept by `keep_every`.

    The newest, the best, the one being written, and the one being deleted.
    """
    return count_bytes(abstract) * (config.checkpoint.keep_latest + 3)


def disk_warning(config: Config, abstract: TrainState) -> str | None:
    """A warning if the checkpoints will not fit on their disk, or None."""
    state_bytes, needed = count_bytes(abstract), checkpoint_bytes(config, abstract)
    if config.checkpoint.keep_every:
        needed += state_bytes * (config.num_steps // config.checkpoint.keep_every)
    folder = Path(config.checkpoint_dir).absolute()
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed <= free + used:
        return None
    return (
        f"checkpoints need up to {format_bytes(needed)} in {config.checkpoint_dir}, and the disk "
        f"has {format_bytes(free)}; free some, lower --checkpoint.keep_latest or raise "
        "--checkpoint.keep_every"
    )


def memory_advice(error: BaseException, config: Config) -> str | None:
    """What to try, if the error says that memory ran out; else None."""
    if not any(sign in str(error) for sign in _OUT_OF_MEMORY):
        return None
    parts = 2 * config.num_microbatches
    tries = []
    if config.batch_size % parts == 0:
        tries.append(f"--num_microbatches {parts} (the same training, in smaller parts)")
    if not config.model.remat:
        tries.append("--model.remat (recomputes activations, about a third more time)")
    tries.append("--mesh.fsdp N (splits the state over N devices)")
    tries.append(f"--batch_size {max(config.batch_size // 2, 1)} (another run: a new --run_dir)")
    return "the device ran out of memory; try, in this order:\n  " + "\n  ".join(tries)
