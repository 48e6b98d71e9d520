"""Where a run begins: a new state, its own latest checkpoint, or another run's checkpoint."""

import contextlib
import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.checkpoints.checkpoint import Checkpoints, Restored
from jaxlm.checkpoints.folder import TOKENIZER, Selected, scan_folder, select
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.names import split_step
from jaxlm.checkpoints.restore import check_layout, items_of, restore_state, restore_weights
from jaxlm.cluster import agree
from jaxlm.config import Config, changes, to_dict
from jaxlm.data.mixture import Phase, keep_stages
from jaxlm.data.run_data import Prepared, has_grown
from jaxlm.device.sharding import deterministic_options, make_mesh
from jaxlm.device.state import Own, TrainState, blueprint_of
from jaxlm.errors import InputError
from jaxlm.files.durable import write_file
from jaxlm.files.lock import HOLDER, locked
from jaxlm.tracking.console import format_count
from jaxlm.tracking.events import NAME as EVENTS
from jaxlm.tracking.metrics import Metrics
from jaxlm.tracking.rows import NAME as ROWS
from jaxlm.tracking.rows import Rows
from jaxlm.tracking.trackers import OpenTracker
from jaxlm.training.environment import compare_environments, describe_environment
from jaxlm.training.resume import goes_back, is_at_end, log_changes
from jaxlm.training.setup import TrainSetup

_log = logging.getLogger(__name__)

CONFIG = "config.json"


class Start(NamedTuple):
    """Where training starts: the counters and records that are not in the `TrainState`."""

    step: int = 0
    """Batches taken in."""
    tokens_seen: int = 0
    """Tokens trained on."""
    skipped_steps: int = 0
    """Steps so far without an update: their loss or gradient was NaN, infinite or an outlier."""
    num_worse_evals: int = 0
    """Evals since the best one."""
    eval_loss: float | None = None
    """Eval loss in the checkpoint of this step; None without an eval."""
    owes_eval: bool = False
    """Whether an eval is due at this step, and the checkpoint holds no eval loss."""
    owes_end: bool = False
    """Whether training ends at this step, but its checkpoint is not marked final yet."""
    rows: Rows = Rows()
    """Size and checksum of the rows of metrics.jsonl up to this step."""
    tracking_run_id: str | None = None
    """Identity at the trackers; None for a new run."""
    settings_changed: bool = False
    """Whether a changed setting may make the next rows differ from those cut off metrics.jsonl."""
    why: str = "new"
    """Human-readable reason for this start."""
    phases: list[Phase] = []  # never changed in place
    """The mixture of the sources so far and from here on."""
    data: dict[str, Prepared] = {}  # never changed in place
    """The datasets so far, by name."""
    eval_set: str = ""
    """Names and fingerprints of the held-out sets that decided the best so far."""
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


def start_state(parts: TrainSetup, checkpoints: Checkpoints) -> tuple[TrainState, Start]:
    """The state to train from, and where training starts: the first of these that there is.

    1. With `--resume best`, once: the best of the run's own checkpoints. Newer ones are set aside.
    2. The latest of the run's own checkpoints.
    3. With `branch_from`: the state of another run's checkpoint.
    4. With `init_from`: a new state with the weights of another run's checkpoint.
    5. A new state.

    Raises:
      CheckpointError: the folder holds checkpoints, and none is sound.
      ValueError: the checkpoint is of another model, or of other data.
    """
    config, abstract = parts.config, parts.blueprint.abstract
    restored = _go_back_to_best(parts, checkpoints) or checkpoints.restore_latest(abstract)
    if restored:
        return restored[0], _resumed(parts, checkpoints, *restored)
    if config.branch_from:
        return _branch(parts, config.branch_from)
    state = parts.blueprint.make(config.seed)
    if config.init_from:
        return _with_weights_of(parts, config.init_from, state)
    return state, Start(phases=parts.inputs.phases([], 0))


def _go_back_to_best(parts: TrainSetup, checkpoints: Checkpoints) -> Restored | None:
    latest, best = checkpoints.latest, checkpoints.best
    if not (latest and best and goes_back(parts.config, latest, best)):
        return None
    restored = checkpoints.restore_best(parts.blueprint.abstract)
    if restored:
        _check_data(parts, restored[1])  # before newer checkpoints are set aside
        checkpoints.go_back(restored[1].step, "--resume best")
    return restored


def _resumed(
    parts: TrainSetup, checkpoints: Checkpoints, state: TrainState, metadata: Metadata
) -> Start:
    config, lineage = parts.config, metadata.lineage
    _check_data(parts, metadata)
    begun = any(entry.keys() & {"branched_from", "initialized_from"} for entry in lineage)
    if (config.branch_from or config.init_from) and not begun:
        _log.warning("branch_from and init_from are ignored: this run has begun, and resumes")
    # Compare with the checkpoint that was restored: after damage, it is older than the latest.
    recorded = [c for c in changes(metadata.run_config(), config) if c.policy == "recorded"]
    log_changes(metadata, config, recorded)
    if recorded:
        lineage = [*lineage, {"step": metadata.step, "changed": list(map(str, recorded))}]
    _log.info(f"Resuming from step {metadata.step} of {checkpoints.folder}")
    _log_best(metadata)
    off = (
        ["deterministic is off"]
        if deterministic_options(parts.mesh) and not config.deterministic
        else []
    )
    now = describe_environment(parts.mesh)
    for difference in compare_environments(metadata.environment, now) + off:
        _log.warning(f"bits may differ from an uninterrupted run: {difference}")
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
        settings_changed=bool(recorded),
        why="; ".join(["resumed", *map(str, recorded)]),
        phases=parts.inputs.phases(metadata.phases, metadata.step),
        data=metadata.data,
        eval_set=metadata.eval_set,
        lineage=lineage,
    )


