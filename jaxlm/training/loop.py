"""The training loop: steps, evals and saves; rows reach the disk before their checkpoint."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax

from jaxlm.checkpoints.checkpoint import CheckpointError, Checkpoints
from jaxlm.checkpoints.folder import Best
from jaxlm.checkpoints.metadata import Metadata
from jaxlm.cluster import all_fail
from jaxlm.config import to_dict
from jaxlm.data.batches import prefetch
from jaxlm.data.verification import Verification
from jaxlm.device.guard import Guard
from jaxlm.device.loss import Batch
from jaxlm.device.state import TrainState
from jaxlm.device.step import StepMetrics
from jaxlm.errors import RunError
from jaxlm.tracking.clock import Clock
from jaxlm.tracking.console import Console
from jaxlm.tracking.metrics import Metrics, perplexity
from jaxlm.tracking.rows import Rows
from jaxlm.tracking.throughput import flops_per_token
from jaxlm.tracking.trace import traced
from jaxlm.training.environment import describe_environment
from jaxlm.training.evaluate import Stopped
from jaxlm.training.resume import is_at_end
from jaxlm.training.setup import TrainSetup
from jaxlm.training.signals import StopRequest
from jaxlm.training.start import Start

_log = logging.getLogger(__name__)

Callback = Callable[[int, dict[str, float]], None]


class Hook(NamedTuple):
    """A function of the state between two steps."""

    call: Callable[[int, TrainState, dict[str, float]], None]
    """(step, state after it, row of this step) -> None; the row is empty if none is due."""
    every: int = 1
    """Interval of the calls (steps). A call waits for the step, since it gets its row."""


class Result(NamedTuple):
    """How a call of `train` ended."""

    step: int
    """Steps done."""
    complete: bool
    """Whether training is complete; else the run was stopped, and another call resumes it."""
    best: Best | None
    """The best checkpoint on disk."""


@dataclass
class Loop:
    """A run in progress: everything of the loop but the train state."""

    parts: TrainSetup
    checkpoints: Checkpoints
    metrics: Metrics | None
    console: Console
    callbacks: Sequence[Callback]
    hooks: Sequence[Hook]
    start: Start
    clock: Clock
    verification: Verification

    def __post_init__(self) -> None:
        self.config = self.parts.config
        self.num_worse_evals = self.start.num_worse_evals
        self.unread: tuple[int, StepMetrics] | None = None
        self.row: tuple[int, dict[str, float]] = (0, {})
        self.skipped_steps = self.start.skipped_steps
        self.environment = describe_environment(self.parts.mesh)

    def run(self, state: TrainState, request: StopRequest) -> Result:
        """Trains to the last step, or until a stop is requested."""
        config, train_step = self.config, self.parts.train_step
        step, stopping = self.start.step, False
        if self.start.owes_eval or self.start.owes_end:
            stopping = not self.run_owed_eval(state, request.stops)
        ended = self.at_end(step) and not stopping
        stop = step if ended or stopping else config.num_steps
        self.clock.rate(step)
        with self.batches(step, stop) as batches:
            for index, batch in batches:
                state, step_metrics = train_step(state, batch)
                self.read_metrics()  # of the previous step, while the device is busy
                step = index + 1
                self.unread = step, step_metrics
                eval_loss, improved = None, False
                if eval_due := self.parts.eval_due(step):
                    eval_loss, improved = self.evaluate(step, state, request.stops)
                owes_eval = eval_due and eval_loss is None
                ended = self.at_end(step) and not owes_eval
                stopping, save_due = request.wanted(save=self.checkpoints.due_by_time)
                stopping = owes_eval or (stopping and not ended)
                save_due = save_due or step % config.checkpoint.save_interval == 0
                reasons = {"interval": save_due, "best": improved, "final": ended, "stop": stopping}
                if why := [reason for reason, applies in reasons.items() if applies]:
                    self.save(step, state, eval_loss, why)
                self.run_hooks(step, state)
                self.checkpoints.poll()
                self.console.progress(step)
                if ended or stopping:
                    break
        with self.clock.spent("save"):
            self.checkpoints.wait()
        latest = self.checkpoints.latest
        # The re-save that marks the checkpoint final failed.
        final_missing = ended and self.start.owes_end and latest is not None and not latest.final
        if (ended or stopping) and (latest is None or latest.step < step or final_missing):
            raise CheckpointError(
                f"the run is at step {step}, and the newest checkpoint on disk is "
                f"{latest.step if latest else 'none'}: its last save failed. Look at the disk of "
                f"{self.checkpoints.folder}; the same command repeats the lost steps"
            )
        return Result(step, ended, self.checkpoints.best)

    @contextlib.contextmanager
    def batches(self, start: int, stop: int) -> Iterator[Iterator[tuple[int, Batch]]]:
        """(index, batch) of these steps, made ahead; traced where the config says so."""
        config, folder = self.config, Path(self.config.run_dir) / "profile"
        put = self.parts.put_batches(self.start.phases)
        ahead = prefetch(put, start, stop, config.data.prefetch)
        batches = traced(self.clock.waiting(ahead), folder, config.profile)
        # Closed here, not by the garbage collector: that may run in the middle of a thread's start,
        # and the end of the prefetch thread would wait for a lock that the start holds.
        with contextlib.closing(ahead), contextlib.closing(batches):
            yield batches

    def run_hooks(self, step: int, state: TrainState) -> None:
        """Calls the hooks that are due at this step."""
        due = [hook for hook in self.hooks if step % hook.every == 0]
        if due:
            self.read_metrics()
        for hook in due:
            hook.call(step, state, self.row[1] if self.row[0] == step else {})

    def at_end(self, step: int) -> bool:
        """Whether training ends at this step."""
        return is_at_end(self.config, step, self.num_worse_evals)

    def tokens_seen(self, step: int) -> int:
        """Tokens trained on up to this step; a Python integer, since int32 would overflow."""
        return self.start.tokens_seen + (step - self.start.step) * self.config.tokens_per_step

    def read_metrics(self) -> None:
        """Fetches the metrics of the unread step, logs them if due; raises as `report_skipped`."""
        if self.unread is None:
            return
        (step, on_device), self.unread = self.unread, None
        values = {name: float(value) for name, value in jax.device_get(on_device).items()}
        if values["skipped_steps"] > self.skipped_steps:
            self.skipped_steps = int(values["skipped_steps"])
            self.report_skipped(step, values)
        if step == 1 or step % self.config.log_interval == 0 or self.at_end(step):
            self.log_step(step, values)

    def report_skipped(self, step: int, values: dict[str, float]) -> None:
        """Warns that a step was not applied, and why; RuntimeError after too many in a row."""
        finite = all(map(math.isfinite, values.values()))
        why = "loss or gradient norm is an outlier" if finite else "loss or gradient is not finite"
        found = f"loss {values['loss']:.4f}, gradient norm {values['grad_norm']:.4g}"
        _log.warning(f"step {step} was not applied: its {why} ({found})")
        self.checkpoints.events.add("skipped", step, f"its {why} ({found})")
        if (in_a_row := int(values["consecutive_skips"])) >= self.config.guard.max_skipped:
            raise RunError(
                f"{in_a_row} steps in a row up to {step} were not applied; go back with --resume "
                "best and a lower --optim.learning_rate, or allow more with --guard.max_skipped"
            )

    def log_step(self, step: int, values: dict[str, float]) -> None:
        """Logs the training row of a step."""
        steps_per_s = self.clock.rate(step)
        tokens_per_s = steps_per_s * self.config.tokens_per_step
        row = {
            "train/loss": values["loss"],
            "train/perplexity": perplexity(values["loss"]),
            "train/grad_norm": values["grad_norm"],
            "train/skipped_steps": self.skipped_steps,
            "train/tokens_seen": self.tokens_seen(step),
            "train/tokens_per_s": tokens_per_s,
        }
        if self.parts.own.optimizer is None:
            row["train/learning_rate"] = values["learning_rate"]
        terms = values.keys() - {"loss", "learning_rate", "grad_norm", *Guard._fields}
        row |= {f"train/{name}": values[name] for name in sorted(terms)}
        if self.parts.peak_flops:
            flops = flops_per_token(self.config.model, self.config.seq_len)
            row["train/mfu"] = tokens_per_s * flops / self.parts.peak_flops
        row |= {f"time/{kind}": round(s, 3) for kind, s in self.clock.seconds().items()}
        self.row = step, row
        self.log(step, row)
        self.console.step(step, row, (self.config.num_steps - step) / steps_per_s)

    def log(self, step: int, row: dict[str, float]) -> None:
        """Sends a row to metrics.jsonl, the trackers and the callbacks."""
        if self.metrics:
            self.metrics.log(step, row)
        for callback in self.callbacks:
            callback(step, row)

    def flush(self) -> Rows:
        """Flushes every row to disk; returns their length and checksum."""
        return self.metrics.flush() if self.metrics else Rows()

    def evaluate(
        self, step: int, state: TrainState, stops: Callable[[], bool]
    ) -> tuple[float | None, bool]:
        """The held-out loss, and whether it beats the best checkpoint on disk.

        The loss is None if a stop cut the eval short: the next start runs it.
        """
        self.read_metrics()
        with self.clock.spent("eval"):
            row, failure = {}, None
            try:
                row = self.parts.evaluate(step, state.weights, stops)
            except Stopped:
                _log.info(f"the eval of step {step} was cut short; the next start makes it")
                return None, False
            except Exception as error:
                failure = error
            # Outside the `except`: `cluster.barrier` re-raises an error being handled.
            if failure:
                # Save only if all fail: one process alone would wait in the save.
                if step > self.start.step and all_fail(f"jaxlm/eval/{step}", failure):
                    self.save(step, state, None, ["eval failed"])
                    self.checkpoints.wait()
                raise failure
            self.checkpoints.wait()  # Best is chosen among checkpoints on disk.
            before = self.checkpoints.best
            best = self.checkpoints.best_with(step, row["eval/loss"])
            improved = best is not None and best.step == step
            self.num_worse_evals = 0 if improved else self.num_worse_evals + 1
            self.log(step, {**row, "eval/best_loss": best.loss if best else math.inf})
            self.console.evaluation(step, row, before.loss if before else None, improved)
        return row["eval/loss"], improved

    def save(
        self, step: int, state: TrainState, eval_loss: float | None, why: Sequence[str]
    ) -> None:
        """Starts to save this step, once every row up to it is on disk."""
        self.read_metrics()
        self.parts.inputs.check_unchanged(self.verification)
        with self.clock.spent("save"):
            self.checkpoints.wait()
            metadata = self.metadata(step, eval_loss, final="final" in why)
            self.checkpoints.save(state, metadata, self.flush, ", ".join(why))

    def run_owed_eval(self, state: TrainState, stops: Callable[[], bool]) -> bool:
        """Runs the eval that a stop skipped; saves the checkpoint again, with its loss.

        Returns:
          False if a stop cut the eval short again.
        """
        step, loss = self.start.step, self.start.eval_loss
        if self.start.owes_eval:
            loss, _ = self.evaluate(step, state, stops)
            if loss is None:
                if self.checkpoints.latest is None:  # The run has just branched: nothing is saved.
                    self.save(step, state, None, ["stop"])
                return False
        metadata = self.metadata(step, loss, final=self.at_end(step))
        self.checkpoints.replace(state, metadata, self.flush)
        return True

    def metadata(self, step: int, eval_loss: float | None, final: bool) -> Metadata:
        """The metadata of a checkpoint of this step."""
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
            data=self.start.data | self.parts.inputs.data,
            phases=self.start.phases,
            eval_set=self.parts.inputs.eval_set or self.start.eval_set,
            bytes_per_token=self.parts.inputs.bytes_per_token,
            eos_id=self.parts.inputs.eos_id,
            environment=self.environment,
            tracking_run_id=self.metrics.run_id if self.metrics else "",
            lineage=self.start.lineage,
        )
