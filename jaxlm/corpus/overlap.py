"""Text that a held-out set and training tokens have in common: documents, and parts of them."""

import collections
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.config import Config
from jaxlm.corpus.cache import open_recorded
from jaxlm.data.dataset import Dataset
from jaxlm.data.run_data import Prepared
from jaxlm.data.shards import TokenShards

_log = logging.getLogger(__name__)

NGRAM = 16
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_TABLE_BITS = 26
_TABLE_SHIFT = np.uint64(64 - _TABLE_BITS)


class Overlap(NamedTuple):
    """How much of a held-out set was trained on."""

    num_documents: int
    """Held-out documents that are training documents too."""
    num_tokens: int
    """Tokens of these documents."""
    of_documents: int
    """All held-out documents."""


def find_overlap(held_out: TokenShards, train: Sequence[TokenShards], eos_id: int) -> Overlap:
    """The documents of `held_out` that are in one of `train`, token by token."""
    counts, sizes = collections.Counter[bytes](), dict[bytes, int]()
    for document in _documents(held_out, eos_id):
        counts[name := _hash(document)] += 1
        sizes[name] = len(document)
    documents = itertools.chain.from_iterable(_documents(tokens, eos_id) for tokens in train)
    found = {name for document in documents if (name := _hash(document)) in sizes}
    num_tokens = sum(counts[name] * sizes[name] for name in found)
    return Overlap(sum(counts[name] for name in found), num_tokens, counts.total())


class Leaks(NamedTuple):
    """How many held-out documents are in the training tokens, at least by half."""

    num_documents: int
    of_documents: int


def count_leaks(
    held_out: TokenShards,
    train: Sequence[TokenShards],
    eos_id: int,
    advance: Callable[[float], None] = lambda share: None,
) -> Leaks:
    """Held-out documents that have half or more of their n-grams in the training tokens.

    An n-gram is a run of `NGRAM` tokens within a document; shorter documents do not count. A table
    of bits by hash sorts out nearly all training tokens, and a binary search decides the rest.

    Args:
      held_out: takes 8 bytes of memory a token.
      train: read once.
      eos_id: ends a document.
      advance: called with the share of the training tokens that was read since the last call.
    """
    ids = np.concatenate([*held_out.chunks()]) if held_out.num_tokens else np.empty(0, int)
    own, inside = _ngrams(ids, eos_id)
    wanted = np.unique(own[inside])
    table = np.zeros(1 << _TABLE_BITS, bool)
    table[wanted >> _TABLE_SHIFT] = True
    found = np.zeros(len(wanted), bool)
    num_tokens = sum(tokens.num_tokens for tokens in train)
    for chunk in itertools.chain(*(tokens.chunks(NGRAM - 1) for tokens in train)):
        hashes, whole = _ngrams(chunk, eos_id)
        hashes = hashes[whole & table[hashes >> _TABLE_SHIFT]]
        places = np.searchsorted(wanted, hashes)
        hit = places < len(wanted)
        hit[hit] = wanted[places[hit]] == hashes[hit]
        found[places[hit]] = True
        advance(len(chunk) / num_tokens)
    leaked = np.zeros(len(own), bool)
    leaked[inside] = found[np.searchsorted(wanted, own[inside])]
    document = np.cumsum(ids == eos_id)[: len(own)] - (ids[: len(own)] == eos_id)
    totals = np.bincount(document[inside], minlength=1)
    hits = np.bincount(document[inside], weights=leaked[inside], minlength=1)
    return Leaks(int((2 * hits >= totals)[totals > 0].sum()), int((totals > 0).sum()))


def _ngrams(ids: np.ndarray, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    # The hash of each n-gram, uint64 [N], and whether it lies within a document.
    count = max(len(ids) - NGRAM + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for place in range(NGRAM):
        hashes = hashes * _PRIME + ids[place : place + count].astype(np.uint64) + np.uint64(1)
    hashes ^= hashes >> np.uint64(32)
    ends = np.concatenate([[0], np.cumsum(ids == eos_id)])
    return hashes * _PRIME, ends[NGRAM : NGRAM + count] == ends[:count]


def _hash(document: np.ndarray) -> bytes:
    return hashlib.blake2b(document.astype("<u4").tobytes(), digest_size=16).digest()


def _documents(tokens: TokenShards, eos_id: int) -> Iterator[np.ndarray]:
    rest = np.empty(0, tokens.dtype)
    for chunk in tokens.chunks():
        chunk = np.concatenate([rest, chunk])
        *documents, rest = np.split(chunk, np.flatnonzero(chunk == eos_id) + 1)
        yield from documents
    if len(rest):  # cut at the limit of tokens
        yield rest


def warn_overlap(dataset: Dataset, datasets: Mapping[str, Prepared], config: Config) -> None:
    """Warns if the training data of a run holds documents of a dataset."""
    data, unknown = config.data, "what the run was trained on is not compared with these documents"
    trained = [of for of in datasets.values() if of["limits"] != [0]]
    try:
        opened = [open_recorded(of, config.model.vocab_size, data.cache_dir) for of in trained]
    except (ValueError, OSError) as error:
        _log.warning(f"{unknown}: {error}")
        return
    train = [found.train for found in opened if found]
    if not train or len(train) < len(trained):
        _log.info(f"{unknown}: its prepared data is not here")
        return
    if (found := find_overlap(dataset.eval, train, dataset.eos_id)).num_documents:
        _log.warning(
            f"the training data of {config.run_dir} holds {found.num_documents:,} of these "
            f"{found.of_documents:,} documents ({found.num_tokens:,} of "
            f"{dataset.eval.num_tokens:,} tokens): their loss says little"
        )
