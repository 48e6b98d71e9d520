"""Averages the weights of several checkpoints of a run into a new run folder."""

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlm.checkpoints.copying import check_outside
from jaxlm.checkpoints.folder import TOKENIZER, Selected, find_checkpoints, run_folder, scan_folder
from jaxlm.checkpoints.manager import args_of
from jaxlm.checkpoints.manifest import write_manifest
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.reading import read
from jaxlm.checkpoints.restore import DamagedArrays, restore_numpy
from jaxlm.device.fingerprint import fingerprint
from jaxlm.errors import InputError
from jaxlm.evaluation.score import score
from jaxlm.files.durable import write_file
from jaxlm.files.ours import mark
from jaxlm.files.publish import check_free, published
from jaxlm.terminal import log_to, prints_lines, progress
from jaxlm.tracking.rows import Rows


class Averaged(NamedTuple):
    """An average, and the losses of the average and of its parts."""

    folder: Path
    """The new run folder, with one checkpoint that holds weights only."""
    step: int
    """Step of the newest part."""
    loss: float
    """Held-out loss of the average (nats per token)."""
    parts: dict[int, float]
    """Step -> held-out loss of each part."""


@prints_lines
def average(
    run: str, *, last: int = 5, steps: Sequence[int] = (), out: str | None = None
) -> Averaged:
    """Averages the weights of checkpoints, evaluates the result and writes it to a new folder.

    Latest weight averaging (Sanyal et al., "Early Weight Averaging meets High Learning Rates for
    LLM Pre-training", 2306.03241). The run itself is not changed.

    Args:
      run: a run folder or checkpoint folder.
      last: number of newest sound checkpoints to average; all, if there are fewer.
      steps: the steps to average, instead of the newest.
      out: the new folder; by default RUN-average-FIRST-LAST.

    Raises:
      ValueError: no such run or step, fewer than two checkpoints, one is damaged, `out` exists, or
        the run's held-out set is not available.
    """
    if last < 2:
        raise InputError(f"--last: found {last}, expected at least 2 checkpoints to average")
    folder = find_checkpoints(run)
    chosen = sorted(set(steps)) or list(scan_folder(folder).sound)[-last:]
    if len(chosen) < 2:
        raise InputError(
            f"{run}: found {len(chosen)} checkpoint(s) to average, expected at least 2; "
            "`jaxlm checkpoints list` lists them, and --checkpoint.keep_every keeps more"
        )
    run_dir = run_folder(run, folder)
    target = check_free(out or f"{run_dir.resolve()}-average-{chosen[0]}-{chosen[-1]}")
    check_outside(target, run_dir, folder)
    with published(target) as partial:
        params, newest = _mean_params(folder, chosen)
        path = partial / "checkpoints" / str(newest.step)
        _save(path, params)
        mark(partial)
        mark(path.parent)
        entry = {"step": newest.step, "averaged": chosen, "of": str(folder.absolute())}
        metadata = replace(
            newest,
            best_step=newest.step,
            num_worse_evals=0,
            final=False,
            lineage=[*newest.lineage, entry],
            rows=Rows(),  # metrics.jsonl stays with the run
            run_id=secrets.token_hex(8),
            fingerprints=fingerprint(params),
        )
        _write_metadata(path, metadata)
        if (folder / TOKENIZER).is_file():
            write_file(path.parent / TOKENIZER, (folder / TOKENIZER).read_bytes())
        names = [f"{partial}@{newest.step}", *(f"{folder}@{step}" for step in chosen)]
        with log_to(lambda line: None):  # a log line would name the temporary folder
            mean, *others = score(names)
        losses = {"eval_loss": mean.loss, "best_eval_loss": mean.loss}
        _write_metadata(path, replace(metadata, **losses, environment=mean.environment))
    parts = {step: other.loss for step, other in zip(chosen, others, strict=True)}
    return Averaged(target, newest.step, mean.loss, parts)


def _mean_params(folder: Path, steps: Sequence[int]) -> tuple[dict[str, Any], Metadata]:
    # Mean, and metadata of the newest part. Memory holds one part at a time and a float64 sum.
    with progress("Averaging", len(steps)) as advance:
        params, newest = _verified_params(folder, steps[0])
        total = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        for step in steps[1:]:
            advance(1)
            params, newest = _verified_params(folder, step)
            total = jax.tree.map(lambda a, leaf: a + leaf.astype(np.float64), total, params)
    return jax.tree.map(lambda a, leaf: (a / len(steps)).astype(leaf.dtype), total, params), newest


def _verified_params(folder: Path, step: int) -> tuple[dict[str, Any], Metadata]:
    return read(f"{folder}@{step}", _restore)  # verifies files, then arrays


def _restore(selected: Selected) -> tuple[dict[str, Any], Metadata]:
    item, saved = selected.metadata.weights_item, selected.metadata.fingerprints
    weights = restore_numpy(selected.path, [item])
    for name, found in fingerprint(weights).items():
        if found != saved.get(name):
            raise DamagedArrays(f"{selected.path}: {name} differs from what was saved")
    return {"params": weights[item]}, selected.metadata


def _save(path: Path, params: dict[str, Any]) -> None:
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(use_compression=False),
        "meta": ocp.JsonCheckpointHandler(),
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
        checkpointer.save(path.absolute(), args=args_of(params))


def _write_metadata(path: Path, metadata: Metadata) -> None:
    metadata.write(path)
    write_manifest(path)
