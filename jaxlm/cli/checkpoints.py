"""`jaxlm checkpoints`: list, compare, verify, prune, copy and average checkpoints."""

from jaxlm.cli.arguments import Folder, Run, RunAtStep, Runs
from jaxlm.cli.output import notes, show
from jaxlm.errors import InputError


def list_all(run: Run, *, json: bool = False) -> int:
    """List the checkpoints of a run: step, tokens, losses, size, and best, latest and final.

    Args:
      run: a run folder, or a checkpoint folder.
      json: print JSON.

    Examples:
      jaxlm checkpoints list runs/tiny
      jaxlm checkpoints list runs/tiny --json
    """
    return compare((run,), json=json)


def compare(runs: Runs, *, json: bool = False) -> int:
    """List the checkpoints of several runs in one table.

    Args:
      runs: run folders, or checkpoint folders.
      json: print JSON.

    Examples:
      jaxlm checkpoints compare runs/tiny runs/tiny-2
    """
    from jaxlm.report.table import describe_run, format_table

    if not runs:
        raise InputError("RUN: found none, expected one run folder or more, such as runs/tiny")
    found = [describe_run(run) for run in runs]
    show(found if len(found) != 1 else found[0], format_table(found), json)
    return 0


def diff(a: RunAtStep, b: RunAtStep) -> int:
    """Compare two checkpoints bit by bit; exit code 0 if every array is equal, else 1.

    Args:
      a: RUN@STEP; STEP is best, latest, final or a number, and latest if left out.
      b: the checkpoint to compare with, likewise.

    Examples:
      jaxlm checkpoints diff runs/tiny@best runs/tiny@latest
    """
    from jaxlm.report.diff import diff_checkpoints

    differences = diff_checkpoints(a, b)
    for difference in differences:
        print(f"{difference.name}: {difference.what}")
    print(f"{len(differences)} arrays differ" if differences else "every array is equal to the bit")
    return 1 if differences else 0


def verify(run: Run, *, eval: bool = False, json: bool = False) -> int:
    """Check every step in full, and the rows of metrics.jsonl; exit code 0 if all is sound, else 1.

    Changes nothing on disk, and may run while the run is training.

    Args:
      run: a run folder, or a checkpoint folder.
      eval: also evaluate the best checkpoint again and compare with its recorded loss.
      json: print JSON.

    Examples:
      jaxlm checkpoints verify runs/tiny
      jaxlm checkpoints verify runs/tiny --eval
    """
    from jaxlm.checkpoints.folder import find_checkpoints, list_corrupt, list_steps, scan_folder
    from jaxlm.checkpoints.verify import verify_rows, verify_step
    from jaxlm.evaluation.score import score
    from jaxlm.terminal import track

    folder, found = find_checkpoints(run), {}
    steps = list_steps(folder)
    if not steps:
        raise InputError(f"{folder}: found no checkpoint to verify; name a folder that has some")
    damaged = scan_folder(folder).damaged  # includes intact steps of another run
    for step in track(steps, "Verifying"):
        if (damage := verify_step(folder, step)) is not None:  # None: deleted meanwhile
            found[step] = damage = damage or damaged.get(step, [])
            if not json:
                print(f"{step}: {'; '.join(damage) or 'sound'}", flush=True)
    (rows, lacking), set_aside = verify_rows(run, folder), list_corrupt(folder)
    sound = not any(found.values()) and not rows
    values = {"folder": str(folder), "steps": found, "set_aside": set_aside, "rows": rows}
    values["lost_rows"] = lacking
    if not json:
        lost = f", but it lacks {lacking}" if lacking else ""
        print(f"metrics.jsonl: {'; '.join(rows) or 'sound'}{lost}")
    if set_aside and not json:
        print(f"damaged, set aside earlier: {', '.join(set_aside)}")
    if eval:
        with notes(json):
            (best,) = score([f"{run}@best"])
        values["eval"] = best.to_json() | {"as_recorded": best.as_recorded}
        sound = sound and best.as_recorded
        if not json:
            for difference in best.differences:
                print(f"bits may differ from the recorded ones: {difference}")
            equal = "equal to the bit" if best.loss == best.recorded_loss else "equal in rounding"
            print(
                f"eval loss of step {best.step}: recorded {best.recorded_loss!r}, found "
                f"{best.loss!r}: {equal if best.as_recorded else 'not the same'}"
            )
    num_damaged = sum(map(bool, found.values()))
    of_rows = ", and so is metrics.jsonl" if rows else ""
    show(values, f"{num_damaged} of {len(found)} steps are damaged{of_rows}", json)
    return 0 if sound else 1


