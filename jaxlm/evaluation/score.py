"""Evaluates and compares checkpoints outside of the run."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.checkpoints.folder import TOKENIZER, Selected, select
from jaxlm.checkpoints.names import split_step
from jaxlm.checkpoints.reading import read
from jaxlm.compilation_cache import enable_compilation_cache
from jaxlm.config import Config, MeshConfig
from jaxlm.corpus.overlap import warn_overlap
from jaxlm.data.dataset import Dataset
from jaxlm.data.run_data import config_of_source, default_max_tokens, load_data, load_dataset
from jaxlm.device.likelihood import make_token_scores
from jaxlm.device.loss import Batch, next_token_loss
from jaxlm.device.sharding import make_mesh
from jaxlm.device.state import Params
from jaxlm.device.step import make_eval_step
from jaxlm.errors import InputError
from jaxlm.evaluation.by_document import Documents, document_sums, in_common
from jaxlm.evaluation.evals import checkpoint_id
from jaxlm.inference.load import log_selected, restore_params
from jaxlm.terminal import prints_lines, progress
from jaxlm.training.environment import compare_environments, describe_environment
from jaxlm.training.evaluate import batch_sums, joined, means
from jaxlm.training.inputs import held_out_batches
from jaxlm.training.setup import hold_out, mask_id

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
    bits_per_byte: float
    """Of the text, so comparable between tokenizers."""
    num_tokens: int
    """Number of tokens predicted."""
    num_bytes: int
    """Bytes of their text."""
    recorded_loss: float | None
    """Eval loss in the checkpoint's metadata; None if it has none, or with another source."""
    differences: list[str]
    """Differences between the run's environment and this one that may change bits."""
    environment: dict[str, Any]
    """Environment of this evaluation."""
    sums: np.ndarray
    """Loss sum (nats) and number of tokens of each batch: float64 [batches, 2]. With another
    `unit`, loss sum (bits) and number of bytes of each document."""
    unit: str = "nats per token"

    @property
    def as_recorded(self) -> bool:
        """Whether the loss equals the recorded one; within `TOLERANCE` if bits may differ."""
        recorded = math.nan if self.recorded_loss is None else self.recorded_loss
        return math.isclose(self.loss, recorded, rel_tol=TOLERANCE if self.differences else 0.0)

    def to_json(self) -> dict[str, Any]:
        """The score as JSON values, without checkpoint id, sums and environment."""
        left_out = ("checkpoint", "sums", "unit", "environment")
        return {name: value for name, value in self._asdict().items() if name not in left_out}


