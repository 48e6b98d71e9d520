"""Evaluates and compares checkpoints outside of the run."""

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from scipy.special import stdtrit

from jaxlm.checkpoints.folder import (
    TOKENIZER,
    Selected,
    select,
)
from jaxlm.checkpoints.names import split_step
from jaxlm.checkpoints.reading import read
from jaxlm.compilation_cache import enable_compilation_cache
from jaxlm.config import Config, MeshConfig
from jaxlm.corpus.cache import find_prepared
from jaxlm.corpus.overlap import find_overlap
from jaxlm.data.dataset import Dataset, Recorded, load_dataset, open_dataset
from jaxlm.device.loss import Batch, next_token_loss
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import Params
from jaxlm.device.step import make_eval_step
from jaxlm.errors import InputError
from jaxlm.evaluation.evals import checkpoint_id
from jaxlm.inference.load import log_selected, restore_params
from jaxlm.terminal import prints_lines, progress
from jaxlm.tracking.metrics import perplexity
from jaxlm.training.environment import compare_environments, describe_environment
from jaxlm.training.evaluate import batch_sums, means
from jaxlm.training.setup import held_out_batches, hold_out, mask_id

_log = logging.getLogger(__name__)

_NO_LIMIT = 2**62
TOLERANCE = 1e-3
"""Allowed relative difference of a loss, as between float32 and bfloat16."""


class Score(NamedTuple):
    """The loss of a checkpoint on a held-out set."""

    run: str
    """`RUN@STEP`."""
    step: int
    checkpoint: str
    """`checkpoint_id` of the loaded checkpoint."""
    source: str
    """`data.source` of the documents, and `held out` if only that part was scored."""
    loss: float
    """Nats per token."""
    perplexity: float
    num_tokens: int
    """Number of tokens predicted."""
    recorded_loss: float | None
    """Eval loss in the checkpoint's metadata; None if it has none, or with another source."""
    differences: list[str]
    """Differences between the run's environment and this one that may change bits."""
    environment: dict[str, Any]
    """Environment of this evaluation."""
    sums: np.ndarray
    """Loss sum (nats) and number of tokens of each batch: float64 [batches, 2]."""

    @property
    def as_recorded(self) -> bool:
        """Whether the loss equals the recorded one; within `TOLERANCE` if bits may differ."""
        recorded = math.nan if self.recorded_loss is None else self.recorded_loss
        return math.isclose(self.loss, recorded, rel_tol=TOLERANCE if self.differences else 0.0)

    def to_json(self) -> dict[str, Any]:
        """The score as JSON values, without checkpoint id, sums and environment."""
        left_out = ("checkpoint", "sums", "environment")
        return {name: value for name, value in self._asdict().items() if name not in left_out}


class _Candidate(NamedTuple):
    """A checkpoint, and the data to evaluate it on."""

    run: str
    selected: Selected
    config: Config
    dataset: Dataset


@prints_lines
def score(
    runs: Sequence[str],
    *,
    source: str | None = None,
    held_out: bool = False,
    paired: bool = False,
) -> list[Score]:
    """The scores of checkpoints on the held-out sets of their runs, on any number of devices.

    Args:
      runs: `RUN@STEP` each; best if STEP is left out.
      source: another `data.source` to evaluate on, all of it.
      held_out: of `source`, take only the documents that a run on it would hold out.
      paired: evaluate all checkpoints on the batches of the first.

    Raises:
      ValueError: a run or step is missing or damaged; the data has changed since the run; or
        `paired`, and the runs differ in held-out set, tokenizer or `seq_len`.
    """
    scorer = Scorer(source, held_out=held_out)
    found = [scorer.find(run) for run in runs]
    if paired:
        found = [_in_batches_of(found[0], candidate) for candidate in found]
    return [_score(candidate, scorer.label) for candidate in found]


