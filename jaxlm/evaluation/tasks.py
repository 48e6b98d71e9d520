"""Tasks of lm-eval during a run: their results are in the rows of its evals."""

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.config import Config
from jaxlm.device.state import Blueprint, Params
from jaxlm.errors import InputError
from jaxlm.extras import MODULES, needs
from jaxlm.inference.reader import ScoringModel
from jaxlm.training.evaluate import Stopped
from jaxlm.training.setup import Tasks


def open_tasks(
    config: Config, blueprint: Blueprint, mesh: Mesh, tokenizer_path: Path, eos_id: int
) -> Tasks:
    """The tasks of `config.tasks`, found and loaded before the first step.

    Raises:
      ImportError: lm-eval is not installed.
      ValueError: there is no such task, or the run has several processes.
    """
    needs(MODULES["lm-eval"], "tasks.names")
    from jaxlm.evaluation.harness import find_tasks, run_tasks

    if jax.process_count() > 1:
        raise InputError(
            "tasks.names: found tasks in a run of several processes, expected one; run them on its "
            "checkpoints with `jaxlm benchmark`"
        )
    names = [name for name in (config.tasks.names or "").split(",") if name]
    manager = find_tasks(names, config.tasks.include_path)
    with own_random_state():
        manager.load(names)
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

        with own_random_state():
            found = run_tasks(
                model.at(step, weights), names, manager, limit=config.tasks.limit, look=look
            )
        return {
            f"eval/{task}/{metric.replace(',none', '').replace(',', '_')}": value
            for task, metrics in found.items()
            for metric, value in metrics.items()
            if isinstance(value, float)
        }

    return run


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """Restores the generators of the process, which lm-eval seeds and own batches may use."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
