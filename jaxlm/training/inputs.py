"""Training batches and held-out sets of a run: those of its config, or a caller's own."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from jaxlm.config import MAIN, Config
from jaxlm.data.batches import EvalBatches, Rows, TrainBatches, recorded
from jaxlm.data.dataset import Dataset, find_change
from jaxlm.data.mixture import Mixture, Phase, add_phase
from jaxlm.data.packing import RowReader, open_rows
from jaxlm.data.run_data import Prepared, Recorded, RunData, load_data
from jaxlm.data.verification import Verification
from jaxlm.errors import RunError
from jaxlm.training.evaluate import EvalSet

_log = logging.getLogger(__name__)


class TrainSet(Protocol):
    """Batch n of the training data: a pure function of n, so that a resume needs no state.

    An optional attribute `fingerprint` is kept in each checkpoint, and a resume with another one is
    refused.
    """

    def __call__(self, index: int, rows: slice) -> dict[str, np.ndarray]:
        """The given rows of batch `index`, as host arrays (`inputs`, `targets` by default)."""
        ...


class Inputs(NamedTuple):
    """What a run trains on and is evaluated on."""

    rows_of: Callable[[Sequence[Phase]], Rows]
    """Phases of the mixture -> the training batches; a caller's own are the same for any."""
    held_out: dict[str, EvalSet]
    """Held-out sets by name."""
    best_by: list[str]
    """Names of the held-out sets that decide the best, together."""
    shares: dict[str, int] = {}  # never changed in place
    """Shares of the sources from now on; empty with a caller's own batches."""
    stages: dict[str, int] = {}  # never changed in place
    """Stages of their tokens from now on."""
    planned: Sequence[Phase] = ()
    """The mixture, unless damage takes this start back behind `step`."""
    step: int = 0
    """Where this start goes on, if its newest checkpoint is sound; 0 with own batches."""
    data: dict[str, Prepared] = {}  # never changed in place
    """The datasets by name, as a checkpoint records them."""
    datasets: Sequence[Dataset] = ()
    """The first one is asked for the tokenizer, which is that of all; none with own batches."""

    @property
    def eval_set(self) -> str:
        """Names and fingerprints of the held-out sets that decide the best."""
        found = (f"{n} {getattr(self.held_out[n], 'fingerprint', '')}" for n in self.best_by)
        return " + ".join(found).strip()

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text for each token that is predicted in those sets; None if unknown."""
        sets = [self.held_out[name] for name in self.best_by]
        known = [batches for batches in sets if isinstance(batches, EvalBatches)]
        if not known or len(known) < len(sets):
            return None
        num_bytes = sum(batches.num_bytes or 0 for batches in known)
        return num_bytes / sum(batches.num_targets for batches in known)

    @property
    def eos_id(self) -> int | None:
        """The token that ends a document."""
        return self.datasets[0].eos_id if self.datasets else None

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer of the tokens."""
        return self.datasets[0].tokenizer_path if self.datasets else None

    def verifying(self) -> Verification:
        """Reads all data in the background; for `check_unchanged`."""
        return Verification([dataset.directory for dataset in self.datasets])

    def check_unchanged(self, verification: Verification) -> None:
        """Refuses to go on if a file of the data is damaged, or has changed since the start.

        Raises:
          RuntimeError: names the file.
        """
        for dataset in self.datasets:
            if path := find_change(dataset):
                raise RunError(
                    f"data: {path} has changed since this start, so steps since the latest "
                    "checkpoint may have read other tokens, and are not saved; bring the file "
                    "back, and the same command repeats them"
                )
        if damage := verification.damage:
            raise RunError(
                f"data: {damage}; steps of this run may have read it, and those since the latest "
                "checkpoint are not saved. Look at the disk and the memory of this machine, delete "
                "this data with `jaxlm cache clear`, and the same command prepares it again"
            )

    def phases(self, before: Sequence[Phase], step: int) -> list[Phase]:
        """The mixture of a run that goes on from a step."""
        return add_phase(before, step, self.shares, self.stages) if self.shares else []


