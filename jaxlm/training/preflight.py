"""Memory and disk of a run, checked before its first step; advice when memory runs out."""

import shutil
from pathlib import Path
from typing import Any

import jax
from tokenizers import Tokenizer

from jaxlm.checkpoints.retention import IN_TRANSIT, num_kept
from jaxlm.config import Config
from jaxlm.device.state import TrainState, num_bytes
from jaxlm.errors import InputError
from jaxlm.files.durable import folder_bytes
from jaxlm.tracking.console import format_bytes, format_count

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "OUT_OF_MEMORY")


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
    """Upper bound of the bytes of all checkpoints of a run.

    The newest, the best, the milestones of `keep_every`, and those in transit; and the weights of
    `keep_weights_every`, which come on top of a `disk_budget_gb`.

    Raises:
      ValueError: the newest and the best alone are more than `disk_budget_gb`.
    """
    keep, state_bytes = config.checkpoint, num_bytes(abstract)
    needed = state_bytes * (num_kept(keep) + IN_TRANSIT)
    milestones = config.num_steps // keep.keep_every if keep.keep_every else 0
    weights = config.num_steps // keep.keep_weights_every if keep.keep_weights_every else 0
    weights_bytes = weights * num_bytes(abstract.ema_params or abstract.params)
    if keep.disk_budget_gb is None:
        return needed + state_bytes * milestones + weights_bytes
    if needed > keep.disk_budget_gb * 1e9:
        raise InputError(
            f"checkpoint.disk_budget_gb: found {keep.disk_budget_gb:g}, expected at least "
            f"{needed / 1e9:.3g}: {num_kept(keep)} checkpoints of "
            f"{format_bytes(state_bytes)} kept and two in transit; raise it, or lower "
            "--checkpoint.keep_latest"
        )
    return min(needed + state_bytes * milestones, int(keep.disk_budget_gb * 1e9)) + weights_bytes


def disk_shortage(config: Config, abstract: TrainState) -> str | None:
    """Advice if the checkpoints will not fit on their disk, else None."""
    needed = checkpoint_bytes(config, abstract)
    folder = Path(config.checkpoint_dir).absolute()
    used = folder_bytes(folder)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed <= free + used:
        return None
    keep, tries = config.checkpoint, ["free some"]
    if keep.keep_latest > 1:
        tries.append(f"lower --checkpoint.keep_latest (now {keep.keep_latest})")
    if keep.keep_every:
        tries.append(f"raise --checkpoint.keep_every (now {keep.keep_every})")
        tries.append("set a --checkpoint.disk_budget_gb that it can take")
    return (
        f"checkpoints need up to {format_bytes(needed)} in {config.checkpoint_dir}, and the disk "
        f"has {format_bytes(free)}; {', or '.join(tries)}"
    )


def sample_tokens(config: Config) -> int:
    """Number of new tokens to sample after `sample_prompt`."""
    return min(64, config.seq_len // 2 or 1)


def check_prompt(config: Config, tokenizer_path: Path) -> None:
    """Raises ValueError if `sample_prompt` is too long, which would else fail after training."""
    if not config.sample_prompt:
        return
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    tokens = tokenizer.encode(config.sample_prompt, add_special_tokens=False)
    most = config.seq_len - sample_tokens(config)
    if len(tokens.ids) > most:
        raise InputError(
            f"sample_prompt: found {len(tokens.ids)} tokens, expected at most {most}, so that "
            f"{sample_tokens(config)} new ones fit into a seq_len of {config.seq_len}; shorten it"
        )


def device_advice(error: BaseException, config: Config) -> str | None:
    """Flags to try if the device ran out of memory or a deterministic GPU step fails; else None."""
    if not any(sign in str(error) for sign in _OUT_OF_MEMORY):
        if config.deterministic and jax.default_backend() == "gpu":
            return "--no-deterministic takes any kernel; a resumed run may then differ by rounding"
        return None
    parts = 2 * config.num_microbatches  # half the rows at once
    num_groups = jax.device_count() // config.mesh.tensor  # of devices, among which rows are split
    halves = config.batch_size % (parts * num_groups) == 0
    tries = []
    if halves:
        tries.append(f"--num_microbatches {parts} (the same training, in smaller parts)")
    if config.loss_chunks == 1 and config.seq_len % 8 == 0:
        tries.append("--loss_chunks 8 (never holds all logits)")
    if config.model.remat != "full":
        tries.append("--model.remat products, then full (computes activations again)")
    tries.append("--mesh.fsdp N (splits the state over N devices)")
    if halves:
        tries.append(f"--batch_size {config.batch_size // 2} (another run: a new --run_dir)")
    return "the device ran out of memory; try, in this order:\n  " + "\n  ".join(tries)
