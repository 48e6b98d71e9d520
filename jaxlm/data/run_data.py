"""The datasets of a run: its training sources and held-out sets, each found or made now."""

import dataclasses
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxlm.config import MAX_EVAL_TOKENS, Config, DataConfig
from jaxlm.data.dataset import Dataset
from jaxlm.data.mixture import Phase

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


class Recorded(NamedTuple):
    """The data of a run, as its latest checkpoint records it."""

    step: int
    fingerprints: dict[str, str]
    """Name of a source -> fingerprint."""
    phases: list[Phase]
    config: DataConfig
    tokenizer: Path


class RunData(NamedTuple):
    """Everything that a run reads."""

    sources: dict[str, Dataset]
    """The training sources by name."""
    held_out: dict[str, Dataset]
    """More held-out sets by name."""

    @property
    def by_name(self) -> dict[str, Dataset]:
        """All datasets; each has a held-out set."""
        return {**self.sources, **self.held_out}

    @property
    def first(self) -> Dataset:
        """One of the sources; all have the same tokenizer."""
        return next(iter(self.sources.values()))


class Make(Protocol):
    """Finds a dataset in the cache, or makes it."""

    def __call__(
        self,
        config: DataConfig,
        *,
        vocab_size: int,
        max_tokens: int,
        all_held_out: bool = False,
        recorded: tuple[str, str] | None = None,
    ) -> Dataset:
        """The dataset of `config.source`.

        Args:
          config: of the source alone.
          vocab_size: of the model; the size of a trained tokenizer, the limit of a given one.
          max_tokens: limit of training tokens.
          all_held_out: hold out every document, to evaluate on all of a source.
          recorded: fingerprint and source of a run that resumes: its prepared data is found by the
            fingerprint, even if the source has moved or is gone.
        """
        ...


def load_data(config: Config, recorded: Recorded | None = None) -> tuple[Config, RunData]:
    """The config with the defaults of its data filled in, and the data of the run.

    Each source is prepared with the share of `max_tokens` that it has when it is added. Sources
    share one tokenizer.

    Raises:
      ValueError: the corpus or the tokenizer does not fit, or a file of the cache is damaged.
      FileNotFoundError, ImportError, ConnectionError: source or tokenizer is not available.
      OSError: the disk is full.
    """
    data, vocab_size = config.data, config.model.vocab_size
    max_tokens = default_max_tokens(data, config.num_steps * config.tokens_per_step)
    best_by = data.best_by or "+".join(sorted(data.corpora))
    data = dataclasses.replace(
        data, max_tokens=max_tokens, eval_tokens=default_eval_tokens(config), best_by=best_by
    )
    config = dataclasses.replace(config, data=data)
    phases: list[Phase] = [*(recorded.phases if recorded else []), first_phase(data)]
    tokenizer = data.tokenizer
    if tokenizer == "train" and len(data.corpora) > 1:
        tokenizer = str(recorded.tokenizer) if recorded else _train_for_all(data, vocab_size)
    found = {}
    for name, source in data.corpora.items():
        before = None
        if recorded and name in recorded.fingerprints:
            before = recorded.fingerprints[name], recorded.config.corpora.get(name, source)
        found[name] = load_dataset(
            alone(data, source, tokenizer),
            vocab_size=vocab_size,
            max_tokens=_limit(name, max_tokens, phases),
            recorded=before,
        )
    tokenizer = str(next(iter(found.values())).tokenizer_path)
    held_out = {
        name: load_dataset(
            alone(data, source, tokenizer), vocab_size=vocab_size, max_tokens=1, all_held_out=True
        )
        for name, source in data.held_out.items()
    }
    return config, RunData(found, held_out)


def first_phase(config: DataConfig) -> Phase:
    """The mixture of a run that begins."""
    return {"step": 0, "shares": config.shares}


def load_dataset(config: DataConfig, **options: Any) -> Dataset:
    """The dataset of a single source; `Make` describes the options, `load_data` the errors."""
    make: Make = pkgutil.resolve_name(_MAKERS[config.source.partition(":")[0]])
    return make(config, **options)


def alone(config: DataConfig, source: str, tokenizer: str) -> DataConfig:
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


def _limit(name: str, max_tokens: int, phases: Sequence[Phase]) -> int:
    # By the share at which the source was added: its tokens must not depend on later phases. A
    # source of share 0 may get another share later.
    shares = next(phase["shares"] for phase in phases if name in phase["shares"])
    total = sum(shares.values())
    return -(-max_tokens * shares[name] // total) or -(-max_tokens // len(shares))


def _train_for_all(config: DataConfig, vocab_size: int) -> str:
    train = pkgutil.resolve_name(_TOKENIZER_OF_ALL)
    sources = [alone(config, config.corpora[name], "train") for name in config.shares]
    return train(sources, list(config.shares.values()), vocab_size)
