"""`jaxlm eval --follow`: scores each new checkpoint of a running job, from another process."""

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

from jaxlm.checkpoints.entries import identity
from jaxlm.checkpoints.folder import find_checkpoints, run_folder, scan_folder
from jaxlm.checkpoints.manifest import find_damage
from jaxlm.checkpoints.restore import DamagedArrays
from jaxlm.errors import InputError
from jaxlm.evaluation.evals import NAME, Eval, EvalLog, checkpoint_id
from jaxlm.evaluation.score import Scorer


def follow(
    run: str,
    *,
    source: str | None = None,
    out: str | None = None,
    poll_s: float,
    say: Callable[[str], None] = print,
    found: Callable[[Eval], None] = lambda _: None,
) -> None:
    """Evaluates a run's checkpoints, oldest first, until the newest is final and all have a row.

    Nothing in the checkpoint folder is changed. A checkpoint that retention deletes before its turn
    is skipped, and so is a damaged one; both are logged. A checkpoint with a row is not evaluated
    again.

    Args:
      run: a run folder or checkpoint folder.
      source: another `data.source`, whose held-out documents to use instead.
      out: the file to append to; by default `evals.jsonl` in the run folder.
      poll_s: time between two looks at the folder (s).
      say: takes lines for the user.
      found: takes each row, once it is on disk.

    Raises:
      ValueError: there is no such run, another process writes the file, or the data is no longer
        that of the run.
      DiskError: the disk does not respond.
    """
    if not 0 < poll_s < math.inf:
        raise InputError(f"--poll_s: found {poll_s}, expected seconds above 0")
    folder = find_checkpoints(run)
    say_once = functools.cache(say)  # the same lines come with each checkpoint
    scorer = Scorer(source, say_once)
    with EvalLog(Path(out) if out else run_folder(run, folder) / NAME) as log:
        damaged: set[tuple[int, str, str]] = set()
        looked_at: set[int] = set()
        while True:
            steps, missed = scan_folder(folder).sound, False
            done = {(row["step"], row["checkpoint"], row["source"]) for row in log.rows}
            for step, metadata in steps.items():
                key = (step, checkpoint_id(metadata), source or metadata.config["data"]["source"])
                if key in damaged or key in done:
                    continue
                try:
                    row = _evaluate(f"{folder}@{step}", folder / str(step), scorer)
                except DamagedArrays as error:
                    damaged.add(key)
                    say(f"Warning: step {step} is damaged, and was passed over ({error})")
                    continue
                if row is None:
                    missed = True
                    say(f"step {step} was deleted or replaced before it could be evaluated")
                else:
                    log.append(row)
                    found(row)
            now = scan_folder(folder)
            if not missed and now.sound.keys() == steps.keys():
                final = bool(steps) and steps[max(steps)].final
                for step in now.damaged if final else now.damaged.keys() & looked_at:
                    what = now.damaged[step][0]  # at a first look, it may be half committed
                    say_once(f"Warning: step {step} is damaged, and was passed over ({what})")
                looked_at = set(now.damaged)
                if final:
                    return
                time.sleep(poll_s)


def _evaluate(run: str, path: Path, scorer: Scorer) -> Eval | None:
    # None if the checkpoint was deleted or saved again meanwhile.
    before = identity(path)
    try:
        score = scorer(run)
    except (ValueError, OSError) as error:
        if before is None or identity(path) != before:
            return None
        if damage := find_damage(path):
            raise DamagedArrays(damage[0]) from error
        raise
    return {
        "step": score.step,
        "checkpoint": score.checkpoint,
        "source": score.source,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "num_tokens": score.num_tokens,
    }
