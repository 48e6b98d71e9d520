"""Lines logged before the first step and after the last."""

import logging
from pathlib import Path

from jaxlm.checkpoints.folder import Best
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.config import Change, Config
from jaxlm.device.state import num_bytes
from jaxlm.errors import InputError
from jaxlm.tracking.clock import Clock
from jaxlm.tracking.console import format_bytes, format_duration
from jaxlm.training import preflight
from jaxlm.training.resume import goes_back
from jaxlm.training.setup import TrainSetup

_log = logging.getLogger(__name__)


def log_start(parts: TrainSetup) -> None:
    """Logs a summary of the config, its memory and disk, and warnings about it.

    Raises:
      ValueError: the disk is too small, and `on_low_disk` is `refuse`.
    """
    config, abstract = parts.config, parts.blueprint.abstract
    model, optim = config.model, config.optim
    shape = (
        f"{model.num_layers} layers, d_model {model.d_model}, {model.num_heads} heads of "
        f"{model.head_dim} ({model.num_kv_heads} for keys and values), vocabulary "
        f"{model.vocab_size}"
    )
    _log.info(
        f"run {config.run_dir}: {'a model of your own' if parts.own.model else shape}; "
        f"{config.num_steps} steps of {config.batch_size} x {config.seq_len} tokens; "
        f"{optim.schedule} schedule, learning rate {optim.learning_rate:g}"
    )
    memory = parts.compiled.memory_analysis()
    _log.info(preflight.describe(config, abstract, memory, parts.mesh.size))
    state_bytes = num_bytes(abstract)
    _log.info(
        f"checkpoints: {format_bytes(state_bytes)} each, at most "
        f"{format_bytes(preflight.checkpoint_bytes(config, abstract))} on disk, every "
        f"{config.checkpoint.save_interval} steps in {config.checkpoint_dir}"
    )
    _log_evals(parts)
    if shortage := preflight.disk_shortage(config, abstract):
        if config.checkpoint.on_low_disk == "refuse":
            raise InputError(f"{shortage}, or add --checkpoint.on_low_disk warn")
        _log.warning(shortage)
    if not config.intervals_nest:
        _log.warning(
            f"save_interval {config.checkpoint.save_interval} and eval_interval "
            f"{config.eval_interval} seldom meet; keep them equal to have a checkpoint at each eval"
        )


def _log_evals(parts: TrainSetup) -> None:
    # An eval costs a third of a step on the same tokens: it has no backward pass.
    config = parts.config
    count = -(-config.num_steps // config.eval_interval)
    num_batches = sum(of.num_batches for of in parts.held_out.values())
    num_tokens = num_batches * config.micro_batch_size * config.seq_len
    if not num_tokens:
        return
    work = count * num_tokens / 3
    share = work / (work + config.num_steps * config.tokens_per_step)
    advice = "; fewer with --eval_interval or, in a new run, --data.eval_tokens" * (share > 0.25)
    _log.info(f"evals: {count} of {num_tokens:,} tokens, {share:.0%} of the run's work{advice}")


def log_resume_best(config: Config, latest: Metadata | None, best: Best | None) -> None:
    """Logs the reason if `--resume best` does not go back."""
    if config.resume != "best" or not (latest and best) or goes_back(config, latest, best):
        return
    if best.step == latest.step:
        _log.info(f"the best, step {best.step}, is the latest: there is nothing to go back from")
        return
    _log.warning(
        f"a run with --resume best made step {latest.step}, so it goes on from there; to begin "
        f"again at step {best.step}, add --branch_from {config.run_dir}@best --run_dir NEW"
    )


def log_complete(
    config: Config, latest: Metadata, best: Best | None, changed: list[Change]
) -> None:
    """Logs that the run is complete, and how to train on.

    Raises:
      ValueError: the run was trained with other recorded settings, beside `num_steps`.
    """
    if latest.step < config.num_steps:
        reason = f"ended at step {latest.step}: {latest.num_worse_evals} evals without a new best"
        more = "a larger --stop_after_worse_evals"
    else:
        reason = f"is complete at step {latest.step} (num_steps is {config.num_steps})"
        more = "a larger --num_steps"
    # A run that already has more steps than this command asks for counts as complete.
    recorded = [str(c) for c in changed if c.policy == "recorded" and c.name != "num_steps"]
    if recorded:
        raise InputError(
            f"run {config.run_dir} {reason}, so nothing was trained with other settings:\n  "
            + "\n  ".join(recorded)
            + f"\nadd --run_dir for a new run, {more} to go on with these, or set them back"
        )
    _log.info(f"run {config.run_dir} {reason}")
    for change in changed:
        _log.info(f"  this command differs in {change}")
    _log.info(f"to go on with it, add {more}; for a new run, add --run_dir")
    _log_where(config, best)


def log_time(clock: Clock) -> None:
    """Logs the time of this start by kind of work, largest first."""
    seconds = sorted(clock.seconds().items(), key=lambda item: -item[1])
    total_s = sum(s for _, s in seconds)
    shares = ", ".join(f"{kind} {s / total_s:.1%}" for kind, s in seconds if s > 0.0005 * total_s)
    _log.info(f"time: {format_duration(total_s)}, of it {shares}")


def log_end(config: Config, step: int, complete: bool, best: Best | None) -> None:
    """Logs the result, the paths and the next command."""
    if not complete:
        _log.info(f"stopped at step {step} of {config.num_steps}, saved; the same command goes on")
        return
    _log.info(f"done: {step} steps")
    if best and best.step < step:
        evals = -(-(step - best.step) // config.eval_interval)
        flags = f"--branch_from {config.run_dir}@best --run_dir {config.run_dir}-2"
        if config.checkpoint.directory:
            flags += f" --checkpoint_dir {config.checkpoint.directory}-2"
        _log.info(
            f"best was {evals} eval(s) ago, at step {best.step}; to go on from there with other "
            f"settings (a lower --optim.learning_rate, say), the same command with\n  {flags}"
        )
    _log_where(config, best)


def _log_where(config: Config, best: Best | None) -> None:
    run = config.run_dir
    if best:
        _log.info(f"best model: {run}@best (step {best.step}, eval loss {best.loss:.4f})")
    _log.info(
        f"metrics: {Path(run) / 'metrics.jsonl'}; checkpoints: {config.checkpoint_dir}\n"
        f"next: jaxlm checkpoints list {run}"
    )
