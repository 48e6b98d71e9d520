"""The dataset of a source of text: from the cache, or made now."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.config import DataConfig
from jaxlm.corpus import tokenizer as tokenizer_lib
from jaxlm.corpus.cache import (
    Origin,
    clear_caches,
    data_folder,
    label,
    make_once,
    open_recorded,
)
from jaxlm.corpus.files import Source, in_proportion
from jaxlm.corpus.parallel import help_writer
from jaxlm.corpus.prepare import TOKENS_VERSION, make_dataset, take_over
from jaxlm.corpus.sources import open_source
from jaxlm.corpus.splits import training_documents
from jaxlm.data.dataset import MANIFEST, Dataset, begins_with, digest, open_dataset
from jaxlm.data.run_data import Prepared
from jaxlm.errors import InputError, JaxlmError
from jaxlm.files.cache import cache_root
from jaxlm.files.durable import write_file
from jaxlm.files.strict import read_json
from jaxlm.terminal import prints_lines

_log = logging.getLogger(__name__)


@prints_lines
def find_or_make(
    config: DataConfig,
    *,
    vocab_size: int,
    limits: Sequence[int],
    recorded: Prepared | None = None,
    known: Dataset | None = None,
) -> Dataset:
    """The dataset of a source of text; `Make` in data/run_data.py describes the arguments.

    A cached dataset is reused without asking a remote source for changes.
    """
    if recorded and (found := open_recorded(recorded, vocab_size, config.cache_dir)):
        _compare_source(config, recorded["source"], found.directory)
        return found
    source = open_source(config)
    recipe = _recipe(config, source, vocab_size, limits)
    folder = data_folder(config.cache_dir) / f"{label(source.name)}-{digest(recipe)}"

    def make() -> None:
        if known:
            take_over(folder, known, source)
        make_dataset(folder, source, config, vocab_size, limits)

    make_once(folder, make, lambda: help_writer(folder, source, config.eos_token))
    found = open_dataset(folder, vocab_size)
    if known and not begins_with(found, known):
        clear_caches([folder.name], config.cache_dir)
        raise InputError(f"data.source {source.name}: its text has changed since")
    return found


@prints_lines
def train_for_all(configs: Sequence[DataConfig], shares: Sequence[int], vocab_size: int) -> str:
    """The path of a tokenizer trained on several sources, each with its share of the text."""
    sources = [open_source(config) for config in configs]
    recipe = [vocab_size, [*shares], [source.key for source in sources], TOKENS_VERSION]
    recipe += [[config.split, config.text_field] for config in configs]
    path = cache_root(configs[0].cache_dir) / "tokenizers" / f"{digest(recipe)}.json"
    if not path.is_file():
        names = ", ".join(source.name for source in sources)
        _log.info(f"Training a tokenizer of {vocab_size:,} tokens on {names}")
        streams = zip(shares, map(training_documents, sources), strict=True)
        documents = in_proportion((share, stream) for share, stream in streams if share)
        found = tokenizer_lib.train_tokenizer((d.text for d in documents), vocab_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, found.to_str(pretty=True).encode())
    return str(path)


def _recipe(
    config: DataConfig, source: Source, vocab_size: int, limits: Sequence[int]
) -> dict[str, Any]:
    """Everything that determines the content, as far as it is known without a network."""
    tokenizer = config.tokenizer
    if tokenizer == "train":
        tokenizer = f"train {vocab_size}"
    elif tokenizer_lib.local_tokenizer(tokenizer):
        tokenizer = tokenizer_lib.content_hash(tokenizer_lib.load_tokenizer(tokenizer))
    fields = ("source", "split", "text_field", "eos_token", "eval_limit", "drop_duplicates")
    recipe = {name: getattr(config, name) for name in fields}
    recipe |= {"reading": TOKENS_VERSION, "key": source.key}
    return recipe | {"tokenizer": tokenizer, "limits": [*limits]}


def _compare_source(config: DataConfig, before: str, folder: Path) -> None:
    # The run trains on its prepared tokens in any case: says what became of their source, and
    # refuses another one.
    moved = config.source != before
    try:
        source = open_source(config)
    except JaxlmError as error:  # no file, no package, a file of another kind
        if moved:
            raise
        _log.info(f"{error}. The run needs no source: its tokens are in {folder}")
        return
    made_of = read_json(folder / MANIFEST, Origin)
    if moved:
        if not source.sizes or source.sizes != made_of["sizes"]:
            raise InputError(
                f"data.source: found {config.source}, whose files are not those of "
                f"{before}, which the run began with; expected the same files in another "
                "place. Add --run_dir for a new run, or set it back"
            )
        _log.info(
            f"data.source {config.source}: the files have the sizes of those that the run began "
            "with; the run goes on with its prepared tokens"
        )
    elif source.look_up is None and source.key != made_of["revision"]:
        _log.info(
            f"data.source {config.source}: names, sizes or times of its files have changed since "
            "the run began; the run keeps its prepared tokens. Only a new --run_dir reads the files"
        )