class Scorer:
    """Evaluates checkpoints one by one; the data of consecutive ones is prepared once if equal."""

    def __init__(self, source: str | None, *, held_out: bool = False):
        """Arguments are those of `score`."""
        if held_out and not source:
            raise InputError("held_out: found no source, expected one; name text with --source")
        self._source, self._all = source, source is not None and not held_out
        self.label = f"{source}, held out" if held_out else source
        self._load = functools.lru_cache(maxsize=1)(load_dataset)
        self._warn_overlap = functools.lru_cache(maxsize=1)(_warn_overlap)

    def __call__(self, run: str) -> Score:
        """The score of `RUN@STEP`; raises as `score`."""
        return _score(self.find(run), self.label)

    def find(self, run: str) -> _Candidate:
        """`RUN@STEP`, and the data to evaluate it on."""
        selected = select(run)
        config, recorded = selected.metadata.run_config(), selected.metadata.data_fingerprint
        if not (self._source or recorded):
            raise InputError(
                f"{run}: was imported, or trained on custom batches, so it has no held-out set; "
                "name text with --source"
            )
        if self._source:
            tokenizer = str(selected.folder / TOKENIZER)
            data = dataclasses.replace(config.data, source=self._source, tokenizer=tokenizer)
            if self._all:
                data = dataclasses.replace(data, max_tokens=1, eval_tokens=_NO_LIMIT)
            config = dataclasses.replace(config, data=data)
        enable_compilation_cache(config.data.cache_dir)
        of_run = None if self._source else Recorded(recorded, config.data)
        config, dataset = self._load(config, of_run, all_held_out=self._all)
        if not self._source and dataset.fingerprint != recorded:
            raise InputError(
                f"{run}: found data {dataset.fingerprint}, expected that of the run, {recorded}; "
                "restore that data, or name other text with --source"
            )
        if self._source:
            self._warn_overlap(dataset, recorded, config)
        name = run if split_step(run)[1] else f"{run}@best"
        return _Candidate(name, selected, config, dataset)


def _warn_overlap(dataset: Dataset, fingerprint: str, config: Config) -> None:
    # Warns if the run's data holds documents of `dataset`.
    data, unknown = config.data, "what the run was trained on is not compared with these documents"
    folder = find_prepared(fingerprint, "", data.cache_dir) if fingerprint else None
    if folder is None:
        _log.info(f"{unknown}: its prepared data is not here")
        return
    try:
        train = open_dataset(folder, config.model.vocab_size).train
    except (ValueError, OSError) as error:
        _log.warning(f"{unknown}: {error}")
        return
    if (found := find_overlap(dataset.eval, train, dataset.eos_id)).num_documents:
        _log.warning(
            f"the training data of {config.run_dir} holds {found.num_documents:,} of these "
            f"{found.of_documents:,} documents ({found.num_tokens:,} of "
            f"{dataset.eval.num_tokens:,} tokens): their loss says little"
        )


def _in_batches_of(first: _Candidate, other: _Candidate) -> _Candidate:
    a, b = first.dataset, other.dataset
    tokens_a, tokens_b = (data.eval.read(0, data.eval.num_tokens) for data in (a, b))
    same = {
        "tokenizer": a.tokenizer_path.read_bytes() == b.tokenizer_path.read_bytes(),
        "held-out set": np.array_equal(tokens_a, tokens_b),
        "seq_len": first.config.seq_len == other.config.seq_len,
    }
    if not all(same.values()):
        names = ", ".join(name for name, is_same in same.items() if not is_same)
        raise InputError(
            f"{first.run} and {other.run} differ in {names}, so they have no batches in common; "
            "compare runs of the same data, or leave --paired out"
        )
    batch = {name: getattr(first.config, name) for name in ("batch_size", "num_microbatches")}
    return other._replace(config=dataclasses.replace(other.config, **batch))


