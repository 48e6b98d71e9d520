"""Where a run begins: a new state, its own latest checkpoint, or another run's checkpoint."""

import contextlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.checkpoints.checkpoint import Checkpoints
from jaxlm.checkpoints.folder import TOKENIZER, Selected, scan_folder, select
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.names import split_step
from jaxlm.checkpoints.restore import check_layout, items_of, restore_state, restore_weights
from jaxlm.cluster import agree
from jaxlm.config import Config, changes, to_dict
from jaxlm.device.sharding import deterministic_options, make_mesh
from jaxlm.device.state import Own, TrainState, blueprint_of
from jaxlm.errors import InputError
from jaxlm.files.durable import write_file
from jaxlm.files.lock import HOLDER, locked
from jaxlm.tracking.console import Console, format_count
from jaxlm.tracking.events import NAME as EVENTS
from jaxlm.tracking.metrics import Metrics
from jaxlm.tracking.rows import NAME as ROWS
from jaxlm.tracking.rows import Rows
from jaxlm.tracking.trackers import OpenTracker
from jaxlm.training.environment import compare_environments, describe_environment
from jaxlm.training.resume import goes_back, is_at_end, log_changes
from jaxlm.training.setup import TrainSetup

CONFIG = "config.json"


class Start(NamedTuple):
    """Where training starts: the counters and records beside the state."""

    step: int = 0
    """Batches taken in."""
    tokens_seen: int = 0
    """Tokens trained on."""
    skipped_steps: int = 0
    """Steps so far that were not applied."""
    num_worse_evals: int = 0
    """Evals since the best one."""
    eval_loss: float | None = None
    """Eval loss in the checkpoint of this step; None without an eval."""
    owes_eval: bool = False
    """Whether an eval is due at this step, and the checkpoint holds no eval loss."""
    owes_end: bool = False
    """Whether the plan ends at this step, and the checkpoint is not marked final."""
    rows: Rows = Rows()
    """Size and checksum of the rows of metrics.jsonl up to this step."""
    tracking_run_id: str | None = None
    """Identity at the trackers; None for a new run."""
    new_future: bool = False
    """Whether later steps may differ from those in metrics.jsonl, by settings or batches."""
    why: str = "new"
    """Human-readable reason for this start."""
    lineage: list[dict[str, Any]] = []  # never changed in place
    """Changes of settings, branches and initializations so far, oldest first."""


def check_beginning(config: Config, own: Own) -> None:
    """Refuses to start from a checkpoint of another model, before any data is prepared.

    Raises:
      ValueError: the checkpoint has other arrays than this run.
    """
    if not (source := config.branch_from or config.init_from):
        return
    selected, mesh = select(source, contents=False), make_mesh(config.mesh)
    items = items_of(blueprint_of(config, mesh, own).abstract)
    items.pop("ema_params", None)  # A moving average may start here.
    wanted = items if config.branch_from else {"params": items["params"]}
    check_layout(selected.metadata.fingerprints, wanted, selected.path)


def start_state(
    parts: TrainSetup, checkpoints: Checkpoints, console: Console
) -> tuple[TrainState, Start]:
    """The state to train from, restored or new, and where training starts.

    Args:
      parts: the parts of the run.
      checkpoints: its folder.
      console: prints where training starts.

    Raises:
      CheckpointError: the folder holds checkpoints, and none is sound.
      ValueError: the checkpoint is of another model, or of other data.
    """
    config, latest, best = parts.config, checkpoints.latest, checkpoints.best
    abstract, restored = parts.blueprint.abstract, None
    if latest and best and goes_back(config, latest, best):
        restored = checkpoints.restore_best(abstract)
    if restored:
        _check_data(parts, restored[1])  # before newer checkpoints are set aside
        checkpoints.go_back(restored[1].step, "--resume best")
    restored = restored or checkpoints.restore_latest(abstract)
    if restored:
        return restored[0], _resumed(parts, checkpoints, *restored, console)
    if config.branch_from:
        return _branch(parts, config.branch_from, console)
    state = parts.blueprint.make(config.seed)
    if config.init_from:
        return _with_weights_of(parts, config.init_from, state, console)
    return state, Start()


def _resumed(
    parts: TrainSetup,
    checkpoints: Checkpoints,
    state: TrainState,
    metadata: Metadata,
    console: Console,
) -> Start:
    config, lineage = parts.config, metadata.lineage
    _check_data(parts, metadata)
    begun = any(entry.keys() & {"branched_from", "initialized_from"} for entry in lineage)
    if (config.branch_from or config.init_from) and not begun:
        console.warn("branch_from and init_from begin a new run; this one has begun, and goes on")
    # Compare with the checkpoint that was restored: after damage, it is older than the latest.
    recorded = [c for c in changes(metadata.run_config(), config) if c.policy == "recorded"]
    log_changes(metadata, config, recorded, console.say)
    if recorded:
        lineage = [*lineage, {"step": metadata.step, "changed": list(map(str, recorded))}]
    console.say(f"Resuming from step {metadata.step} of {checkpoints.folder}")
    _tell(metadata, console)
    off = (
        ["deterministic is off"]
        if deterministic_options(parts.mesh) and not config.deterministic
        else []
    )
    now = describe_environment(parts.mesh)
    for difference in compare_environments(metadata.environment, now) + off:
        console.warn(f"bits may differ from a run in one piece: {difference}")
    at_end = is_at_end(config, metadata.step, metadata.num_worse_evals)
    # A run that drops its moving average keeps the checkpoint that still holds one.
    drops_average = state.ema_params is None and metadata.weights_item == "ema_params"
    return Start(
        step=metadata.step,
        tokens_seen=metadata.tokens_seen,
        skipped_steps=int(state.guard.skipped_steps),
        num_worse_evals=metadata.num_worse_evals,
        eval_loss=metadata.eval_loss,
        owes_eval=(
            parts.eval_due(metadata.step) and metadata.eval_loss is None and not drops_average
        ),
        owes_end=at_end and not metadata.final and not drops_average,
        rows=metadata.rows,
        tracking_run_id=metadata.tracking_run_id,
        new_future=bool(recorded),
        why="; ".join(["resumed", *map(str, recorded)]),
        lineage=lineage,
    )


