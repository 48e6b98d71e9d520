"""A trained model that reads text: the likelihood of tokens, and the likeliest ones to follow.

Rows are padded to a few lengths, so that few programs are compiled.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from jaxlm.checkpoints.folder import TOKENIZER
from jaxlm.config import MeshConfig
from jaxlm.corpus.tokenizer import load_tokenizer
from jaxlm.device.likelihood import make_token_scores
from jaxlm.device.sharding import batch_sharding, make_mesh
from jaxlm.errors import InputError
from jaxlm.inference.load import load_selected, log_selected
from jaxlm.inference.sample import Sampling, bucket, stream
from jaxlm.terminal import prints_lines

Pair = tuple[Sequence[int], Sequence[int]]
"""The tokens of a context, and those of its continuation."""


class Likelihood(NamedTuple):
    """A continuation after its context."""

    logprob: float
    """Sum over its tokens (nats)."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest at its place."""


class ScoringModel:
    """A checkpoint and its tokenizer.

    Attributes:
      step: its step.
      tokenizer: text to tokens and back.
      eos_id: the token that ends a document, and so comes before one.
      seq_len: tokens that the model was trained to look at.
    """

    @prints_lines
    def __init__(self, run: str, *, batch_size: int = 8) -> None:
        """Restores the weights of `RUN@STEP` (best, where no STEP is given) on all devices.

        Args:
          run: `RUN@STEP`.
          batch_size: rows at a time; rounded up to a multiple of the devices.

        Raises:
          ValueError: there is no such checkpoint, it is damaged, or it has no tokenizer.
        """
        if batch_size < 1:
            raise InputError(f"batch_size: found {batch_size}, expected at least 1")
        self._mesh = make_mesh(MeshConfig())
        selected, blueprint, self._params = load_selected(run, self._mesh)
        log_selected(selected)
        config, eos_id = selected.metadata.run_config(), selected.metadata.eos_id
        if eos_id is None:
            raise InputError(
                f"{run}: found no tokenizer, since the run had batches of its own; expected a run "
                "on text. jaxlm.load_model gives its model, to be evaluated by code of yours"
            )
        self.step, self.eos_id, self.seq_len = selected.step, eos_id, config.seq_len
        self.tokenizer: Tokenizer = load_tokenizer(selected.folder / TOKENIZER)
        self._batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        mask = eos_id if config.model.document_mask else None
        self._token_scores = make_token_scores(blueprint, self._mesh, mask)
        self._model = nnx.merge(blueprint.graphdef, self._params)

    def likelihoods(
        self, pairs: Sequence[Pair], done: Callable[[int], None] = lambda _: None
    ) -> list[Likelihood]:
        """How likely each continuation is after its context.

        Where the two are longer than the model looks at, the context is cut from the left.

        Args:
          pairs: neither of the two may be empty.
          done: called after each batch with its number of pairs.

        Raises:
          ValueError: a context or a continuation is empty, or a continuation is too long.
        """
        for context, continuation in pairs:
            if not context or not 0 < len(continuation) <= self.seq_len:
                raise InputError(
                    f"continuation: found {len(continuation)} tokens after {len(context)} of "
                    f"context, expected 1 to {self.seq_len} (the run's seq_len) after at least 1; "
                    "leave such documents out of the task"
                )
        rows = [[*context, *tokens][-self.seq_len - 1 :] for context, tokens in pairs]
        found: dict[int, Likelihood] = {}
        for T, batch in self._batches([len(row) - 1 for row in rows]):
            tokens_BT = np.zeros((self._batch_size, T + 1), np.int32)
            for b, i in enumerate(batch):
                tokens_BT[b, : len(rows[i])] = rows[i]
            arrays = {"inputs": tokens_BT[:, :-1], "targets": tokens_BT[:, 1:]}
            on_mesh = jax.device_put(arrays, batch_sharding(self._mesh))
            scores = jax.device_get(self._token_scores(self._params, on_mesh))
            for b, i in enumerate(batch):
                stop = len(rows[i]) - 1
                of_row = slice(stop - len(pairs[i][1]), stop)
                logprobs, likeliest = (array_BT[b, of_row] for array_BT in scores)
                total = math.fsum(logprobs.tolist())
                found[i] = Likelihood(total, bool(likeliest.all()))
            done(len(batch))
        return [found[i] for i in range(len(pairs))]

    def continue_greedily(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Callable[[Sequence[int]], bool],
    ) -> list[list[int]]:
        """The likeliest tokens after each prompt, up to the end of the document.

        Prompts are cut from the left, so that all tokens are within what the model looks at.

        Args:
          prompts: at least one token each.
          max_tokens: new tokens at most.
          stop: called with the new tokens of a prompt after each one; returns whether to stop.

        Returns:
          The new tokens, without the one that ends the document.

        Raises:
          ValueError: `max_tokens` leaves no room for a prompt.
        """
        if not 0 < max_tokens < self.seq_len:
            raise InputError(
                f"max_gen_toks: found {max_tokens}, expected 1 to {self.seq_len - 1}, below the "
                "run's seq_len; set it in the task's generation_kwargs"
            )
        rows = [list(prompt[max_tokens - self.seq_len :]) for prompt in prompts]
        new: list[list[int]] = [[] for _ in rows]
        greedy = Sampling(max_tokens, temperature=0)
        for _, batch in self._batches(list(map(len, rows))):
            idle = [[self.eos_id]] * (self._batch_size - len(batch))  # so that shapes are few
            going = set(batch)
            texts = [rows[i] for i in batch] + idle
            for tokens_B in stream(self._model, texts, greedy, eos_id=self.eos_id):
                for i, token in zip(batch, tokens_B.tolist(), strict=False):
                    if i not in going:
                        continue
                    if token != self.eos_id:
                        new[i].append(token)
                    if token == self.eos_id or stop(new[i]):
                        going.remove(i)
                if not going:
                    break
        return new

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        # A length to pad to (a power of two, or seq_len) and indices of rows, the longest first: so
        # memory runs out at once or never.
        padded = [min(self.seq_len, bucket(n)) for n in lengths]
        order = sorted(range(len(lengths)), key=lambda i: -padded[i])
        while order:
            T = padded[order[0]]
            batch = [i for i in order[: self._batch_size] if padded[i] == T]
            order = order[len(batch) :]
            yield T, batch
