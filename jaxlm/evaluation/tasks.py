"""Tasks of lm-eval during a run: their results are in the rows of its evals."""

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxlm.config import Config
from jaxlm.device.state import Blueprint, Params
from jaxlm.errors import InputError
from jaxlm.extras import MODULES, needs
from jaxlm.inference.reader import ScoringModel
from jaxlm.training.evaluate import Stopped
from jaxlm.training.setup import Tasks

_log = logging.getLogger(__name__)


def open_tasks(
    config: Config, blueprint: Blueprint, mesh: Mesh, tokenizer_path: Path, eos_id: int
) -> Tasks:
    """The tasks of `config.tasks`, found and loaded before the first step.

    Raises:
      ImportError: lm-eval is not installed.
      ValueError: there is no such task, one has the name of a held-out set, or the run has several
        processes.
    """
    needs(MODULES["lm-eval"], "tasks.names")
    from jaxlm.evaluation.harness import load_tasks, run_tasks

    if (count := jax.process_count()) > 1:
        raise InputError(
            f"tasks.names: found a run of {count} processes, expected one; run the tasks on its "
            "checkpoints with `jaxlm benchmark`"
        )
    names = config.tasks.names or ""
    with _quiet():
        loaded = load_tasks(names, config.tasks.include_path)
    sets = {*config.data.corpora, *config.data.held_out}
    if both := sorted(sets & {*loaded["tasks"], *loaded.get("groups", ())}):
        raise InputError(
            f"tasks.names: found {', '.join(both)}, the name of a held-out set too, expected "
            "different ones; rename the held-out set or the task"
        )
    limit, every = config.tasks.limit, config.tasks.interval
    sizes = [min(len(task.eval_docs), limit or sys.maxsize) for task in loaded["tasks"].values()]
    _log.info(
        f"tasks: {names} ({sum(sizes):,} documents) every {every:,} steps, and at the last step"
    )
    model = ScoringModel(
        blueprint,
        mesh,
        config,
        tokenizer_path,
        eos_id,
        batch_size=config.micro_batch_size,
    )

    def run(step: int, weights: Params, stops: Callable[[], bool]) -> dict[str, float]:
        def look() -> None:
            if stops():
                raise Stopped

        with _quiet():
            found = run_tasks(model.at(step, weights), loaded, limit=limit, look=look)
        return {
            f"eval/{task}/{metric.replace(',none', '').replace(',', '_')}": float(value)
            for task, metrics in found.items()
            for metric, value in metrics.items()
            if isinstance(value, float)
        }

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # lm-eval draws a bar for each stage of its work.
    with contextlib.redirect_stderr(io.StringIO()):
        yield
