"""A run from its config to its end: folders, resume and messages."""

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import optax

from jaxlm.checkpoints.checkpoint import Checkpoints
from jaxlm.checkpoints.folder import TOKENIZER, select
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.cluster import check_equal
from jaxlm.config import Config
from jaxlm.data.mixture import keep_stages
from jaxlm.data.run_data import Recorded
from jaxlm.device.loss import Loss
from jaxlm.device.state import ModelFactory, Own
from jaxlm.errors import InputError, RunError
from jaxlm.insides import quiet_orbax
from jaxlm.terminal import output
from jaxlm.tracking.clock import Clock
from jaxlm.tracking.console import Console
from jaxlm.tracking.events import NAME, Events
from jaxlm.tracking.rows import NAME as ROWS
from jaxlm.tracking.rows import find_lost_rows
from jaxlm.tracking.trackers import OpenTracker
from jaxlm.training.at_end import AtEnd, Complete, find_tools
from jaxlm.training.evaluate import EvalSet
from jaxlm.training.inputs import TrainSet
from jaxlm.training.loop import Callback, Hook, Loop, Result
from jaxlm.training.resume import ResumePlan, check_folders, goes_back, plan_resume
from jaxlm.training.setup import TrainSetup, set_up
from jaxlm.training.signals import stop_requests
from jaxlm.training.start import (
    check_beginning,
    hold_run_folder,
    open_run_folder,
    start_state,
)
from jaxlm.training.summary import (
    log_complete,
    log_end,
    log_resume_best,
    log_start,
    log_time,
)

_log = logging.getLogger(__name__)

_training = threading.Lock()


class Watchers(NamedTuple):
    """The caller's functions during the run and at its end; see `train`."""

    callbacks: Sequence[Callback]
    hooks: Sequence[Hook]
    trackers: Sequence[OpenTracker]
    at_end: Sequence[AtEnd]


def train(
    config: Config,
    *,
    model: ModelFactory | None = None,
    loss: Loss | None = None,
    eval_loss: Loss | None = None,
    optimizer: optax.GradientTransformation | None = None,
    frozen: Callable[[str], bool] | None = None,
    batches: TrainSet | None = None,
    eval_batches: EvalSet | Mapping[str, EvalSet] | None = None,
    callbacks: Sequence[Callback] = (),
    hooks: Sequence[Hook] = (),
    trackers: Sequence[OpenTracker] = (),
    at_end: Sequence[AtEnd] | None = None,
) -> Result:
    """Trains until the run is complete, from the latest sound checkpoint if there is one.

    Args:
      config: the run.
      model: `nnx.Rngs -> nnx.Module` of `nnx.Param` alone; by default that of `config.model`.
      loss: `(model, batch) -> (sum over tokens, number of tokens)`; by default next-token
        cross-entropy. See `jaxlm.device.loss`.
      eval_loss: the loss of evals; by default `loss`.
      optimizer: of Optax, with its own learning rate; by default that of `config.optim`.
      frozen: name of a param, such as `layers/0/mlp/w_up_DF` -> whether the param is frozen.
      batches: `(index, rows) -> host arrays` of training batch `index`; by default `config.data`.
      eval_batches: the held-out set; by default that of `config.data`, and none with own `batches`.
        Of several named sets, the first decides the best.
      callbacks: each called with (step, row) for every row of metrics.jsonl.
      hooks: each called with (step, state, row) between two steps.
      trackers: each called once with (config, rows so far); the tracker then receives every row.
      at_end: each called once with the complete run; by default the sample and the report, if
        model and data are those of `config`.

    Raises:
      ValueError: the config, the data or the checkpoints do not fit each other.
      CheckpointError: a checkpoint cannot be restored or saved.
      RuntimeError: another trainer holds these folders, or runs in this process.
    """
    clock, own = Clock(), Own(model, optimizer, frozen)
    if rare := [hook.every for hook in hooks if hook.every < 1]:
        raise InputError(f"hooks: found every={rare[0]}, expected at least 1")
    primary = jax.process_index() == 0
    console = Console(config.num_steps, stream=None if primary else output(None))
    events = Events(Path(config.run_dir) / NAME if primary else None)
    with _alone_in_process(), console.lines():
        with contextlib.ExitStack() as stack:
            stack.callback(console.close)
            stack.enter_context(quiet_orbax())
            stack.enter_context(hold_run_folder(config))
            check_folders(config)
            checkpoints = stack.enter_context(
                Checkpoints(
                    Path(config.checkpoint_dir),
                    config.checkpoint,
                    on_commit=console.saved,
                    events=events,
                )
            )
            plan = plan_resume(config, checkpoints)
            log_resume_best(config, checkpoints.latest, checkpoints.best)
            if plan.complete and (latest := checkpoints.latest):
                return _leave_complete(plan, latest, checkpoints)
            if checkpoints.latest is None:
                check_beginning(config, own)
            parts = set_up(
                plan.config,
                own=own,
                loss=loss,
                eval_loss=eval_loss,
                batches=batches,
                eval_batches=eval_batches,
                data_of_run=_recorded(plan.config, checkpoints),
                clock=clock,
            )
            fingerprints = {n: of["fingerprint"] for n, of in parts.inputs.data.items()}
            check_equal("data", fingerprints)
            log_start(parts)
            stack.push(events.failed)
            acts = find_tools() if at_end is None and not (model or batches) else at_end or ()
            watchers = Watchers(callbacks, hooks, trackers, acts)
            result = _train_to_end(parts, checkpoints, console, clock, watchers)
        log_end(parts.config, result.step, result.complete, result.best)
    return result