def _goes_on(before: Prepared, now: Prepared) -> bool:
    # Whether a dataset has the tokens that it had, and perhaps more.
    return before["fingerprint"] == now["fingerprint"] or has_grown(before, now)


def _check_data(parts: TrainSetup, metadata: Metadata) -> None:
    inputs = parts.inputs
    before, now, eval_set = metadata.data, inputs.data, inputs.eval_set
    for name in sorted(before.keys() | now.keys()):
        was, found = (of[name]["fingerprint"] if name in of else "none" for of in (before, now))
        goes_on = name not in before or name not in now or _goes_on(before[name], now[name])
        if not goes_on or bool(before) != bool(now):
            source = f" ({of['source']})" if (of := before.get(name, {})).get("source") else ""
            raise InputError(
                f"data: found fingerprint {found} for {name}, but step {metadata.step} was trained "
                f"on {was}{source}; bring back the data of that run (its source has changed "
                "since), or add --run_dir for a new run"
            )
    judged = metadata.best_step is not None and bool(eval_set)
    if judged and metadata.eval_set != eval_set:
        raise InputError(
            f"eval_batches: found {eval_set} to judge best by, but up to step {metadata.step} it "
            f"was {metadata.eval_set or 'none'}; give that held-out set, or add --run_dir for a "
            "new run"
        )


def _branch(parts: TrainSetup, source: str) -> tuple[TrainState, Start]:
    selected = _selected(parts, source)
    metadata, path = selected.metadata, selected.path
    state = restore_state(path, metadata, parts.blueprint.abstract)
    _log.info(f"Branching from step {selected.step} of {selected.folder}")
    now = parts.inputs.data
    same = {n for n, of in metadata.data.items() if n in now and _goes_on(of, now[n])}
    _log_best(metadata)
    return state, Start(
        step=selected.step,
        tokens_seen=metadata.tokens_seen,
        skipped_steps=int(state.guard.skipped_steps),
        owes_eval=parts.eval_due(selected.step),
        why=f"branched from {path}",
        phases=parts.inputs.phases(keep_stages(metadata.phases, same), selected.step),
        data=metadata.data,
        lineage=[*metadata.lineage, {"step": selected.step, "branched_from": str(path)}],
    )


def _with_weights_of(parts: TrainSetup, source: str, state: TrainState) -> tuple[TrainState, Start]:
    selected = _selected(parts, source)
    abstract = parts.blueprint.abstract.params
    state = state._replace(params=restore_weights(selected.path, selected.metadata, abstract))
    state = state if state.ema_params is None else state.begin_ema()
    _log.info(f"Beginning with the weights of step {selected.step} of {selected.folder}")
    _log_best(selected.metadata)
    lineage = [*selected.metadata.lineage, {"step": 0, "initialized_from": str(selected.path)}]
    why = f"new, with the weights of {selected.path}"
    return state, Start(why=why, phases=parts.inputs.phases([], 0), lineage=lineage)


def _selected(parts: TrainSetup, source: str) -> Selected:
    # Process 0 chooses: another process might see a newer best.
    chosen = select(source) if jax.process_index() == 0 else None
    step = agree(chosen and chosen.step)
    selected = chosen or select(f"{split_step(source)[0]}@{step}", contents=False)
    if selected.metadata.data != parts.inputs.data:
        _log.warning(f"the data is not that of {source}; its tokens must mean the same")
    for step, damage in selected.passed_over.items():
        _log.warning(f"step {step} of {source} is damaged ({damage[0]}) and was passed over")
    return selected


def open_run_folder(
    parts: TrainSetup, checkpoints: Checkpoints, start: Start, trackers: Sequence[OpenTracker] = ()
) -> AbstractContextManager[Metrics | None]:
    """Writes the config and the tokenizer, and opens metrics.jsonl, cut back to `start`.

    Process 0 alone does this; the others get None.
    """
    if jax.process_index() != 0:
        return contextlib.nullcontext()
    config = parts.config
    run_dir, checkpoint_dir = Path(config.run_dir), Path(config.checkpoint_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_dict(config), indent=2) + "\n"
    write_file(run_dir / CONFIG, text.encode())
    if parts.inputs.tokenizer_path:
        write_file(checkpoint_dir / TOKENIZER, parts.inputs.tokenizer_path.read_bytes())
    return Metrics(
        config,
        run_id=start.tracking_run_id,
        restored=(start.step, start.rows),
        settings_changed=start.settings_changed,
        proofs=lambda: {s: found.rows for s, found in scan_folder(checkpoint_dir).sound.items()},
        events=checkpoints.events,
        trackers=trackers,
    )


def hold_run_folder(config: Config) -> AbstractContextManager[None]:
    """Locks the run folder while in context; process 0 alone does so.

    Raises:
      ValueError: the folder holds files of another program, under names that the run would write.
      RuntimeError: another trainer holds the folder, or the folder cannot be written.
    """
    run_dir = Path(config.run_dir)
    # The checkpoint folder has its own lock, which is enough if it is the run folder too.
    same = run_dir.resolve() == Path(config.checkpoint_dir).resolve()
    if same or jax.process_index() != 0:
        return contextlib.nullcontext()
    files = (CONFIG, ROWS, EVENTS, HOLDER)
    return locked(run_dir, required=config.checkpoint.lock == "required", files=files)


def _log_best(metadata: Metadata) -> None:
    best = f"{metadata.best_eval_loss:.4f} at step {metadata.best_step}"
    _log.info(
        f"  best eval loss so far: {'none' if metadata.best_step is None else best}; "
        f"tokens seen: {format_count(metadata.tokens_seen)}"
    )