def find_inputs(
    config: Config,
    batches: TrainSet | None,
    eval_batches: EvalSet | Mapping[str, EvalSet] | None,
    recorded_data: Recorded | None,
) -> tuple[Config, Inputs]:
    """The config with settings of the data filled in, and the inputs of the run.

    Of a caller's own held-out sets, the first decides the best.

    Raises:
      ValueError: the data does not fit the model or the run.
      OSError, ImportError: the data is not available.
    """
    given = eval_batches if isinstance(eval_batches, Mapping) else {MAIN: eval_batches}
    sets = {name: batches for name, batches in given.items() if batches is not None}
    record_to = os.environ.get("JAXLM_RECORD_BATCHES")
    if batches is not None:
        own = recorded(batches, record_to)
        fingerprint = str(getattr(batches, "fingerprint", ""))
        own_data = Prepared(fingerprint=fingerprint, source="", limits=[], eval_tokens=0)
        return config, Inputs(
            lambda _: own,
            sets,
            best_by=[*sets][:1],
            data={MAIN: own_data} if fingerprint else {},
        )
    config, data = load_data(config, recorded_data, grows=True)
    before, step = (recorded_data.phases, recorded_data.step) if recorded_data else ([], 0)
    stages = {name: len(of.stages) for name, of in data.sources.items()}
    planned = add_phase(before, step, config.data.shares, stages)
    rows = rows_of_sources(config, data)
    _log_sources(config, data, train_batches(config, rows, planned), planned[-1]["shares"])
    return config, Inputs(
        lambda phases: recorded(train_batches(config, rows, phases), record_to),
        sets or {n: held_out_batches(config, of) for n, of in data.by_name.items()},
        best_by=[*sets][:1] or config.data.judges,
        shares=config.data.shares,
        stages=stages,
        planned=planned,
        step=step,
        data=data.prepared,
        datasets=[*data.by_name.values()],
    )


def rows_of_sources(config: Config, data: RunData) -> dict[str, RowReader]:
    """The rows of each training source."""
    packing = config.data.packing
    rows = {name: open_rows(of, config.seq_len, packing) for name, of in data.sources.items()}
    for name, of in rows.items() if packing == "documents" else ():
        _log.info(
            f"{name}: {of.sizes[-1]:,} rows of whole documents, {of.padding:.2%} of them padding"
        )
    return rows


def train_batches(
    config: Config, rows: Mapping[str, RowReader], phases: Sequence[Phase]
) -> TrainBatches:
    """The training batches of a run whose mixture has these phases."""
    mixture = Mixture(phases, config.batch_size)
    return TrainBatches(rows, mixture, batch_size=config.batch_size, seed=config.seed)


def held_out_batches(config: Config, dataset: Dataset) -> EvalBatches:
    """The held-out set of a dataset, in the batches of the run's evals."""
    return EvalBatches(
        dataset.eval,
        batch_size=config.micro_batch_size,
        seq_len=config.seq_len,
        fingerprint=dataset.eval_fingerprint,
        num_bytes=dataset.eval_bytes,
    )


def _log_sources(
    config: Config,
    data: RunData,
    batches: TrainBatches,
    shares: Mapping[str, int],
) -> None:
    most_epochs = 0.0
    for name, dataset in data.sources.items():
        times = batches.times(name, config.num_steps)
        most_epochs = max(most_epochs, *times)
        share = shares.get(name, 0) / sum(shares.values())
        title = f"{name} ({share:.4g} of the rows)" if len(data.sources) > 1 else "data"
        # A source that has grown: what each stage has added.
        added = np.diff([0, *dataset.stages]).tolist()
        parts = [f"the {'added' if k else 'first'} {n:,}" for k, n in enumerate(added)]
        through = ", ".join(
            f"{part if len(times) > 1 else 'them'} {count:.2f} times"
            for part, count in zip(parts, times, strict=True)
        )
        _log.info(
            f"{title}: {dataset.train.num_tokens:,} training tokens from {dataset.source}, "
            f"{dataset.eval.num_tokens:,} held out; the run goes through {through}"
        )
    for name, dataset in data.held_out.items():
        _log.info(f"{name}: {dataset.eval.num_tokens:,} tokens from {dataset.source}, all held out")
    if most_epochs > 4 and not config.overfit_one_batch:
        _log.info(
            f"the run is far larger than its data ({most_epochs:.1f} epochs): expect it to "
            "overfit; --stop_after_worse_evals 3 ends it when it does"
        )
