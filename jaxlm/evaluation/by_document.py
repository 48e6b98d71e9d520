"""Losses by document, which checkpoints of different tokenizers have in common."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.corpus.tokenizer import load_tokenizer
from jaxlm.data.dataset import Dataset
from jaxlm.device.likelihood import TokenScores
from jaxlm.device.loss import Batch
from jaxlm.device.state import Params


class Documents(NamedTuple):
    """The documents of a held-out set but the first, whose first token no eval predicts."""

    texts: list[bytes]
    """A hash of each text."""
    sums: np.ndarray
    """Loss (bits) and bytes of each: float64 [documents, 2]."""


def document_sums(
    dataset: Dataset,
    put: Callable[[int], Batch],
    num_batches: int,
    token_scores: TokenScores,
    params: Params,
) -> Documents:
    """The documents of one dataset, from its batches of `held_out_batches`."""
    losses = []
    for index in range(num_batches):
        batch = put(index)
        scores, _ = token_scores(params, batch)
        real = np.asarray(jax.device_get(batch["loss_mask"])).ravel() > 0
        losses.append(-np.asarray(jax.device_get(scores), np.float64).ravel()[real])
    ids = dataset.eval.read(0, dataset.eval.num_tokens)
    ends = np.flatnonzero(ids == dataset.eos_id)
    document = np.searchsorted(ends, np.arange(1, len(ids)))  # of each target
    nats = np.bincount(document, weights=np.concatenate(losses))
    tokenizer: Any = load_tokenizer(dataset.tokenizer_path)
    texts = tokenizer.decode_batch([part.tolist() for part in np.split(ids, ends + 1)][: len(nats)])
    data = [text.encode() for text in texts]
    sums = np.stack([nats / math.log(2), np.array(list(map(len, data)), np.float64)], axis=1)
    names = [hashlib.blake2b(text, digest_size=16).digest() for text in data]
    return Documents(names[1:], sums[1:])


def in_common(all_of: Sequence[Documents]) -> list[np.ndarray]:
    """The sums of the documents that all have, in the order of the first."""
    found = [dict(zip(each.texts, each.sums, strict=True)) for each in all_of]
    names = [name for name in found[0] if all(name in each for each in found)]
    return [np.array([each[name] for name in names]).reshape(-1, 2) for each in found]
