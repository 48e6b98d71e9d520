"""Checkpoints side by side: the table of a run or of several, and the difference of two."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.checkpoints.folder import (
    WEIGHTS,
    find_best,
    find_checkpoints,
    list_set_aside,
    list_steps,
    read_steps,
    run_folder,
    select,
)
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.checkpoints.restore import ITEMS, restore_numpy
from jaxlm.checkpoints.skips import to_json
from jaxlm.device.state import path_name
from jaxlm.evaluation.evals import NAME as EVALS
from jaxlm.evaluation.evals import Eval, checkpoint_id, read_evals
from jaxlm.files.durable import folder_bytes
from jaxlm.terminal import track
from jaxlm.tracking.console import format_bytes


def describe_run(run: str) -> dict[str, Any]:
    """The sound checkpoints of a run, as JSON values.

    Returns:
      `run`, `folder`, `weights_only` (steps), `set_aside` (names of damaged ones), `damaged` (those
      not yet set aside, as step -> what is wrong, as far as a quick look shows), `skips` (where the
      run has gone back, as `from_step`, `num_batches` and `why`), and `checkpoints`, as
      `describe_steps` gives them.

    Raises:
      ValueError: there is no such run.
    """
    folder = find_checkpoints(run)
    found, evals = read_steps(folder), read_evals(run_folder(run, folder) / EVALS)
    return {
        "run": run,
        "folder": str(folder),
        "checkpoints": describe_steps(folder, found.sound, evals),
        "weights_only": list_steps(folder / WEIGHTS),
        "set_aside": list_set_aside(folder),
        "skips": to_json(found.skips),
        "damaged": {str(step): damage[0] for step, damage in found.damaged.items()},
    }


def describe_steps(
    folder: Path, found: dict[int, Metadata], evals: Sequence[Eval]
) -> list[dict[str, Any]]:
    """Checkpoints as JSON values.

    Args:
      folder: the checkpoint folder.
      found: those in it.
      evals: the rows of evals.jsonl.

    Returns:
      For each, ascending, `step`, `tokens_seen`, `eval_loss`, `best_eval_loss`, `bytes`, `is`, a
      list of `best`, `latest` and `final`, and `followed`, what `jaxlm eval --follow` found, as
      source -> loss.
    """
    best = find_best({step: metadata.eval_loss for step, metadata in found.items()})
    named = {"best": best.step if best else None, "latest": max(found, default=None)}
    named["final"] = max((step for step in found if found[step].final), default=None)
    rows = []
    for step, metadata in found.items():
        here = (step, checkpoint_id(metadata))
        values = metadata.to_json()
        rows.append(
            {name: values[name] for name in ("step", "tokens_seen", "eval_loss", "best_eval_loss")}
            | {"bytes": folder_bytes(folder / str(step))}
            | {"is": [name for name, at in named.items() if at == step]}
            | {
                "followed": {
                    row["source"]: row["loss"]
                    for row in evals
                    if (row["step"], row["checkpoint"]) == here
                }
            }
        )
    return rows


def format_table(runs: list[dict[str, Any]]) -> str:
    """The table of one run, or of several with a column that tells them apart."""
    several = len(runs) > 1
    width = max(len(run["run"]) for run in runs)
    head = f"{'Step':>7} | {'Tokens (B)':>10} | {'Eval Loss':>9} | {'Best Eval Loss':>14} | "
    sources = sorted(
        {name for run in runs for row in run["checkpoints"] for name in row["followed"]}
    )
    head += "".join(f"{name:>9} | " for name in sources) + f"{'Size':>9} |"
    rule = "|".join("-" * len(part) for part in head.split("|"))
    prefix = f"{'Run':<{width}} | " if several else ""
    lines = [prefix + head, ("-" * (width + 1) + "|-" if several else "") + rule]
    for run in runs:
        for row in run["checkpoints"]:
            start = f"{run['run']:<{width}} | " if several else ""
            cells = (f"{_loss(row['followed'].get(s)):>{max(9, len(s))}} | " for s in sources)
            lines.append(
                f"{start}{row['step']:>7} | {row['tokens_seen'] / 1e9:>10.4f} | "
                f"{_loss(row['eval_loss']):>9} | {_loss(row['best_eval_loss']):>14} | "
                f"{''.join(cells)}"
                f"{format_bytes(row['bytes']):>9} | {', '.join(row['is'])}".rstrip()
            )
    for run in runs:
        for skip in run["skips"]:
            past = f"past {skip['num_batches']} batches: " if skip["num_batches"] else ""
            lines.append(f"went back to step {skip['from_step']}, {past}{skip['why']}")
        for step, damage in run["damaged"].items():
            lines.append(f"damaged: {run['folder']}/{step}: {damage}")
        if steps := run["weights_only"]:
            lines.append(f"weights alone of step {', '.join(map(str, steps))}")
        if run["set_aside"]:
            lines.append(f"damaged, set aside in {run['folder']}: {', '.join(run['set_aside'])}")
    return "\n".join(lines)


def _loss(value: float | str | None) -> str:
    return "-" if value is None else f"{float(value):.4f}"


class Difference(NamedTuple):
    """One array that is not the same in two checkpoints."""

    name: str
    what: str


def diff_checkpoints(run_a: str, run_b: str) -> list[Difference]:
    """The arrays that differ between `RUN_A@STEP` and `RUN_B@STEP`, to the bit.

    Raises:
      ValueError: no such run or step, or it is damaged.
    """
    paths = [select(run, default="latest").path for run in (run_a, run_b)]
    found = []
    for item in track(ITEMS, "Comparing"):  # two whole states may be more than the memory
        a, b = (_arrays(path, item) for path in paths)
        for name in a | b:
            if name not in a or name not in b:
                found.append(Difference(name, f"only in {run_a if name in a else run_b}"))
            elif what := _difference(a[name], b[name]):
                found.append(Difference(name, what))
    return found


def _arrays(path: Path, item: str) -> dict[str, np.ndarray]:
    arrays = restore_numpy(path, [item]) if (path / item).is_dir() else {}
    return {
        path_name(path): np.atleast_1d(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }


def _difference(a: np.ndarray, b: np.ndarray) -> str | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    bits_a, bits_b = (x.view(np.uint8).reshape(*x.shape, -1) for x in (a, b))
    count = int((bits_a != bits_b).any(axis=-1).sum())
    if count == 0:
        return None
    gap = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    scale = float(np.sqrt(np.mean(np.square(a, dtype=np.float64))))
    relative = f", {gap / scale:.1e} of its rms" if scale else ""
    return f"{count} of {a.size} values differ, by up to {gap:.3e}{relative}"
