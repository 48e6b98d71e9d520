"""The datasets of a run, its sources and held-out sets: opened from the cache, or prepared."""

import dataclasses
import logging
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

from jaxlm.config import MAX_EVAL_TOKENS, Config, DataConfig
from jaxlm.data.dataset import Dataset
from jaxlm.data.mixture import Phase
from jaxlm.errors import InputError, JaxlmError

_log = logging.getLogger(__name__)

# Kind of source -> function that makes its dataset, imported when a run has such a source.
_MAKERS: dict[str, str] = dict.fromkeys(
    ("embedded", "text", "hf", "tfds", "tfds_dir"), "jaxlm.corpus.prepared:find_or_make"
) | {"tokens": "jaxlm.corpus.tokens:link_tokens"}
_TOKENIZER_OF_ALL = "jaxlm.corpus.prepared:train_for_all"


def default_max_tokens(config: DataConfig, num_tokens: int) -> int:
    """Training tokens to prepare: `config.max_tokens`, else 1% more than the run, at least 10 M."""
    return config.max_tokens or max(num_tokens + num_tokens // 100, 10_000_000)


def default_eval_tokens(config: Config) -> int:
    """Held-out tokens of each source: `data.eval_tokens`, else a tenth of the run's work in all.

    An eval costs a third of a step on the same tokens. The least is four steps' tokens, the most
    `MAX_EVAL_TOKENS`.
    """
    num_evals = -(-config.num_steps // config.eval_interval) * len(config.data.corpora)
    tenth = config.num_steps * config.tokens_per_step // (3 * num_evals)
    chosen = min(max(tenth, 4 * config.tokens_per_step), MAX_EVAL_TOKENS)
    return config.data.eval_tokens or chosen


class Prepared(TypedDict):
    """A dataset of a run, as a checkpoint records it."""

    fingerprint: str
    source: str
    """`data.source` when the dataset was added."""
    limits: list[int]
    """Limits of training tokens, one for each time that the plan outgrew them; [0] for a held-out
    set, all documents of which are held out."""
    eval_tokens: int
    """Limit of held-out tokens."""


def has_grown(before: Prepared, now: Prepared) -> bool:
    """Whether `load_data` has added tokens to a dataset."""
    size = len(before["limits"])
    return len(now["limits"]) > size and now["limits"][:size] == before["limits"]


class Recorded(NamedTuple):
    """The data of a run, as a checkpoint records it."""

    step: int
    datasets: dict[str, Prepared]
    """By name: the sources and the held-out sets so far."""
    phases: list[Phase]
    tokenizer: Path


class RunData(NamedTuple):
    """Everything that a run reads."""

    sources: dict[str, Dataset]
    """The training sources by name."""
    held_out: dict[str, Dataset]
    """More held-out sets by name."""
    prepared: dict[str, Prepared]
    """Records of all datasets, for the checkpoint."""

    @property
    def by_name(self) -> dict[str, Dataset]:
        """All datasets; each has a held-out set."""
        return {**self.sources, **self.held_out}

    @property
    def first(self) -> Dataset:
        """The first source, for its tokenizer, which is that of all."""
        return next(iter(self.sources.values()))


class Make(Protocol):
    """Finds a dataset in the cache, or makes it."""

    def __call__(
        self,
        config: DataConfig,
        *,
        vocab_size: int,
        limits: Sequence[int],
        recorded: Prepared | None = None,
        known: Dataset | None = None,
    ) -> Dataset:
        """The dataset of `config.source`.

        Args:
          config: of the source alone.
          vocab_size: of the model; the size of a trained tokenizer, the limit of a given one.
          limits: limits of training tokens, ascending: the tokens of each are the first of the
            next; [0] to hold out every document.
          recorded: of a run that has begun: the prepared data is found by its fingerprint, even if
            the source has moved or is gone.
          known: the dataset of all limits but the last, whose tokens are taken over.
        """
        ...


def load_data(
    config: Config, recorded: Recorded | None = None, *, grows: bool = False
) -> tuple[Config, RunData]:
    """The config with the defaults of its data filled in, and the data of the run.

    Each source is prepared with the share of `max_tokens` that it has when it is added. All have
    one tokenizer: that of the run, if it has begun.

    Args:
      config: the run.
      recorded: its data, if it has begun.
      grows: prepare more tokens for a run that has begun, if its plan needs more.

    Raises:
      ValueError: the corpus or the tokenizer does not fit, or a file of the cache is damaged.
      FileNotFoundError, ImportError, ConnectionError: source or tokenizer is not available.
      OSError: the disk is full.
    """
    data, vocab_size = config.data, config.model.vocab_size
    planned = config.num_steps * config.tokens_per_step
    max_tokens = default_max_tokens(data, planned)
    data = dataclasses.replace(
        data, eval_tokens=default_eval_tokens(config), best_by="+".join(data.judges)
    )
    config = dataclasses.replace(config, data=data)
    tokenizer = data.tokenizer
    if recorded and recorded.tokenizer.is_file():
        tokenizer = str(recorded.tokenizer)
    elif tokenizer == "train" and len(data.corpora) > 1:
        tokenizer = _train_for_all(data, vocab_size)
    before = recorded.datasets if recorded else {}
    limits = dict.fromkeys(data.held_out, 0)
    limits |= {name: _limit(name, data.shares, max_tokens) for name in data.corpora}
    found, prepared = dict[str, Dataset](), dict[str, Prepared]()
    for name, source in {**data.corpora, **data.held_out}.items():
        known = before.get(name)
        own = known["limits"] if known else [limits[name]]
        if (own == [0]) != (name in data.held_out):
            raise InputError(
                f"data.held_out: found {name}, which was {'a' if own == [0] else 'no'} held-out "
                f"set up to step {recorded.step if recorded else 0}; take another name"
            )
        of_source = config_of_source(data, source, tokenizer)
        if known:
            of_source = dataclasses.replace(of_source, eval_tokens=known["eval_tokens"])
        dataset = load_dataset(of_source, vocab_size=vocab_size, limits=own, recorded=known)
        if grows and known and dataset.fingerprint == known["fingerprint"]:
            needed = _needed(name, data, planned)
            if needed > own[-1] and not dataset.exhausted:
                dataset, own = _grow(dataset, own, limits[name], needed, of_source, vocab_size)
            elif data.max_tokens and 0 < needed < own[-1]:
                _log.info(
                    f"data.max_tokens: {name} keeps its {own[-1]:,}, which a run never lowers"
                )
        found[name] = dataset
        prepared[name] = Prepared(
            fingerprint=dataset.fingerprint,
            source=known["source"] if known else source,
            limits=own,
            eval_tokens=of_source.eval_limit,
        )
        tokenizer = str(found[name].tokenizer_path)
    _check_tokenizers(found)
    sources = {name: found[name] for name in data.corpora}
    return config, RunData(sources, {name: found[name] for name in data.held_out}, prepared)


def _needed(name: str, data: DataConfig, planned: int) -> int:
    # Training tokens of a dataset that the plan takes; none of a source without a share now.
    if not data.shares.get(name):
        return 0
    return _limit(name, data.shares, data.max_tokens or planned)


def _grow(
    known: Dataset,
    before: list[int],
    limit: int,
    needed: int,
    config: DataConfig,
    vocab_size: int,
) -> tuple[Dataset, list[int]]:
    # The dataset with more tokens, and its limits. Without the source, those before: a longer plan
    # then repeats its tokens; a higher data.max_tokens is refused, since it asks for more.
    limits = [*before, limit]
    try:
        grown = load_dataset(config, vocab_size=vocab_size, limits=limits, known=known)
    except JaxlmError as error:
        text = (
            f"{known.source}: the plan takes {needed:,} training tokens, {known.stages[-1]:,} are "
            f"prepared, and no more can be added ({error})"
        )
        if config.max_tokens:
            raise InputError(f"{text}; bring the text back, or data.max_tokens") from error
        _log.warning(f"{text}. The run repeats those that it has")
        return known, before
    if len(grown.stages) > len(known.stages):
        added = grown.stages[-1] - known.stages[-1]
        _log.info(f"{known.source}: {added:,} training tokens are added for the longer plan")
    return grown, limits


def _check_tokenizers(datasets: Mapping[str, Dataset]) -> None:
    first, *others = datasets
    text = datasets[first].tokenizer_path.read_bytes()
    for name in others:
        if datasets[name].tokenizer_path.read_bytes() != text:
            raise InputError(
                f"data: found another tokenizer for {name} than for {first}, expected one; name it "
                "with --data.tokenizer, in a new run"
            )


def load_dataset(config: DataConfig, **options: Any) -> Dataset:
    """The dataset of a single source; `Make` describes the options, `load_data` the errors."""
    make: Make = pkgutil.resolve_name(_MAKERS[config.source.partition(":")[0]])
    return make(config, **options)


def config_of_source(config: DataConfig, source: str, tokenizer: str) -> DataConfig:
    """The config of one source of several, or of a held-out set."""
    return dataclasses.replace(
        config,
        source=source,
        tokenizer=tokenizer,
        sources={},
        weights={},
        held_out={},
        best_by=None,
    )


def _limit(name: str, shares: Mapping[str, int], max_tokens: int) -> int:
    # A source of share 0 may get another share later.
    return -(-max_tokens * shares[name] // sum(shares.values())) or -(-max_tokens // len(shares))


def _train_for_all(config: DataConfig, vocab_size: int) -> str:
    train = pkgutil.resolve_name(_TOKENIZER_OF_ALL)
    sources = [config_of_source(config, config.corpora[name], "train") for name in config.shares]
    return train(sources, list(config.shares.values()), vocab_size)