def _leave_complete(plan: ResumePlan, latest: Metadata, checkpoints: Checkpoints) -> Result:
    checkpoints.retain()
    log_complete(plan.config, latest, checkpoints.best, plan.changed)
    if jax.process_index() == 0:
        for lost in find_lost_rows(Path(plan.config.run_dir) / ROWS, latest.rows):
            _log.warning(f"{ROWS}: {lost}; bring back a copy of it, if there is one")
    return Result(latest.step, True, checkpoints.best)


def _recorded(config: Config, checkpoints: Checkpoints) -> Recorded | None:
    # The data of the checkpoint that the start goes on from, or of the run that it branches from.
    if checkpoints.latest:
        return _of_own(config, checkpoints)
    if not config.branch_from:
        return None
    if not (found := select(config.branch_from, contents=False).recorded_data):
        return None
    # A branch may train on other text under the same name, of which no stage is known.
    corpora = {**config.data.corpora, **config.data.held_out}
    same = {n: of for n, of in found.datasets.items() if corpora.get(n) == of["source"]}
    return found._replace(datasets=same, phases=keep_stages(found.phases, same))


def _of_own(config: Config, checkpoints: Checkpoints) -> Recorded | None:
    tokenizer, latest, best = checkpoints.folder / TOKENIZER, checkpoints.latest, checkpoints.best
    if latest and best and goes_back(config, latest, best):
        found = checkpoints.find_sound(best=True)
    elif len({json.dumps(of.data, sort_keys=True) for of in checkpoints.steps.values()}) > 1:
        # Only then it matters which one is restored: else the restore alone reads the files.
        found = checkpoints.find_sound()
    else:
        found = latest
    return found.recorded_data(tokenizer) if found else None


@contextlib.contextmanager
def _alone_in_process() -> Iterator[None]:
    # Orbax numbers operations by process, not by manager: a save that starts during another one
    # waits for signals under the other's number, and fails.
    if not _training.acquire(blocking=False):
        raise RunError(
            "another training runs in this process, and their saves would break each other; wait "
            "for its end, or start this one in a separate process"
        )
    try:
        yield
    finally:
        _training.release()


def _train_to_end(
    parts: TrainSetup,
    checkpoints: Checkpoints,
    console: Console,
    clock: Clock,
    watchers: Watchers,
) -> Result:
    config, events = parts.config, checkpoints.events
    with contextlib.ExitStack() as stack:
        request = stack.enter_context(stop_requests(parts.mesh))
        with clock.spent("restore" if checkpoints.latest else "start"):
            state, start = start_state(parts, checkpoints)
        metrics = stack.enter_context(open_run_folder(parts, checkpoints, start, watchers.trackers))
        loop = Loop(
            parts,
            checkpoints,
            metrics,
            console,
            watchers.callbacks,
            watchers.hooks,
            start,
            clock,
            stack.enter_context(parts.inputs.verifying()),
        )
        events.start(start.step, start.why, loop.environment)
        checkpoints.retain()
        with clock.spent("steps"):
            result = loop.run(state, request)
        stopped_by = request.received or "another process"
        why = f"of {config.num_steps} steps" if result.complete else stopped_by
        events.add("end" if result.complete else "stop", result.step, why)
        log_time(clock)
        if result.complete:  # while the trackers are still open
            run = Complete(config, result.step, result.best, events, metrics)
            for act in watchers.at_end:
                act(run)
    return result
