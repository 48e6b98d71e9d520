"""New tokens from a trained model, and the text that they are."""

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
_CHUNK = 8  # new tokens a call of the device, and so at a time on the screen


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and how many."""

    max_tokens: int | None = None
    """New tokens of each row, at most; None is 256, or what `seq_len` leaves (tokens)."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token, always."""
    top_k: int | None = None
    """Choose among this many of the most likely (tokens)."""
    top_p: float | None = None
    """Choose among the fewest most likely that together have this probability."""
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
      eos_id: the token that ends a row, itself included; None never does.
      seq_len: prompt and new tokens together may not be more; None for no bound.

    Returns:
      int32 arrays of the new tokens alone. Each is what the prompt gives in another batch at the
      same row, up to rounding.

    Raises:
      ValueError: a prompt is empty, holds an id that is no token, or leaves no room.
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
    """As `sample`, token by token: int32 [B], -1 for a row that is at its end."""
    max_tokens = _check_room(model, prompts, sampling.max_tokens, seq_len)
    if eos_id is not None and model.config.document_mask:  # it sees nothing across the last EOS
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
    num_slots = tokens_BP.shape[1] + bucket(max_tokens)

    def tokens() -> Iterator[np.ndarray]:
        decoding, first_B = prefill(params, tokens_BP, length_B, knobs, num_slots)
        waiting, started = first_B[:, None], 1
        while True:
            following = None
            if started < max_tokens:  # the device is busy with these while the last are looked at
                decoding, following = decode(params, decoding, knobs, _CHUNK)
            told_BT = np.asarray(waiting)[: len(prompts), : max_tokens - started + waiting.shape[1]]
            for told_B in told_BT.T:
                if (told_B < 0).all():
                    return
                yield told_B
            if following is None:
                return
            waiting, started = following, started + _CHUNK

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
    """How many new tokens may follow prompts of up to `longest` tokens.

    Raises:
      ValueError: together they are more than `seq_len`.
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


def bucket(size: int) -> int:
    """The size to pad to, a power of two: few shapes are compiled."""
    return max(16, 1 << (size - 1).bit_length())


def _pad(prompts: Sequence[Any], mesh: Mesh | None) -> tuple[np.ndarray, np.ndarray]:
    # Tokens [B, P] and lengths [B]; devices get equal numbers of rows, of which the last are idle.
    ways = math.prod(mesh.shape[axis] for axis in AXES_OF["batch"]) if mesh else 1
    length_B = np.ones(-(-len(prompts) // ways) * ways, np.int32)
    length_B[: len(prompts)] = [len(prompt) for prompt in prompts]
    tokens_BP = np.zeros((len(length_B), bucket(int(length_B.max()))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, : len(prompt)] = prompt
    return tokens_BP, length_B


def printable(text: str) -> str:
    """Without control characters: a model may write any byte, and a terminal obeys some of them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


class Sample(NamedTuple):
    """What a model wrote after a prompt."""

    prompt: str
    text: str
    """Without the prompt."""
    tokens: list[int]
    """The new ones."""
    ended: bool
    """Whether the model ended the document, and not max_tokens."""


@prints_lines
def sample_run(
    run: str,
    prompts: Sequence[str],
    sampling: Sampling = Sampling(),
    *,
    write: Callable[[str], None] | None = None,
) -> list[Sample]:
    """Text of the model of `RUN@STEP` after each prompt.

    Args:
      run: as in `load_model`.
      prompts: texts; an empty one is the beginning of a document.
      sampling: how tokens are chosen.
      write: takes the first prompt and its text as it comes, in whole characters.

    Raises:
      ValueError: no such run or step, it is damaged, has no tokenizer, or a prompt is too long or
        not text.
    """
    if odd := [prompt for prompt in prompts if re.search("[\ud800-\udfff]", prompt)]:
        raise InputError(f"prompts: found {shown(odd[0])}, expected text in UTF-8")
    selected, blueprint, params = load_selected(run)
    config, eos_id = selected.metadata.run_config(), selected.metadata.eos_id
    path = selected.folder / TOKENIZER
    if not path.is_file():
        raise InputError(
            f"{path}: not found, expected the tokenizer of the run; a run on batches of its own "
            "has none: load_model and jaxlm.inference.sample.sample take its tokens"
        )
    tokenizer = load_tokenizer(path)
    ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    ids = [row or ([] if eos_id is None else [eos_id]) for row in ids]
    log_selected(selected)
    model = nnx.merge(blueprint.graphdef, params)
    steps, decoder, written = [], DecodeStream(skip_special_tokens=True), ""
    coming = stream(model, ids, sampling, eos_id=eos_id, seq_len=config.seq_len)
    if write:
        write(prompts[0])
    for told_B in coming:
        steps.append(told_B)
        if write and told_B[0] >= 0 and (piece := decoder.step(tokenizer, int(told_B[0]))):
            write(piece)
            written += piece
    rows = [row[row >= 0].tolist() for row in np.stack(steps).T]
    samples = [
        Sample(prompt, tokenizer.decode(row), row, row[-1] == eos_id)
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    if write:
        write(samples[0].text.removeprefix(written))  # a character that was cut at the end
    return samples


def sample_at_end(run: Complete) -> None:
    """What the best model writes after the prompt, for the console, the events and the trackers."""
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
    except (ValueError, RuntimeError, OSError) as error:  # the run is complete, whatever this does
        _log.warning(f"no sample: {error}")
        return
    text = printable(found.prompt + found.text)
    _log.info(f"sample: {text}")
    run.events.add("sample", step, "at the end", prompt=found.prompt, text=found.text)
    run.show("sample", lambda: text)
