"""`jaxlm eval --follow`: scores each new checkpoint of a running job, from another process."""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxlm.checkpoints.entries import identity
from jaxlm.checkpoints.folder import find_checkpoints, run_folder, scan_folder
from jaxlm.checkpoints.manifest import find_damage
from jaxlm.checkpoints.restore import DamagedArrays
from jaxlm.errors import InputError
from jaxlm.evaluation.evals import NAME, Eval, EvalLog, checkpoint_id
from jaxlm.evaluation.score import Scorer
from jaxlm.inference.load import log_selected
from jaxlm.terminal import prints_lines

_log = logging.getLogger(__name__)


@prints_lines
def follow(
    run: str,
    *,
    source: str | None = None,
    held_out: bool = False,
    out: str | None = None,
    poll_s: float,
    on_row: Callable[[Eval], None] = lambda _: None,
) -> None:
    """Evaluates a run's checkpoints, oldest first, until the newest is final and all have a row.

    The checkpoint folder is not changed. A damaged checkpoint, or one that retention deletes before
    its turn, is skipped with a log line. A checkpoint with a row is not evaluated again.

    Args:
      run: a run folder or checkpoint folder.
      source: another `data.source` to evaluate on, all of it.
      held_out: of `source`, take only the documents that a run on it would hold out.
      out: the file to append to; by default `evals.jsonl` in the run folder.
      poll_s: time between two scans of the folder (s).
      on_row: called with each row, once the row is on disk.

    Raises:
      ValueError: there is no such run, another process writes the file, or the data has changed
        since the run.
      DiskError: the disk does not respond.
    """
    if not 0 < poll_s < math.inf:
        raise InputError(f"--poll_s: found {poll_s}, expected seconds above 0")
    folder = find_checkpoints(run)
    scorer, warn_once = Scorer(source, held_out=held_out), functools.cache(_log.warning)
    with (
        _each_line_once(log_selected.__module__),
        EvalLog(Path(out) if out else run_folder(run, folder) / NAME) as log,
    ):
        damaged: set[tuple[int, str, str]] = set()
        damaged_before: set[int] = set()
        while True:
            steps, missed = scan_folder(folder).sound, False
            done = {(row["step"], row["checkpoint"], row["source"]) for row in log.rows}
            for step, metadata in steps.items():
                key = (
                    step,
                    checkpoint_id(metadata),
                    scorer.label or metadata.config["data"]["source"],
                )
                if key in damaged or key in done:
                    continue
                try:
                    row = _evaluate(f"{folder}@{step}", folder / str(step), scorer)
                except DamagedArrays as error:
                    damaged.add(key)
                    _log.warning(f"step {step} is damaged, and was passed over ({error})")
                    continue
                if row is None:
                    missed = True
                    _log.info(f"step {step} was deleted or replaced before it could be evaluated")
                else:
                    log.append(row)
                    on_row(row)
            now = scan_folder(folder)
            if not missed and now.sound.keys() == steps.keys():
                final = bool(steps) and steps[max(steps)].final
                for step in now.damaged if final else now.damaged.keys() & damaged_before:
                    # Warn at the second scan: the first may see half a commit.
                    reason = now.damaged[step][0]
                    warn_once(f"step {step} is damaged, and was passed over ({reason})")
                damaged_before = set(now.damaged)
                if final:
                    return
                time.sleep(poll_s)


@contextlib.contextmanager
def _each_line_once(name: str) -> Iterator[None]:
    # `log_selected` would repeat the best loss so far with each checkpoint.
    logger, seen = logging.getLogger(name), set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        num_before = len(seen)
        seen.add(record.getMessage())
        return len(seen) > num_before

    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


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