class _Candidate(NamedTuple):
    """A checkpoint, and the data to evaluate it on."""

    run: str
    selected: Selected
    config: Config
    datasets: list[Dataset]
    """Their held-out sets are evaluated as one."""


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
      paired: give the sums of common batches; of common documents if the tokenizers differ.

    Raises:
      ValueError: a run or step is missing or damaged; the data has changed since the run; or
        `paired`, and runs of one tokenizer differ in held-out set or `seq_len`.
    """
    scorer = Scorer(source, held_out=held_out)
    found = [scorer.find(run) for run in runs]
    by_document = paired and len({_tokenizer(candidate) for candidate in found}) > 1
    if paired and not by_document:
        found = [_in_batches_of(found[0], candidate) for candidate in found]
    scored = [_score(candidate, scorer.label, by_document) for candidate in found]
    if not by_document:
        return [score for score, _ in scored]
    sums = in_common([documents for _, documents in scored])
    return [
        score._replace(sums=own, unit="bits per byte")
        for (score, _), own in zip(scored, sums, strict=True)
    ]


class Scorer:
    """Evaluates checkpoints one by one; the data of consecutive ones is prepared once if equal."""

    def __init__(self, source: str | None, *, held_out: bool = False):
        """Arguments are those of `score`."""
        if held_out and not source:
            raise InputError("held_out: found no source, expected one; name text with --source")
        self._source, self._all = source, source is not None and not held_out
        self.label = f"{source}, held out" if held_out else source
        self._loaded: tuple[object, list[Dataset]] = None, []

    def __call__(self, run: str) -> Score:
        """The score of `RUN@STEP`; raises as `score`."""
        return _score(self.find(run), self.label)[0]

    def find(self, run: str) -> _Candidate:
        """`RUN@STEP`, and the data to evaluate it on."""
        selected = select(run)
        metadata = selected.metadata
        config = metadata.run_config()
        if not (self._source or metadata.phases):
            raise InputError(
                f"{run}: was imported, or trained on custom batches, so it has no held-out set; "
                "name text with --source"
            )
        enable_compilation_cache(config.data.cache_dir)
        key = config.data, config.model.vocab_size, metadata.data, selected.folder
        if self._loaded[0] != key:
            load = self._of_source if self._source else _of_run
            self._loaded = key, load(selected, config)
        name = run if split_step(run)[1] else f"{run}@best"
        return _Candidate(name, selected, config, self._loaded[1])

    def _of_source(self, selected: Selected, config: Config) -> list[Dataset]:
        assert self._source
        tokenizer = str(selected.folder / TOKENIZER)
        data = config_of_source(config.data, self._source, tokenizer)
        limits = [default_max_tokens(data, config.num_steps * config.tokens_per_step)]
        if self._all:
            data, limits = dataclasses.replace(data, eval_tokens=_NO_LIMIT), [0]
        dataset = load_dataset(data, vocab_size=config.model.vocab_size, limits=limits)
        warn_overlap(dataset, selected.metadata.data, config)
        return [dataset]


def _of_run(selected: Selected, config: Config) -> list[Dataset]:
    # The held-out sets that decide the best.
    metadata = selected.metadata
    _, data = load_data(config, selected.recorded_data)
    datasets = data.by_name
    for name, dataset in datasets.items():
        was = metadata.data[name]["fingerprint"] if name in metadata.data else "none"
        if dataset.fingerprint != was:
            raise InputError(
                f"{selected.folder}: found data {dataset.fingerprint} for {name}, expected that of "
                f"the run, {was}; restore that data, or name other text with --source"
            )
    return [datasets[name] for name in config.data.judges]


def _tokenizer(candidate: _Candidate) -> bytes:
    return candidate.datasets[0].tokenizer_path.read_bytes()


def _in_batches_of(first: _Candidate, other: _Candidate) -> _Candidate:
    def tokens(candidate: _Candidate) -> list[bytes]:
        return [of.eval.read(0, of.eval.num_tokens).tobytes() for of in candidate.datasets]

    same = {
        "held-out set": tokens(first) == tokens(other),
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


def _score(
    candidate: _Candidate, label: str | None, by_document: bool = False
) -> tuple[Score, Documents]:
    run, first, config, datasets = candidate
    mesh = _choose_mesh(first.metadata.environment["mesh"], config.micro_batch_size)
    selected, (blueprint, params) = read(run, lambda s: (s, restore_params(s, mesh)), first=first)
    log_selected(selected)
    sets = [hold_out(config, mesh, held_out_batches(config, dataset)) for dataset in datasets]
    eos_id = mask_id(config, datasets[0].eos_id)
    next_token = next_token_loss(eos_id=eos_id, num_chunks=config.loss_chunks)
    eval_step = make_eval_step(blueprint, next_token, mesh)
    num_batches = sum(of.num_batches for of in sets)
    num_bytes = sum(dataset.eval_bytes for dataset in datasets)
    if not num_bytes:
        raise InputError(f"{run}: the text to evaluate on is one token, expected more")
    with progress(f"Evaluating step {selected.step}", num_batches) as advance:
        before = None

        def step(params: Params, batch: Batch) -> dict[str, jax.Array]:
            nonlocal before
            now = eval_step(params, batch)
            if before is not None:  # one batch late, so that the device is never idle
                jax.block_until_ready(before)
                advance(1)
            before = now
            return now

        sums = joined([batch_sums(step, params, of) for of in sets])
    found, environment = means(sums, num_bytes), describe_environment(mesh)
    metadata, documents = selected.metadata, Documents([], np.empty((0, 2)))
    if by_document:
        token_scores = make_token_scores(blueprint, mesh, eos_id)
        for dataset, of in zip(datasets, sets, strict=True):
            more = document_sums(dataset, of.put, of.num_batches, token_scores, params)
            sums_of_all = np.concatenate([documents.sums, more.sums])
            documents = Documents(documents.texts + more.texts, sums_of_all)
    scored = Score(
        run=run,
        step=selected.step,
        checkpoint=checkpoint_id(metadata),
        source=label or ", ".join(dataset.source for dataset in datasets),
        loss=found["loss"],
        perplexity=found["perplexity"],
        bits_per_byte=found["bits_per_byte"],
        num_tokens=int(sums["tokens"].sum()),
        num_bytes=num_bytes,
        recorded_loss=None if label else metadata.eval_loss,
        differences=compare_environments(metadata.environment, environment),
        environment=environment,
        sums=np.stack([sums["loss"], sums["tokens"]], axis=1),
    )
    return scored, documents


def _choose_mesh(recorded: dict[str, int], micro_batch_size: int) -> Mesh:
    # The mesh of the run, for equal bits, or else as many devices as divide a microbatch.
    count = jax.device_count()
    fits = micro_batch_size % (recorded["data"] * recorded["fsdp"]) == 0
    if fits and math.prod(recorded.values()) == count:
        return make_mesh(MeshConfig(**recorded))
    return make_mesh(MeshConfig(), jax.devices()[: math.gcd(micro_batch_size, count)])