def prune(
    run: Run,
    *,
    keep_latest: int = 1,
    keep_every: int | None = None,
    disk_budget_gb: float | None = None,
    delete: bool = False,
    json: bool = False,
) -> int:
    """List the checkpoints that the rules drop, or delete them; never best and latest.

    Args:
      run: a run folder, or a checkpoint folder.
      keep_latest: number of newest checkpoints to keep.
      keep_every: also keep each step that is a multiple of this.
      disk_budget_gb: of the multiples (of all steps without keep_every) keep only as many as fit,
        evenly spaced (10^9 bytes).
      delete: delete them; refused while the run is training.
      json: print JSON.

    Examples:
      jaxlm checkpoints prune runs/tiny --keep_every 1000
      jaxlm checkpoints prune runs/tiny --disk_budget_gb 50 --delete
    """
    from jaxlm.checkpoints import prune as pruning
    from jaxlm.tracking.console import format_bytes

    plan = pruning.prune if delete else pruning.plan_pruning
    rules = {"keep_latest": keep_latest, "keep_every": keep_every, "disk_budget_gb": disk_budget_gb}
    with notes(json):
        found = plan(run, **rules)
    verb = "deleted" if delete else "would be deleted"
    lines = {step: f"{step}: kept ({why})" for step, why in found.kept.items()}
    lines |= {step: f"{step}: {verb}, {format_bytes(n)}" for step, n in found.dropped.items()}
    total = format_bytes(sum(found.dropped.values()))
    last = f"{len(found.dropped)} of {len(lines)} {verb}, {total}"
    last += "" if delete or not found.dropped else "; add --delete to do it"
    values = {"folder": str(found.folder), "kept": found.kept, "dropped": found.dropped}
    show(values | {"deleted": delete}, "\n".join([lines[s] for s in sorted(lines)] + [last]), json)
    return 0


def copy(run: RunAtStep, dest: Folder, *, json: bool = False) -> int:
    """Copy a run or one step, verified; exit code 1 if a damaged step was left out, else 0.

    The run may be training; a step that it deletes meanwhile is skipped. To restore a copy from a
    bucket (extra gcs), swap the two addresses.

    Args:
      run: RUN or RUN@STEP, or gs://BUCKET/PATH.
      dest: the new run folder, which appears only when it is complete, or gs://BUCKET/PATH.
      json: print JSON.

    Examples:
      jaxlm checkpoints copy runs/tiny /backup/tiny
      jaxlm checkpoints copy runs/tiny@best /backup/tiny-best
    """
    from jaxlm.checkpoints.bucket import download, upload
    from jaxlm.checkpoints.copying import copy_run

    if run.startswith("gs://") and dest.startswith("gs://"):
        raise InputError(f"{run} to {dest}: found two buckets, expected a bucket and a folder")
    copy_there = upload if dest.startswith("gs://") else copy_run
    with notes(json):
        found = (download if run.startswith("gs://") else copy_there)(run, dest)
    steps = ", ".join(map(str, found.steps))
    text = f"copied to {found.folder}, and verified there: {steps}"
    show({**found._asdict(), "folder": str(found.folder)}, text, json)
    return 1 if found.damaged else 0


def average(
    run: Run,
    *,
    last: int = 5,
    steps: tuple[int, ...] | None = None,
    out: str | None = None,
    json: bool = False,
) -> int:
    """Average the weights of checkpoints, evaluate the result and write it to a new folder.

    Args:
      run: a run folder, or a checkpoint folder.
      last: number of newest checkpoints to average.
      steps: the steps to average, instead of the newest.
      out: the new folder, a RUN for `jaxlm eval`; by default RUN-average-FIRST-LAST.
      json: print JSON.

    Examples:
      jaxlm checkpoints average runs/tiny --last 3
      jaxlm checkpoints average runs/tiny --steps 300 400 500 --out runs/mean
    """
    from jaxlm.evaluation.average import average as make_average

    if steps == ():
        raise InputError("--steps: found none, expected two or more")
    with notes(json):
        found = make_average(run, last=last, steps=steps or (), out=out)
    best = min(found.parts.values())
    lines = [f"step {step}: loss {loss:.4f}" for step, loss in found.parts.items()]
    word = "better" if found.loss < best else "worse"
    mean = f"average: loss {found.loss:.4f}, {abs(found.loss - best):.4f} {word} than the best"
    lines += [mean, f"written to {found.folder} (weights only)"]
    show({**found._asdict(), "folder": str(found.folder)}, "\n".join(lines), json)
    return 0
