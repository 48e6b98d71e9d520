"""The checkpoints of runs as a table. Must not import JAX, which takes seconds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxlm.checkpoints.folder import (
    TOKENIZER,
    WEIGHTS,
    find_best,
    find_checkpoints,
    list_corrupt,
    list_steps,
    run_folder,
    scan_folder,
)
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.evaluation.evals import NAME as EVALS
from jaxlm.evaluation.evals import Eval, checkpoint_id, read_evals
from jaxlm.files.durable import crc32c, folder_bytes
from jaxlm.tracking.console import format_bytes, format_count


def describe_run(run: str) -> dict[str, Any]:
    """The sound checkpoints of a run, as JSON values.

    Returns:
      `run`, `folder`, `tokenizer` (an identity), `weights_only` (steps), `set_aside` (names of
      quarantined steps), `damaged` (step -> first damage found by a quick scan, of steps not yet
      set aside), and `checkpoints`, the result of `describe_steps`.

    Raises:
      ValueError: there is no such run.
    """
    folder = find_checkpoints(run)
    found, evals = scan_folder(folder), read_evals(run_folder(run, folder) / EVALS)
    return {
        "run": run,
        "folder": str(folder),
        "tokenizer": tokenizer_id(folder),
        "checkpoints": describe_steps(folder, found.sound, evals),
        "weights_only": list_steps(folder / WEIGHTS),
        "set_aside": list_corrupt(folder),
        "damaged": {str(step): damage[0] for step, damage in found.damaged.items()},
    }


def tokenizer_id(folder: Path) -> str | None:
    """A checksum of the run's tokenizer; None if it has none."""
    try:
        return f"{crc32c(folder / TOKENIZER):08x}"
    except FileNotFoundError:
        return None


def describe_steps(
    folder: Path, found: dict[int, Metadata], evals: Sequence[Eval]
) -> list[dict[str, Any]]:
    """Checkpoints as JSON values.

    Args:
      folder: the checkpoint folder.
      found: step -> metadata of the checkpoints in the folder.
      evals: rows of evals.jsonl.

    Returns:
      For each checkpoint, ascending: `step`, `tokens_seen`, `eval_loss`, `bits_per_byte` (of that
      eval; None if unknown), `best_eval_loss`, `bytes`,
      `is` (a list of `best`, `latest` and `final`), and `followed` (source -> loss that
      `jaxlm eval --follow` measured).
    """
    best = find_best({step: metadata.eval_loss for step, metadata in found.items()})
    named = {"best": best.step if best else None, "latest": max(found, default=None)}
    named["final"] = max((step for step in found if found[step].final), default=None)
    rows = []
    for step, metadata in found.items():
        here, values = (step, checkpoint_id(metadata)), metadata.to_json()
        followed = {e["source"]: e["loss"] for e in evals if (e["step"], e["checkpoint"]) == here}
        rows.append(
            {name: values[name] for name in ("step", "tokens_seen", "eval_loss", "best_eval_loss")}
            | {"bits_per_byte": metadata.bits_per_byte}
            | {"bytes": folder_bytes(folder / str(step))}
            | {"is": [name for name, at in named.items() if at == step], "followed": followed}
        )
    return rows


def format_table(runs: list[dict[str, Any]]) -> str:
    """The table of one run, or of several with a column for the run."""
    sources = {name for run in runs for row in run["checkpoints"] for name in row["followed"]}
    differ = len({run["tokenizer"] for run in runs}) > 1
    bits: dict[str, Callable[[Any], str]] = {
        "Bits/Byte": lambda row: _loss(row["bits_per_byte"]),
    }
    columns: dict[str, Callable[[Any], str]] = {
        "   Step": lambda row: str(row["step"]),
        "Tokens": lambda row: format_count(row["tokens_seen"]),
        "Eval Loss": lambda row: _loss(row["eval_loss"]),
        **(bits if differ else {}),
        "Best Eval Loss": lambda row: _loss(row["best_eval_loss"]),
        **{f"{s:>9}": lambda row, s=s: _loss(row["followed"].get(s)) for s in sorted(sources)},
        "     Size": lambda row: format_bytes(row["bytes"]),
    }
    width = max(len(run["run"]) for run in runs)

    def start(name: str) -> str:
        return f"{name:<{width}} | " if len(runs) > 1 else ""

    head = f"{start('Run')}{' | '.join(columns)} |"
    lines = [head, "|".join("-" * len(part) for part in head.split("|"))]
    for run in runs:
        for row in run["checkpoints"]:
            cells = [f"{cell(row):>{len(title)}}" for title, cell in columns.items()]
            text = " | ".join([*cells, ", ".join(row["is"])])
            lines.append(start(run["run"]) + text.rstrip())
    if differ:
        lines.append("the tokenizers differ: compare bits per byte, not losses per token")
    for run in runs:
        for step, damage in run["damaged"].items():
            lines.append(f"damaged: {run['folder']}/{step}: {damage}")
        if steps := run["weights_only"]:
            lines.append(f"weights alone of step {', '.join(map(str, steps))}")
        if run["set_aside"]:
            lines.append(f"damaged, set aside in {run['folder']}: {', '.join(run['set_aside'])}")
    return "\n".join(lines)


def _loss(value: float | str | None) -> str:
    return "-" if value is None else f"{float(value):.4f}"
