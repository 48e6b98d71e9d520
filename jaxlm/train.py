"""The training loop: steps, evals and saves, from the latest checkpoint to the end of the plan."""

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jaxlm.assemble import Parts, TrainSet, assemble
from jaxlm.checkpoint import CheckpointError, Checkpoints
from jaxlm.cluster import check_alike
from jaxlm.config import Config, to_dict
from jaxlm.console import Console
from jaxlm.data.batches import prefetch
from jaxlm.divergence import Diverged, check_losses
from jaxlm.evaluate import EvalSet, evaluate
from jaxlm.folder import Best
from jaxlm.loss import Batch, Loss
from jaxlm.metadata import Metadata
from jaxlm.metrics import Metrics, perplexity
from jaxlm.resume import check_folders, describe_environment, is_at_end, plan_resume
from jaxlm.signals import StopRequest, stop_requests
from jaxlm.start import Start, beginning_of, open_run_folder, start_state
from jaxlm.state import ModelFactory, TrainState
from jaxlm.step import StepMetrics
from jaxlm.summary import tell_complete, tell_end, tell_resume_best, tell_start
from jaxlm.throughput import Meter, flops_per_token

Callback = Callable[[int, dict[str, float]], None]


class Result(NamedTuple):
    """How a call of `train` ended."""

    step: int
    """Steps done."""
    complete: bool
    """Whether the plan is at its end; else the run was stopped, and goes on when called again."""
    best: Best | None
    """The best checkpoint on disk."""


