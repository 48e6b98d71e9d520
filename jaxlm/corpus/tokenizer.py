"""Byte-level BPE: trained here, or loaded from a tokenizer.json."""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Tokenizer

from jaxlm.data.dataset import digest
from jaxlm.errors import InputError, MissingFileError
from jaxlm.files.durable import expand, read_file

EOS = "<|endoftext|>"
_EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>")
_SAMPLE_BYTES = 50_000_000
_MAX_BYTES = 1 << 28


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's splitting of words; deterministic.

    Args:
      documents: training text; only the first 50 MB are used, which are a sample of all files.
      vocab_size: limit of tokens, including the 256 bytes and `<|endoftext|>`.

    Raises:
      ValueError: no text, or a vocabulary too small for the bytes.
    """
    if vocab_size < 257:
        raise InputError(
            f"model.vocab_size: found {vocab_size}, expected at least 257 to train a tokenizer "
            f"(the 256 bytes and {EOS})"
        )
    sample, num_bytes = [], 0
    for document in documents:
        sample.append(document)
        num_bytes += len(document.encode())
        if num_bytes >= _SAMPLE_BYTES:
            break
    if num_bytes == 0:
        raise InputError(
            "empty corpus: there is no text to train a tokenizer on; check data.source"
        )
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """A tokenizer from a tokenizer.json, the folder that holds one, or the Hugging Face Hub.

    Truncation and padding (which transformers writes into the file after one call with them) and
    dropout of merges are switched off: encodings must be complete and deterministic.

    Raises:
      FileNotFoundError: no such file, or no such name on the Hub.
      ValueError: the file is not a tokenizer.
      ConnectionError: the Hub is needed and cannot be reached.
    """
    path = local_tokenizer(name_or_path)
    if path is None:
        from jaxlm.corpus import remote  # Most runs need no network, and never import this.

        path = remote.download_tokenizer(str(name_or_path))
    try:
        tokenizer = Tokenizer.from_buffer(read_file(path, _MAX_BYTES))
    except BaseException as error:  # tokenizers raises no narrower class, and Rust may panic.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise InputError(
            f"tokenizer {path}: cannot be read ({error}); expected a tokenizer.json of the "
            "Hugging Face tokenizers library"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for chance in ("dropout", "alpha", "nbest_size"):  # of BPE, and of Unigram
        if hasattr(tokenizer.model, chance):
            setattr(tokenizer.model, chance, None)
    return tokenizer


def local_tokenizer(name_or_path: str | Path) -> Path | None:
    """The tokenizer.json at a path, or None for a name on the Hub.

    Raises:
      FileNotFoundError: neither a file nor a possible name.
    """
    path = Path(expand(str(name_or_path), "data.tokenizer"))
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return path
    name = str(name_or_path)
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not name.endswith(".json"):
        return None
    raise MissingFileError(
        f"data.tokenizer: no file {path}; expected train, a tokenizer.json, or a Hugging Face name"
    )


def load_encoder(path: Path) -> Tokenizer:
    """A prepared dataset's tokenizer: special tokens in a document are encoded as text.

    Otherwise they would act as control tokens.
    """
    tokenizer = load_tokenizer(path)
    tokenizer.encode_special_tokens = True
    return tokenizer


def num_ids(tokenizer: Tokenizer) -> int:
    """Rows an embedding needs: the highest token id, plus one (ids may have gaps)."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The smallest dtype of prepared tokens that holds every id."""
    return np.dtype("<u2" if num_ids(tokenizer) <= 2**16 else "<u4")


def find_eos(tokenizer: Tokenizer, eos_token: str | None) -> int:
    """The id of the token that ends a document.

    Raises:
      ValueError: the vocabulary has no `eos_token`, or, without one, none of the usual names.
    """
    for name in _EOS_NAMES if eos_token is None else (eos_token,):
        if (found := tokenizer.token_to_id(name)) is not None:
            return found
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    raise InputError(
        f"data.eos_token: the tokenizer has no {eos_token or ', '.join(_EOS_NAMES)}; name the "
        f"token that ends a document with --data.eos-token. Its added tokens: {special}"
    )


def mark_eos(tokenizer: Tokenizer, eos_id: int) -> None:
    """Makes EOS a special token even if the file does not, so that `decode` leaves it out."""
    token = tokenizer.get_added_tokens_decoder().get(eos_id)
    token = token or AddedToken(tokenizer.id_to_token(eos_id), normalized=False)
    token.special = True
    tokenizer.add_special_tokens([token])


def encode(tokenizer: Tokenizer, texts: Sequence[str], eos_id: int) -> list[list[int]]:
    """The ids of each text, without EOS: a spelled-out EOS is text, not a boundary.

    Args:
      tokenizer: with EOS marked, and `encode_special_tokens` set.
      texts: documents, or parts of them.
      eos_id: of EOS.

    Raises:
      ValueError: the tokenizer can encode some text only as EOS.
    """
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    rows = [encoding.ids for encoding in encodings]
    return [
        _spelled_out(tokenizer, text, eos_id) if eos_id in ids else ids
        for text, ids in zip(texts, rows, strict=True)
    ]


def _spelled_out(tokenizer: Tokenizer, text: str, eos_id: int) -> list[int]:
    # Unigram and word models may still produce EOS: cut its text after the first character.
    encoding = tokenizer.encode(text, add_special_tokens=False)
    found = zip(encoding.ids, encoding.offsets, strict=True)
    cuts = [0, *(start + 1 for token, (start, _) in found if token == eos_id), len(text)]
    parts = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
    encodings = tokenizer.encode_batch_fast(parts, add_special_tokens=False)
    for part, encoding in zip(parts, encodings, strict=True):
        if eos_id in encoding.ids:
            raise InputError(
                f"data.eos_token: {tokenizer.id_to_token(eos_id)!r} ends a document, and the "
                f"tokenizer gives it for the text {part[-40:]!r} too; name another token, or take "
                "another tokenizer"
            )
    return list(itertools.chain.from_iterable(encoding.ids for encoding in encodings))


def content_hash(tokenizer: Tokenizer) -> str:
    """16 hex digits of a hash of the tokenizer's JSON."""
    return digest(json.loads(tokenizer.to_str()))
