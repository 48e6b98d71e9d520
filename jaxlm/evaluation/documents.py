"""The documents behind a batch: their numbers, their text, and their place in the source."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from jaxlm.checkpoints.folder import select
from jaxlm.checkpoints.names import split_step
from jaxlm.corpus.tokenizer import load_tokenizer
from jaxlm.data.dataset import MANIFEST, Dataset, Manifest
from jaxlm.data.run_data import load_data
from jaxlm.errors import InputError
from jaxlm.files.durable import write_file
from jaxlm.files.strict import read_json
from jaxlm.terminal import prints_lines
from jaxlm.training.inputs import rows_of_sources, train_batches


class Piece(NamedTuple):
    """The part of a document that lies in a row."""

    document: int
    """Number of the document among the training documents of its source, from 0."""
    place: str
    """Its place in the source: its number there, or a file and the first of its tokens."""
    first: int
    """First token of the part in the document, from 0."""
    num_tokens: int
    text: str
    """Text of the part."""


class Row(NamedTuple):
    """One row of a batch."""

    source: str
    epoch: int
    window: int
    pieces: list[Piece]


@prints_lines
def rows_of_batch(run: str, step: int, row: int | None = None) -> list[Row]:
    """The rows that a step of a run takes in, or one of them.

    Args:
      run: a run folder, or RUN@STEP, whose mixture is taken.
      step: of the run; the rows are those of batch `step - 1`.
      row: of the batch, from 0; all by default.

    Raises:
      ValueError: the run was trained on custom batches, or has no such step or row.
    """
    selected = select(run if split_step(run)[1] else f"{run}@latest", contents=False)
    metadata, config = selected.metadata, selected.metadata.run_config()
    if not metadata.phases:
        raise InputError(f"{run}: was trained on custom batches, so it has no documents")
    if not 1 <= step <= config.num_steps:
        raise InputError(f"--step: found {step}, expected 1 to {config.num_steps}, as in {run}")
    if row is not None and not 0 <= row < config.batch_size:
        raise InputError(f"--row: found {row}, expected 0 to {config.batch_size - 1}")
    _, data = load_data(config, selected.recorded_data)
    rows = rows_of_sources(config, data)
    batches = train_batches(config, rows, metadata.phases)
    tokenizer = load_tokenizer(data.first.tokenizer_path)
    indexes = {name: _Index(dataset, tokenizer) for name, dataset in data.sources.items()}
    found = []
    for number in range(config.batch_size) if row is None else (row,):
        name, epoch, window = batches.locate(step - 1, number)
        ranges = rows[name].ranges(window)
        pieces = [piece for at in ranges for piece in indexes[name].pieces(*at)]
        found.append(Row(name, epoch, window, pieces))
    return found


class _Index:
    """The training documents of a dataset by position; the manifest is read once."""

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer):
        self._dataset, self._tokenizer = dataset, tokenizer
        self._ends = document_ends(dataset)
        self._manifest = read_json(dataset.directory / MANIFEST, Manifest)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The parts of documents at positions start to stop - 1."""
        ends, tokens, found = self._ends, self._dataset.train, list[Piece]()
        while start < stop:
            document = int(np.searchsorted(ends, start, side="right"))
            begin = int(ends[document - 1]) if document else 0
            end = int(ends[document]) if document < len(ends) else tokens.num_tokens
            end = min(end, stop)
            ids = tokens.read(start, end).tolist()
            found.append(
                Piece(
                    document=document,
                    place=self._place(document, start),
                    first=start - begin,
                    num_tokens=len(ids),
                    text=self._tokenizer.decode(ids, skip_special_tokens=False),
                )
            )
            start = end
        return found

    def _place(self, document: int, position: int) -> str:
        folder, records = self._dataset.directory, self._manifest["numbers"].get("train", [])
        if not records:  # token files, which are linked
            for shard in self._manifest["train"]:
                if position < shard["num_tokens"]:
                    first = shard["offset"] // self._dataset.train.dtype.itemsize + position
                    return f"{(folder / shard['name']).resolve()}, token {first:,}"
                position -= shard["num_tokens"]
        for record in records:
            numbers = np.memmap(folder / record["name"], "<u8", "r")
            if document < len(numbers):
                return f"document {int(numbers[document]):,} of {self._dataset.source}"
            document -= len(numbers)
        return self._dataset.source


def document_ends(dataset: Dataset) -> np.ndarray:
    """Position after the EOS of each training document: int64 [documents], mapped from a file.

    The file is made once, beside the dataset, by a scan of all tokens.
    """
    path = Path(f"{dataset.directory}.ends")
    if not path.exists():
        write_file(path, dataset.train.ends(dataset.eos_id).astype("<i8").tobytes())
    size = path.stat().st_size
    return np.memmap(path, "<i8", "r") if size else np.empty(0, np.int64)