def _check_data(parts: TrainSetup, metadata: Metadata) -> None:
    if metadata.data_fingerprint != parts.data_fingerprint:
        raise InputError(
            f"data: found fingerprint {parts.data_fingerprint or 'none'}, but step "
            f"{metadata.step} was trained on {metadata.data_fingerprint or 'none'}; bring back the "
            "data of that run (its source has changed since), or add --run_dir for a new run"
        )


def _branch(parts: TrainSetup, source: str, console: Console) -> tuple[TrainState, Start]:
    selected = _selected(parts, source, console)
    metadata, path = selected.metadata, selected.path
    state = restore_state(path, metadata, parts.blueprint.abstract)
    console.say(f"Branching from step {selected.step} of {selected.folder}")
    _tell(metadata, console)
    return state, Start(
        step=selected.step,
        tokens_seen=metadata.tokens_seen,
        skipped_steps=int(state.guard.skipped_steps),
        owes_eval=parts.eval_due(selected.step),
        why=f"branched from {path}",
        lineage=[*metadata.lineage, {"step": selected.step, "branched_from": str(path)}],
    )


def _with_weights_of(
    parts: TrainSetup, source: str, state: TrainState, console: Console
) -> tuple[TrainState, Start]:
    selected = _selected(parts, source, console)
    abstract = parts.blueprint.abstract.params
    state = state._replace(params=restore_weights(selected.path, selected.metadata, abstract))
    state = state if state.ema_params is None else state.begin_ema()
    console.say(f"Beginning with the weights of step {selected.step} of {selected.folder}")
    _tell(selected.metadata, console)
    lineage = [*selected.metadata.lineage, {"step": 0, "initialized_from": str(selected.path)}]
    why = f"new, with the weights of {selected.path}"
    return state, Start(why=why, lineage=lineage)


def _selected(parts: TrainSetup, source: str, console: Console) -> Selected:
    # Process 0 chooses: the best may be another one when the next process looks.
    chosen = select(source) if jax.process_index() == 0 else None
    step = agree(chosen and chosen.step)
    selected = chosen or select(f"{split_step(source)[0]}@{step}", contents=False)
    if selected.metadata.data_fingerprint != parts.data_fingerprint:
        console.warn(f"the data is not that of {source}; its tokens must mean the same")
    for step, damage in selected.passed_over.items():
        console.warn(f"step {step} of {source} is damaged ({damage[0]}) and was passed over")
    return selected


def open_run_folder(
    parts: TrainSetup,
    checkpoints: Checkpoints,
    start: Start,
    console: Console,
    trackers: Sequence[OpenTracker] = (),
) -> AbstractContextManager[Metrics | None]:
    """Writes the config and the tokenizer, and opens metrics.jsonl at the start of training.

    Process 0 alone does this; the others get None.
    """
    if jax.process_index() != 0:
        return contextlib.nullcontext()
    config = parts.config
    run_dir, checkpoint_dir = Path(config.run_dir), Path(config.checkpoint_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_dict(config), indent=2) + "\n"
    write_file(run_dir / CONFIG, text.encode())
    if parts.tokenizer_path:
        write_file(checkpoint_dir / TOKENIZER, parts.tokenizer_path.read_bytes())
    return Metrics(
        config,
        run_id=start.tracking_run_id,
        restored=(start.step, start.rows),
        new_future=start.new_future,
        proofs=lambda: {s: found.rows for s, found in scan_folder(checkpoint_dir).sound.items()},
        events=checkpoints.events,
        trackers=trackers,
        say=console.say,
    )


def hold_run_folder(config: Config, warn: Callable[[str], None]) -> AbstractContextManager[None]:
    """Keeps other trainers out of the run folder meanwhile; process 0 alone does so.

    Raises:
      ValueError: the folder holds files of another program, under names that the run would write.
      RuntimeError: another trainer holds the folder, or the folder cannot be written.
    """
    run_dir = Path(config.run_dir)
    same = run_dir.resolve() == Path(config.checkpoint_dir).resolve()  # which has its own lock
    if same or jax.process_index() != 0:
        return contextlib.nullcontext()
    files = (CONFIG, ROWS, EVENTS, HOLDER)
    return locked(run_dir, required=config.checkpoint.lock == "required", warn=warn, files=files)


def _tell(metadata: Metadata, console: Console) -> None:
    best = f"{metadata.best_eval_loss:.4f} at step {metadata.best_step}"
    console.say(
        f"  best eval loss so far: {'none' if metadata.best_step is None else best}; "
        f"tokens seen: {format_count(metadata.tokens_seen)}"
    )
