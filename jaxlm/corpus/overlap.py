"""Documents that two token sequences have in common."""

import collections
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.data.shards import TokenShards

_CHUNK_TOKENS = 1 << 22


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


def _hash(document: np.ndarray) -> bytes:
    return hashlib.blake2b(document.astype("<u4").tobytes(), digest_size=16).digest()


def _documents(tokens: TokenShards, eos_id: int) -> Iterator[np.ndarray]:
    rest = np.empty(0, tokens.dtype)
    for start in range(0, tokens.num_tokens, _CHUNK_TOKENS):
        chunk = tokens.read(start, min(start + _CHUNK_TOKENS, tokens.num_tokens))
        chunk = np.concatenate([rest, chunk])
        *documents, rest = np.split(chunk, np.flatnonzero(chunk == eos_id) + 1)
        yield from documents
    if len(rest):  # cut at the limit of tokens
        yield rest
