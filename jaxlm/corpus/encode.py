"""Documents -> token ids, many at a time and on all cores; the bytes that ids stand for."""

import json
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer

from jaxlm.corpus import tokenizer as tokenizer_lib
from jaxlm.corpus.files import Document

CHUNK_CHARS = 4_000_000
"""Text tokenized at once, on all cores."""
PIECE_CHARS = 500_000
"""A longer document is tokenized in pieces, on several cores; a cut may split a word."""


def chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about `CHUNK_CHARS`."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.text) + 1
        if size >= CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_documents(
    tokenizer: Tokenizer, documents: list[str], eos_id: int, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The tokens of each document, with EOS at the end; an empty document has none."""
    pieces = [
        (number, text[start : start + PIECE_CHARS])
        for number, text in enumerate(documents)
        for start in range(0, len(text), PIECE_CHARS)
    ]
    texts = [piece for _, piece in pieces]
    ids = [[] for _ in documents]
    for (number, _), own in zip(
        pieces, tokenizer_lib.encode(tokenizer, texts, eos_id), strict=True
    ):
        ids[number] += own
    for own in ids:
        yield np.array([*own, eos_id] if own else [], dtype)


def bytes_of_ids(tokenizer: Tokenizer) -> np.ndarray | None:
    """The bytes of text that each id stands for, int64 [ids]; None if ids are not made of bytes.

    A byte-level tokenizer spells each byte as one character. Special tokens stand for no text.
    """
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    if "ByteLevel" not in {part.get("type") for part in (decoder, *decoder.get("decoders", ()))}:
        return None
    sizes = np.zeros(tokenizer_lib.num_ids(tokenizer), np.int64)
    added = tokenizer.get_added_tokens_decoder()
    for token, number in tokenizer.get_vocab().items():
        if number not in added:
            sizes[number] = len(token)
        elif not added[number].special:
            sizes[number] = len(token.encode())
    return sizes


def prefix_bytes(tokenizer: Tokenizer, document: Document, ids: np.ndarray) -> int:
    """Bytes of the text that the first ids of its document stand for.

    Exact for a byte-level tokenizer. For others, a character that is cut counts as a whole.
    """
    if (sizes := bytes_of_ids(tokenizer)) is not None:
        return min(int(sizes[ids].sum()), document.num_bytes)
    text, num_ids, num_bytes = document.text, len(ids), 0
    for start in range(0, len(text), PIECE_CHARS):
        piece = text[start : start + PIECE_CHARS]
        ends = [end for _, end in tokenizer.encode(piece, add_special_tokens=False).offsets]
        if num_ids <= len(ends):
            return num_bytes + len(piece[: ends[num_ids - 1]].encode())
        num_ids, num_bytes = num_ids - len(ends), num_bytes + len(piece.encode())
    return num_bytes
