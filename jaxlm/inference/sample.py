"""Samples tokens and text from a trained model."""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from tokenizers.decoders import DecodeStream

from jaxlm.checkpoints.folder import TOKENIZER
from jaxlm.corpus.tokenizer import load_tokenizer
from jaxlm.device.decode import Knobs, Rule, make_programs, narrow
from jaxlm.device.sharding import AXES_OF
from jaxlm.errors import InputError
from jaxlm.files.strict import shown
from jaxlm.inference.load import load_selected, log_selected
from jaxlm.terminal import log_to, prints_lines
from jaxlm.training.at_end import Complete
from jaxlm.training.preflight import sample_tokens

_log = logging.getLogger(__name__)

_MAX_TOKENS = 256
_CHUNK = 8  # new tokens of one device call, printed together


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many."""

    max_tokens: int | None = None
    """Maximum number of new tokens of a row; None is 256, or less if `seq_len` leaves less room."""
    temperature: float = 1.0
    """Divisor of the logits; 0 always takes the most likely token."""
    top_k: int | None = None
    """Sample from this many of the most likely tokens only."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens with at least this probability."""
    seed: int = 0
    """The same seed, prompts and devices give the same tokens."""

    def __post_init__(self) -> None:
        t = self.temperature
        rules = {
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            "temperature": (t == 0 or 1e-4 <= t <= 1e4, "0, or 1e-4 to 1e4"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (0 <= self.seed < 2**32, "0 to 2**32 - 1"),
        }
        for name, (ok, expected) in rules.items():
            if not ok:
                raise InputError(f"{name}: found {getattr(self, name)}, expected {expected}")


def sample(
    model: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    sampling: Sampling = Sampling(),
    *,
    eos_id: int | None = None,
    seq_len: int | None = None,
) -> list[np.ndarray]:
    """New tokens after each prompt.

    Args:
      model: from `load_model`; the decoder of `jaxlm.device.model`.
      prompts: token ids of each row, at least one; rows may differ in length.
      sampling: how tokens are chosen.
      eos_id: the token that ends a row, included in the result; None for no such token.
      seq_len: maximum of prompt and new tokens together; None for no bound.

    Returns:
      int32 arrays, one for each prompt, of the new tokens only. A row depends on its prompt and its
      index in the batch, not on the other prompts, up to rounding.

    Raises:
      ValueError: a prompt is empty, holds an id outside of the vocabulary, or leaves no room.
    """
    tokens_TB = np.stack([*stream(model, prompts, sampling, eos_id=eos_id, seq_len=seq_len)])
    return [row[row >= 0] for row in tokens_TB.T]


def stream(
    model: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    sampling: Sampling = Sampling(),
    *,
    eos_id: int | None = None,
    seq_len: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields the tokens of `sample` position by position: int32 [B], -1 in a row that has ended."""
    max_tokens = _check_room(model, prompts, sampling.max_tokens, seq_len)
    if eos_id is not None and model.config.document_mask:  # attention stops at the last EOS
        prompts = [_last_document(np.asarray(prompt), eos_id) for prompt in prompts]
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    mesh = _mesh_of(params)
    if model.dtype != np.float32:
        params = jax.jit(narrow, static_argnums=1)(params, model.dtype)
    greedy = sampling.temperature == 0
    use_top_p = not greedy and sampling.top_p is not None and sampling.top_p < 1
    rule = Rule(greedy, None if greedy else sampling.top_k, use_top_p, eos_id)
    prefill, decode = make_programs(graphdef, mesh, rule)
    knobs = Knobs(
        np.uint32(sampling.seed),
        np.float32(sampling.temperature or 1),
        np.float32(sampling.top_p or 1),
    )
    tokens_BP, length_B = _pad(prompts, mesh)
    num_slots = tokens_BP.shape[1] + pad_to_power_of_two(max_tokens)

    def tokens() -> Iterator[np.ndarray]:
        decoding, first_B = prefill(params, tokens_BP, length_B, knobs, num_slots)
        chunk_BT, num_started = first_B[:, None], 1
        while True:
            next_chunk_BT = None
            if num_started < max_tokens:  # dispatched early: the device computes meanwhile
                decoding, next_chunk_BT = decode(params, decoding, knobs, _CHUNK)
            num_wanted = max_tokens - num_started + chunk_BT.shape[1]
            for tokens_B in np.asarray(chunk_BT)[: len(prompts), :num_wanted].T:
                if (tokens_B < 0).all():
                    return
                yield tokens_B
            if next_chunk_BT is None:
                return
            chunk_BT, num_started = next_chunk_BT, num_started + _CHUNK

    return tokens()


def _check_room(
    model: Any, prompts: Sequence[Any], max_tokens: int | None, seq_len: int | None
) -> int:
    if not len(prompts) or not all(len(prompt) for prompt in prompts):
        raise InputError("prompts: found an empty one, or none; expected one token or more in each")
    V, longest = model.config.vocab_size, max(map(len, prompts))
    for ids in map(np.asarray, prompts):
        if ids.min() < 0 or ids.max() >= V:
            raise InputError(
                f"prompts: found ids {ids.min()} to {ids.max()}, expected 0 to {V - 1}"
            )
    return check_room(longest, max_tokens, seq_len)


def check_room(longest: int, max_tokens: int | None, seq_len: int | None) -> int:
    """The number of new tokens that may follow prompts of up to `longest` tokens.

    Raises:
      ValueError: `longest` and `max_tokens` together exceed `seq_len`.
    """
    room = math.inf if seq_len is None else seq_len - longest
    found = max_tokens or max(min(_MAX_TOKENS, room), 1)
    if found > room:
        raise InputError(
            f"a prompt of {longest} tokens and {found} new ones are {longest + found}, expected at "
            f"most {seq_len}, the seq_len that the model was trained on; shorten the prompt"
            + (f", or set max_tokens to {room} or less" if room > 0 else "")
        )
    return int(found)


def _last_document(prompt_T: np.ndarray, eos_id: int) -> np.ndarray:
    ends = np.flatnonzero(prompt_T[:-1] == eos_id)
    return prompt_T[ends[-1] + 1 :] if len(ends) else prompt_T


def _mesh_of(params: Any) -> Mesh | None:
    sharding = jax.tree.leaves(params)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def pad_to_power_of_two(size: int) -> int:
    """The smallest power of two of at least `size` and 16, so that few shapes are compiled."""
    return max(16, 1 << (size - 1).bit_length())


def _pad(prompts: Sequence[Any], mesh: Mesh | None) -> tuple[np.ndarray, np.ndarray]:
    # Tokens [B, P] and lengths [B]. Idle rows fill the batch up to a multiple of the devices.
    ways = math.prod(mesh.shape[axis] for axis in AXES_OF["batch"]) if mesh else 1
    length_B = np.ones(-(-len(prompts) // ways) * ways, np.int32)
    length_B[: len(prompts)] = [len(prompt) for prompt in prompts]
    tokens_BP = np.zeros((len(length_B), pad_to_power_of_two(int(length_B.max()))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, : len(prompt)] = prompt
    return tokens_BP, length_B


def printable(text: str) -> str:
    """The text without control characters, which a model may emit and a terminal would obey."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


class Sample(NamedTuple):
    """A prompt and its continuation by a model."""

    prompt: str
    text: str
    """The continuation, without the prompt."""
    tokens: list[int]
    """Tokens of the continuation."""
    ended: bool
    """Whether the model ended the document before max_tokens cut it."""


@prints_lines
def sample_run(
    run: str,
    prompts: Sequence[str],
    sampling: Sampling = Sampling(),
    *,
    write: Callable[[str], None] | None = None,
) -> list[Sample]:
    """The text that the model of `RUN@STEP` generates after each prompt.

    Args:
      run: as in `load_model`.
      prompts: texts; an empty one is the beginning of a document.
      sampling: how tokens are chosen.
      write: receives the first prompt, then its continuation in pieces of whole characters.

    Raises:
      ValueError: no such run or step, the checkpoint is damaged or has no tokenizer, or a prompt is
        too long or not text.
    """
    if odd := [prompt for prompt in prompts if re.search("[\ud800-\udfff]", prompt)]:
        raise InputError(f"prompts: found {shown(odd[0])}, expected text in UTF-8")
    selected, blueprint, params = load_selected(run)
    config, eos_id = selected.metadata.run_config(), selected.metadata.eos_id
    path = selected.folder / TOKENIZER
    if not path.is_file():
        raise InputError(
            f"{path}: not found, expected the tokenizer of the run; a run on custom batches has "
            "none: call load_model and jaxlm.inference.sample.sample with token ids"
        )
    tokenizer = load_tokenizer(path)
    ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    ids = [row or ([] if eos_id is None else [eos_id]) for row in ids]
    log_selected(selected)
    model = nnx.merge(blueprint.graphdef, params)
    steps, decoder, written = [], DecodeStream(skip_special_tokens=True), ""
    new_tokens = stream(model, ids, sampling, eos_id=eos_id, seq_len=config.seq_len)
    if write:
        write(prompts[0])
    for tokens_B in new_tokens:
        steps.append(tokens_B)
        if write and tokens_B[0] >= 0 and (piece := decoder.step(tokenizer, int(tokens_B[0]))):
            write(piece)
            written += piece
    rows = [row[row >= 0].tolist() for row in np.stack(steps).T]
    samples = [
        Sample(prompt, tokenizer.decode(row), row, row[-1] == eos_id)
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    if write:
        write(samples[0].text.removeprefix(written))  # max_tokens may cut a character
    return samples


def sample_at_end(run: Complete) -> None:
    """Samples from the best checkpoint of a complete run, for console, events and trackers."""
    config = run.config
    # Several processes would each have to load the model.
    if config.sample_prompt is None or jax.process_count() > 1:
        return
    step = run.best.step if run.best else run.step
    sampling = Sampling(sample_tokens(config), temperature=0.8, top_k=50)
    source, prompts = f"{config.checkpoint_dir}@{step}", [config.sample_prompt]
    try:
        with log_to(lambda line: None):  # the run's last lines name the best checkpoint
            (found,) = sample_run(source, prompts, sampling)
    except (ValueError, RuntimeError, OSError) as error:  # a complete run must not fail here
        _log.warning(f"no sample: {error}")
        return
    text = printable(found.prompt + found.text)
    _log.info(f"sample: {text}")
    run.events.add("sample", step, "at the end", prompt=found.prompt, text=found.text)
    run.show("sample", lambda: text)