def _score(candidate: _Candidate, label: str | None) -> Score:
    run, first, config, dataset = candidate
    mesh = _choose_mesh(first.metadata.environment["mesh"], config.micro_batch_size)
    selected, (blueprint, params) = read(run, lambda s: (s, restore_params(s, mesh)), first=first)
    log_selected(selected)
    held_out = hold_out(config, mesh, held_out_batches(config, dataset))
    next_token = next_token_loss(eos_id=mask_id(config, dataset), num_chunks=config.loss_chunks)
    eval_step = make_eval_step(blueprint, next_token, mesh)
    with progress(f"Evaluating step {selected.step}", held_out.num_batches) as advance:
        before = None

        def step(params: Params, batch: Batch) -> dict[str, jax.Array]:
            nonlocal before
            now = eval_step(params, batch)
            if before is not None:  # one batch late, so that the device is never idle
                jax.block_until_ready(before)
                advance(1)
            before = now
            return now

        sums = batch_sums(step, params, *held_out)
    loss, environment = means(sums)["loss"], describe_environment(mesh)
    metadata = selected.metadata
    return Score(
        run=run,
        step=selected.step,
        checkpoint=checkpoint_id(metadata),
        source=label or config.data.source,
        loss=loss,
        perplexity=perplexity(loss),
        num_tokens=int(sums["tokens"].sum()),
        recorded_loss=None if label else metadata.eval_loss,
        differences=compare_environments(metadata.environment, environment),
        environment=environment,
        sums=np.stack([sums["loss"], sums["tokens"]], axis=1),
    )


def _choose_mesh(recorded: dict[str, int], micro_batch_size: int) -> Mesh:
    # The mesh of the run, for equal bits, or else as many devices as divide a microbatch.
    count = jax.device_count()
    fits = micro_batch_size % (recorded["data"] * recorded["fsdp"]) == 0
    if fits and math.prod(recorded.values()) == count:
        return make_mesh(MeshConfig(**recorded))
    return make_mesh(MeshConfig(), jax.devices()[: math.gcd(micro_batch_size, count)])


class PairedDifference(NamedTuple):
    """The difference of two losses on the same batches, with its confidence interval."""

    mean: float
    """Loss of the first minus loss of the second (nats per token)."""
    low: float
    high: float
    """95% confidence interval of the mean."""
    num_batches: int

    @property
    def better(self) -> int | None:
        """0 if the first is better, 1 if the second; None if the interval contains 0."""
        if self.high < 0:
            return 0
        return 1 if self.low > 0 else None


def paired_difference(sums_a: np.ndarray, sums_b: np.ndarray) -> PairedDifference:
    """The difference of two mean losses per token, with its 95% confidence interval.

    The difficulty of a batch is common to both, and cancels in the difference (Miller, "Adding
    Error Bars to Evals", 2411.00640, section 3). The mean is a ratio, of the sum of differences to
    the number of tokens; its error is that of a ratio estimator over batches (Cochran, "Sampling
    Techniques", 3rd ed. 1977, chapter 6), with Student's t of (batches - 1) degrees of freedom. The
    interval holds for more text of this kind, not for other text.

    Args:
      sums_a: `Score.sums` of the first: loss sum (nats) and number of tokens [batches, 2].
      sums_b: the same of the second, on the same batches.

    Raises:
      ValueError: fewer than two batches.
    """
    count = len(sums_a)
    if count < 2:
        raise InputError(
            f"held-out set: found {count} batch, expected at least 2 for a confidence interval; "
            "raise data.eval_tokens"
        )
    tokens, gaps = sums_a[:, 1], sums_a[:, 0] - sums_b[:, 0]
    mean = gaps.sum() / tokens.sum()
    variance = count / (count - 1) * np.square(gaps - mean * tokens).sum()
    margin = float(stdtrit(count - 1, 0.975)) * math.sqrt(variance) / tokens.sum()
    return PairedDifference(float(mean), float(mean - margin), float(mean + margin), count)