def train(
    config: Config,
    *,
    model: ModelFactory | None = None,
    loss: Loss | None = None,
    batches: TrainSet | None = None,
    eval_batches: EvalSet | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Trains to the end of the plan, from the latest sound checkpoint if there is one.

    Args:
      config: the run.
      model: `nnx.Rngs -> nnx.Module` of `nnx.Param`s; by default the decoder of `config.model`.
      loss: `(model, batch) -> (sum over tokens, number of tokens)`; by default next-token
        cross-entropy.
      batches: `(index, rows) -> host arrays` of training batch `index`; by default `config.data`.
      eval_batches: the held-out set; by default that of `config.data`, and none with own `batches`.
      callbacks: each called with (step, row) for every row of metrics.jsonl.

    Raises:
      ValueError: the config, the data or the checkpoints do not fit each other.
      CheckpointError: the checkpoints cannot be had or kept.
    """
    primary = jax.process_index() == 0
    console = Console(config.num_steps, stream=None if primary else open(os.devnull, "w"))
    check_folders(config)
    with contextlib.ExitStack() as stack:
        stack.callback(console.close)
        checkpoints = stack.enter_context(
            Checkpoints(
                Path(config.checkpoint_dir),
                config.checkpoint,
                on_commit=console.saved,
                warn=console.warn,
            )
        )
        plan = plan_resume(config, checkpoints)
        tell_resume_best(config, checkpoints.latest, checkpoints.best, console)
        if plan.complete and (latest := checkpoints.latest):
            tell_complete(plan.config, latest, checkpoints.best, plan.changed, console)
            return Result(latest.step, True, checkpoints.best)
        parts = assemble(
            plan.config,
            model=model,
            loss=loss,
            batches=batches,
            eval_batches=eval_batches,
            say=console.say,
        )
        check_alike("data", {"fingerprint": parts.data_fingerprint})
        tell_start(parts, console)
        request = stack.enter_context(stop_requests(parts.mesh))
        result = _train_to_end(parts, checkpoints, console, callbacks, request)
    tell_end(parts.config, result.step, result.complete, result.best, console)
    return result


def _train_to_end(
    parts: Parts,
    checkpoints: Checkpoints,
    console: Console,
    callbacks: Sequence[Callback],
    request: StopRequest,
) -> Result:
    rolled_back = False
    while True:  # once, and once more for each rollback: it is a resume, of its own accord
        state, start = start_state(parts, checkpoints, console, rolled_back=rolled_back)
        with open_run_folder(parts, start, console) as metrics:
            run = _Run(parts, checkpoints, metrics, console, callbacks, start)
            try:
                return run.loop(state, request)
            except Diverged as spike:
                checkpoints.roll_back(
                    spike.step - spike.num_steps,
                    spike.step,
                    str(spike),
                    beginning=beginning_of(start.lineage),
                    max_rollbacks=parts.config.guard.max_rollbacks,
                )
                rolled_back = True


class _Run:
    """A run under way: what the loop keeps besides the state."""

    def __init__(
        self,
        parts: Parts,
        checkpoints: Checkpoints,
        metrics: Metrics | None,
        console: Console,
        callbacks: Sequence[Callback],
        start: Start,
    ) -> None:
        self.parts, self.config = parts, parts.config
        self.checkpoints, self.metrics = checkpoints, metrics
        self.console, self.callbacks = console, callbacks
        self.start = start
        self.num_worse_evals = start.num_worse_evals
        self.unread: tuple[int, StepMetrics] | None = None
        self.nonfinite_steps = start.nonfinite_steps
        self.environment = describe_environment(parts.mesh)
        self.meter = Meter(start.step)

    def loop(self, state: TrainState, request: StopRequest) -> Result:
        """Steps to the end of the plan, or until asked to stop."""
        config, train_step = self.config, self.parts.train_step
        if self.start.owes_eval or self.start.owes_end:
            self.pay(state)
        step, stopping = self.start.step, False
        ended = self.at_end(step)
        stop = step if ended else config.num_steps
        for index, batch in prefetch(self.put, step, stop, depth=config.data.prefetch):
            state, step_metrics = train_step(state, batch)
            self.read_metrics()  # those of an earlier step: the device is busy with this one
            step = index + 1
            ended = self.at_end(step)
            stopping, save_due = request.agree(save=self.checkpoints.due_by_time)
            stopping = stopping and not ended
            save_due = save_due or step % config.checkpoint.save_interval == 0
            self.unread = step, step_metrics
            eval_loss, improved = None, False
            if self.parts.eval_due(step) and not stopping:
                eval_loss, improved = self.evaluate(step, state)
                ended = self.at_end(step)
            if save_due or improved or ended or stopping:
                self.save(step, state, eval_loss, final=ended)
            self.checkpoints.poll()
            self.console.progress(step)
            if ended or stopping:
                break
        self.checkpoints.wait()
        latest = self.checkpoints.latest
        if (ended or stopping) and (latest is None or latest.step < step):
            raise CheckpointError(
                f"the run is at step {step}, and the newest checkpoint on disk is "
                f"{latest.step if latest else 'none'}: its last save failed. Look at the disk of "
                f"{self.checkpoints.folder}; the same command makes the lost steps again"
            )
        return Result(step, ended, self.checkpoints.best)

    def put(self, step: int) -> Batch:
        """The batch that the state of this step takes in."""
        return self.parts.put(self.checkpoints.batch_index(step))

    def at_end(self, step: int) -> bool:
        """Whether the plan ends here."""
        return is_at_end(self.config, step, self.num_worse_evals)

    def tokens_seen(self, step: int) -> int:
        """Tokens trained on after so many steps; a Python integer, since 2^31 are soon reached."""
        done = step - self.start.step
        return self.start.tokens_seen + done * self.config.tokens_per_step

    def read_metrics(self) -> None:
        """Looks at the step that is waiting, if any, and logs it if it is due.

        Raises:
          RuntimeError: too many steps in a row were not finite.
          Diverged: the run is to go back.
        """
        if self.unread is None:
            return
        (step, on_device), self.unread = self.unread, None
        values = {name: float(value) for name, value in jax.device_get(on_device).items()}
        if (count := int(values["nonfinite_steps"])) > self.nonfinite_steps:
            self.nonfinite_steps = count
            self.console.warn(f"step {step} was not finite, and left params and optimizer alone")
        runs = int(values["nonfinite_run"]), int(values["spike_run"])
        check_losses(self.config.guard, step, *runs)
        if step == 1 or step % self.config.log_interval == 0 or self.at_end(step):
            self.log_step(step, values)

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """One training row, for all that keep or show rows."""
        steps_per_s = self.meter.rate(step)
        tokens_per_s = steps_per_s * self.config.tokens_per_step
        row = {
            "train/loss": values["loss"],
            "train/perplexity": perplexity(values["loss"]),
            "train/learning_rate": values["learning_rate"],
            "train/grad_norm": values["grad_norm"],
            "train/nonfinite_steps": self.nonfinite_steps,
            "train/tokens_seen": self.tokens_seen(step),
            "train/tokens_per_s": tokens_per_s,
        }
        if self.parts.peak_flops:
            flops = flops_per_token(self.config.model, self.config.seq_len)
            row["train/mfu"] = tokens_per_s * flops / self.parts.peak_flops
        self.log(step, row)
        self.console.step(step, row, (self.config.num_steps - step) / steps_per_s)

    def log(self, step: int, row: dict[str, float]) -> None:
        """One row for metrics.jsonl, the trackers and the callbacks."""
        if self.metrics:
            self.metrics.log(step, row)
        for callback in self.callbacks:
            callback(step, row)

    def flush(self) -> None:
        """Brings every row so far to the disk."""
        if self.metrics:
            self.metrics.flush()

    def evaluate(self, step: int, state: TrainState) -> tuple[float, bool]:
        """The held-out loss, and whether it is better than the best checkpoint on disk."""
        self.read_metrics()
        with self.meter.paused():
            parts = self.parts
            loss = evaluate(parts.eval_step, state.params, parts.put_eval, parts.num_eval_batches)
            self.checkpoints.wait()  # only what is on disk counts as best
            before = self.checkpoints.best
            best = self.checkpoints.best_with(step, loss)
            improved = best is not None and best.step == step
            self.num_worse_evals = 0 if improved else self.num_worse_evals + 1
            row = {"eval/loss": loss, "eval/perplexity": perplexity(loss)}
            self.log(step, {**row, "eval/best_loss": best.loss if best else math.inf})
            self.console.evaluation(step, loss, before.loss if before else None, improved)
        return loss, improved

    def save(self, step: int, state: TrainState, eval_loss: float | None, *, final: bool) -> None:
        """Starts to save this step, once every row up to it is on disk."""
        self.read_metrics()
        with self.meter.paused():
            self.checkpoints.wait()
            self.checkpoints.save(state, self.metadata(step, eval_loss, final), self.flush)

    def pay(self, state: TrainState) -> None:
        """Makes what a stop left out, the eval and the end of the plan, and commits it."""
        step, loss = self.start.step, self.start.eval_loss
        if self.start.owes_eval:
            loss, _ = self.evaluate(step, state)
        metadata = self.metadata(step, loss, final=self.at_end(step))
        self.checkpoints.replace(state, metadata, self.flush)

    def metadata(self, step: int, eval_loss: float | None, final: bool) -> Metadata:
        """What a checkpoint of this step says of itself."""
        best = self.checkpoints.best_with(step, eval_loss)
        return Metadata(
            step=step,
            tokens_seen=self.tokens_seen(step),
            eval_loss=eval_loss,
            best_eval_loss=best.loss if best else math.inf,
            best_step=best.step if best else None,
            num_worse_evals=self.num_worse_evals,
            final=final,
            config=to_dict(self.config),
            data_fingerprint=self.parts.data_fingerprint,
            eos_id=self.parts.eos_id,
            environment=self.environment,
            tracking_run_id=self.metrics.run_id if self.metrics else "",
            lineage=self.start.lineage,
        )
