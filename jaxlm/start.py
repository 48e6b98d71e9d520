"""Where a run begins: at a new state, at its own latest checkpoint, or at another run's."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.assemble import Parts
from jaxlm.checkpoint import Checkpoints
from jaxlm.config import to_dict
from jaxlm.console import Console
from jaxlm.durable import write_file
from jaxlm.folder import TOKENIZER, Metadata, select
from jaxlm.metrics import Metrics
from jaxlm.restore import items_of, restore_items, state_of
from jaxlm.resume import (
    allowed_changes,
    check_owner,
    compare_environments,
    describe_environment,
    is_at_end,
    tell_changes,
)
from jaxlm.state import TrainState


class Start(NamedTuple):
    """What the first step goes on from, besides the state."""

    step: int = 0
    """Batches taken in."""
    tokens_seen: int = 0
    """Tokens trained on."""
    nonfinite_steps: int = 0
    """Those of the steps that were not finite."""
    num_worse_evals: int = 0
    """Evals since the best one."""
    eval_loss: float | None = None
    """The eval loss that the checkpoint of this step holds."""
    owes_eval: bool = False
    """An eval of this step is due, and its checkpoint holds none."""
    owes_end: bool = False
    """The plan ends at this step, and its checkpoint does not say so."""
    run_id: str | None = None
    """Identity at the trackers; None for a new run."""
    new_future: bool = False
    """Settings have changed, so steps made before may be made otherwise now."""
    lineage: list[dict[str, Any]] = []  # never changed in place
    """What was changed on the way here."""


def start_state(
    parts: Parts, checkpoints: Checkpoints, console: Console
) -> tuple[TrainState, Start]:
    """The state to go on from, restored or new.

    Raises:
      CheckpointError: the folder holds checkpoints, and none is sound.
      ValueError: the checkpoint is of another model, or of other data.
    """
    abstract, source = parts.blueprint.abstract, parts.config.branch_from
    restored = checkpoints.restore_latest(abstract)
    if restored:
        state, metadata = restored
        _check_data(parts, metadata)
        # Not those of the plan: it has looked at the latest, which may have been damaged.
        check_owner(metadata, parts.config)
        changed = allowed_changes(metadata, parts.config, checkpoints.folder)
        recorded = [change for change in changed if change.policy == "recorded"]
        tell_changes(metadata, parts.config, recorded, console.say)
        lineage = metadata.lineage
        if source and not any("branched_from" in entry for entry in lineage):
            console.warn("branch_from begins a new run; this folder has one, which goes on")
        if recorded:
            lineage = [*lineage, {"step": metadata.step, "changed": list(map(str, recorded))}]
        console.say(f"Resuming from step {metadata.step} of {checkpoints.folder}")
        _tell(metadata, console)
        now = describe_environment(parts.mesh)
        for difference in compare_environments(metadata.environment, now):
            console.warn(f"bits may differ from a run in one piece: {difference}")
        worse = metadata.num_worse_evals
        at_end = is_at_end(parts.config, metadata.step, worse)
        return state, Start(
            step=metadata.step,
            tokens_seen=metadata.tokens_seen,
            nonfinite_steps=int(state.nonfinite_steps),
            num_worse_evals=worse,
            eval_loss=metadata.eval_loss,
            owes_eval=parts.eval_due(metadata.step) and metadata.eval_loss is None,
            owes_end=at_end and not metadata.final,
            run_id=metadata.tracking_run_id,
            new_future=bool(recorded),
            lineage=lineage,
        )
    if source:
        selected = select(source)
        metadata = selected.metadata
        path = selected.folder / str(selected.step)
        if metadata.data_fingerprint != parts.data_fingerprint:
            console.warn(f"the data is not that of {source}; its tokens must mean the same")
        for step, damage in selected.passed_over.items():
            console.warn(f"step {step} of {source} is damaged ({damage[0]}) and was passed over")
        state = state_of(restore_items(path, metadata, items_of(abstract)))
        console.say(f"Branching from step {selected.step} of {selected.folder}")
        _tell(metadata, console)
        lineage = [*metadata.lineage, {"step": selected.step, "branched_from": str(path)}]
        return state, Start(
            step=selected.step,
            tokens_seen=metadata.tokens_seen,
            nonfinite_steps=int(state.nonfinite_steps),
            owes_eval=parts.eval_due(selected.step),
            lineage=lineage,
        )
    return parts.blueprint.make(parts.config.seed), Start()


def open_run_folder(parts: Parts, start: Start, console: Console) -> Metrics:
    """Writes what lies beside the checkpoints, and opens the metrics where the run goes on."""
    config = parts.config
    run_dir, checkpoint_dir = Path(config.run_dir), Path(config.checkpoint_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_dict(config), indent=2) + "\n"
    write_file(run_dir / "config.json", text.encode())
    if parts.tokenizer_path:
        write_file(checkpoint_dir / TOKENIZER, parts.tokenizer_path.read_bytes())
    return Metrics(
        config,
        run_id=start.run_id,
        restored_step=start.step,
        owed_eval=start.owes_eval,
        new_future=start.new_future,
        say=console.say,
    )


def _check_data(parts: Parts, metadata: Metadata) -> None:
    if metadata.data_fingerprint != parts.data_fingerprint:
        raise ValueError(
            f"data: found fingerprint {parts.data_fingerprint or 'none'}, but step "
            f"{metadata.step} was trained on {metadata.data_fingerprint or 'none'}; bring back the "
            "data of that run (its source has changed since), or add --run_dir for a new run"
        )


def _tell(metadata: Metadata, console: Console) -> None:
    best = f"{metadata.best_eval_loss:.4f} at step {metadata.best_step}"
    console.say(
        f"  best eval loss so far: {'none' if metadata.best_step is None else best}; "
        f"tokens seen: {metadata.tokens_seen / 1e9:.4f} B"
    )
