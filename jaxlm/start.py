"""Where a run begins: at a new state, at its own latest checkpoint, or at another run's."""

import json
import shutil
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
from jaxlm.resume import Plan, compare_environments, describe_environment
from jaxlm.state import TrainState


class Start(NamedTuple):
    """What the first step goes on from, besides the state."""

    step: int
    """Batches taken in."""
    nonfinite_steps: int
    """Those of them that were not finite."""
    num_worse_evals: int
    """Evals since the best one."""
    owes_eval: bool
    """An eval of this step is due, and its checkpoint holds none."""
    run_id: str | None
    """Identity at the trackers; None for a new run."""
    lineage: list[dict[str, Any]]
    """What was changed on the way here."""


def start_state(
    parts: Parts, plan: Plan, checkpoints: Checkpoints, console: Console
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
        lineage = metadata.lineage
        if plan.recorded:
            lineage = [*lineage, {"step": metadata.step, "changed": list(map(str, plan.recorded))}]
        console.say(f"Resuming from step {metadata.step} of {checkpoints.folder}")
        _tell(metadata, console)
        now = describe_environment(parts.mesh)
        for difference in compare_environments(metadata.environment, now):
            console.warn(f"bits may differ from a run in one piece: {difference}")
        return state, Start(
            metadata.step,
            int(state.nonfinite_steps),
            metadata.num_worse_evals,
            parts.eval_due(metadata.step) and metadata.eval_loss is None,
            metadata.tracking_run_id,
            lineage,
        )
    if source:
        selected = select(source)
        metadata = selected.metadata
        path = selected.folder / str(selected.step)
        if selected.step >= parts.config.num_steps:
            raise ValueError(
                f"branch_from: found step {selected.step}, expected one before num_steps "
                f"({parts.config.num_steps}); add a larger --num_steps"
            )
        if metadata.data_fingerprint != parts.data_fingerprint:
            console.warn(f"the data is not that of {source}; its tokens must mean the same")
        state = state_of(restore_items(path, metadata, items_of(abstract)))
        console.say(f"Branching from step {selected.step} of {selected.folder}")
        _tell(metadata, console)
        lineage = [*metadata.lineage, {"step": selected.step, "branched_from": str(path)}]
        owes_eval = parts.eval_due(selected.step)
        return state, Start(selected.step, int(state.nonfinite_steps), 0, owes_eval, None, lineage)
    return parts.blueprint.make(parts.config.seed), Start(0, 0, 0, False, None, [])


def open_run_folder(parts: Parts, plan: Plan, start: Start, console: Console) -> Metrics:
    """Writes what lies beside the checkpoints, and opens the metrics where the run goes on."""
    config = parts.config
    run_dir, checkpoint_dir = Path(config.run_dir), Path(config.checkpoint_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_dict(config), indent=2) + "\n"
    write_file(run_dir / "config.json", text.encode())
    if parts.tokenizer_path and not (checkpoint_dir / TOKENIZER).exists():
        shutil.copyfile(parts.tokenizer_path, checkpoint_dir / TOKENIZER)
    return Metrics(
        config,
        run_id=start.run_id,
        restored_step=start.step,
        owed_eval=start.owes_eval,
        new_future=bool(plan.recorded),
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
        f"  best eval loss so far: {best if metadata.best_step else 'none'}; "
        f"tokens seen: {metadata.tokens_seen / 1e9:.4f} B"
    )
