"""`jaxlm train`, `prepare`, `prove-resume`, `plan`, `report` and `doctor`."""

import json
from pathlib import Path

import tyro
from tyro.conf import Positional

from jaxlm.cli.arguments import RunAtStep, Runs
from jaxlm.cli.output import notes, show
from jaxlm.errors import InputError
from jaxlm.launch import parse_config, run
from jaxlm.terminal import progress, track

_MAX_TEXT = 60


def train(flags: Positional[tuple[str, ...]] = ()) -> int:
    """Train a config, or resume a run.

    Args:
      flags: a config file or a run folder, then the flags of launch.py.

    Examples:
      jaxlm train configs/tiny.py
      jaxlm train configs/tiny.py --seed 1 --run_dir runs/seed1
      jaxlm train runs/tiny --num_steps 1000
    """
    named = ("--config", *flags) if flags and not flags[0].startswith("-") else flags
    return run(parse_config(named, prog="jaxlm train"))


def prepare(flags: Positional[tuple[str, ...]] = ()) -> int:
    """Prepare the tokens of a config, and show them, without training.

    Args:
      flags: the flags of launch.py.

    Examples:
      jaxlm prepare --config configs/180m.py
      jaxlm prepare --config configs/tiny.py --data.source "text:books/*.txt"
    """
    config = parse_config(flags, prog="jaxlm prepare")
    from jaxlm.checkpoints.folder import list_steps, select
    from jaxlm.corpus.overview import overview
    from jaxlm.data.run_data import load_data
    from jaxlm.training.inputs import rows_of_sources

    with notes(False):
        recorded = None
        if list_steps(Path(config.checkpoint_dir)):
            latest = select(f"{config.checkpoint_dir}@latest", contents=False)
            recorded = latest.recorded_data
        config, data = load_data(config, recorded, grows=True)
        rows_of_sources(config, data)
    training = [dataset.train for dataset in data.sources.values()]
    for name, dataset in data.by_name.items():
        print("\n".join(overview(name, dataset, training)))
    return 0


def batch(run: RunAtStep, *, step: int, row: int | None = None, json: bool = False) -> int:
    """Show the documents that a step of a run trains on.

    Args:
      run: a run folder, or RUN@STEP, whose mixture is taken; the latest if left out.
      step: the step, as in metrics.jsonl.
      row: a row of its batch, from 0; all if left out.
      json: print JSON.

    Examples:
      jaxlm batch runs/tiny --step 100 --row 3
    """
    from jaxlm.evaluation.documents import rows_of_batch

    with notes(json):
        rows = rows_of_batch(run, step, row)
    lines, values = [], []
    for number, found in enumerate(rows, row or 0):
        lines.append(
            f"row {number}: row {found.window} of source {found.source}, pass {found.epoch}"
        )
        pieces = [piece._asdict() for piece in found.pieces]
        values.append({"row": number, **found._asdict(), "pieces": pieces})
        lines += [
            f"  {piece.place}: {piece.num_tokens} tokens from {piece.first} on: "
            f"{piece.text[:_MAX_TEXT]!r}"
            for piece in found.pieces
        ]
    show(values, "\n".join(lines), json)
    return 0


def prove_resume(flags: Positional[tuple[str, ...]] = ()) -> int:
    """Kill and resume a short run of a config, and compare it bit by bit with an uninterrupted one.

    Args:
      flags: --prove_steps, --prove_kills, --prove_seed and --out; and the flags of launch.py.

    Examples:
      jaxlm prove-resume --config configs/tiny.py
      jaxlm prove-resume --config configs/tiny.py --prove_kills 5 --out proof.json
    """
    from jaxlm.files.durable import write_file
    from jaxlm.proof.prove import Settings, describe, prove

    settings, own = tyro.cli(
        Settings, prog="jaxlm prove-resume --config FILE", args=flags, return_unknown_args=True
    )
    config = parse_config(own, prog="jaxlm prove-resume")
    with progress("Training"):
        certificate = prove(config, own, settings)
    if settings.out:
        write_file(settings.out, json.dumps(certificate, indent=2).encode() + b"\n")
    print("\n".join(describe(certificate)))
    return 0 if certificate["proven"] else 1


def plan(flags: Positional[tuple[str, ...]] = ()) -> int:
    """Compute memory, step time and largest batch of a run on devices that this machine lacks.

    Args:
      flags: --topology, --save_cost_s, --mtbf_hours, --max_compiles and --json; and the flags of
        launch.py.

    Examples:
      jaxlm plan --config configs/180m.py --topology v5e-16
      jaxlm plan --config configs/1b.py --topology h100x8 --model.remat full
    """
    from jaxlm.plan import plan as planning

    settings, own = tyro.cli(
        planning.Settings, prog="jaxlm plan --config FILE", args=flags, return_unknown_args=True
    )
    config = parse_config(own, prog="jaxlm plan")
    with progress(f"Compiling for {settings.topology}"):
        report = planning.plan(config, settings)
    show(report, "\n".join(planning.describe(report)), settings.json)
    return 0


def doctor() -> int:
    """Print versions, devices, caches and disk of this machine.

    Examples:
      jaxlm doctor
    """
    from jaxlm.cli.doctor import examine

    print("\n".join(examine()))
    return 0


def report(runs: Runs, *, out: Path = Path("report.html"), json: bool = False) -> int:
    """Make one HTML page of runs: curves, events, checkpoints, time and settings side by side.

    Changes nothing in the runs, which may be training.

    Args:
      runs: run folders, or checkpoint folders.
      out: the file to write; an existing one is replaced.
      json: print JSON.

    Examples:
      jaxlm report runs/tiny
      jaxlm report runs/tiny runs/tiny-2 --out both.html
    """
    from jaxlm.files.durable import check_output_path, write_file
    from jaxlm.report.history import read_history
    from jaxlm.report.page import make_report

    out = check_output_path(out)
    if out.suffix != ".html":
        raise InputError(f"--out: found {out}, expected a name that ends in .html")
    if not runs:
        raise InputError("RUN: found none, expected one run folder or more, such as runs/tiny")
    histories = [read_history(run) for run in track(runs, "Reading")]
    for history in histories:
        if not (history.rows or history.events or history.checkpoints):
            raise InputError(f"{history.run}: found no run, {'; '.join(history.missing)}")
    with progress("Making the page"):
        page = make_report(histories).encode()
    write_file(out, page)
    missing = {history.run: history.missing for history in histories}
    if not json:
        for run, lines in missing.items():
            for line in lines:
                print(f"{run}: {line}")
    show({"out": str(out), "bytes": len(page), "missing": missing}, f"report: {out}", json)
    return 0
