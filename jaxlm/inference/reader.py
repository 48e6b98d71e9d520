"""A trained model for evaluation: the likelihood of given tokens, and greedy continuation.

Rows are padded to few distinct lengths, so that few programs are compiled.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tokenizers import Tokenizer

from jaxlm.checkpoints.folder import TOKENIZER
from jaxlm.config import Config, MeshConfig
from jaxlm.corpus.tokenizer import load_tokenizer
from jaxlm.device.likelihood import make_token_scores
from jaxlm.device.sharding import batch_sharding, make_mesh
from jaxlm.device.state import Blueprint, Params
from jaxlm.errors import InputError
from jaxlm.inference.load import load_selected, log_selected
from jaxlm.inference.sample import Sampling, pad_to_power_of_two, stream
from jaxlm.terminal import prints_lines

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context and of its continuation."""


class Likelihood(NamedTuple):
    """The likelihood of a continuation after its context."""

    logprob: float
    """Sum over the continuation's tokens (nats)."""
    is_greedy: bool
    """Whether each token of the continuation is the likeliest at its position."""


class ScoringModel:
    """A model and its tokenizer, of a checkpoint or of a run in training.

    Attributes:
      step: step of the weights.
      tokenizer: text to tokens and back.
      eos_id: the token that ends a document, and precedes the next one.
      seq_len: context length that the model was trained on (tokens).
    """

    _params: Params
    _model: nnx.Module

    def __init__(
        self,
        blueprint: Blueprint,
        mesh: Mesh,
        config: Config,
        tokenizer_path: Path,
        eos_id: int,
        *,
        batch_size: int,
    ) -> None:
        """A model without weights, for `at`.

        Args:
          blueprint: of the model.
          mesh: of the weights.
          config: of the run.
          tokenizer_path: the tokenizer of the run.
          eos_id: the token that ends a document.
          batch_size: rows of a batch, rounded up to a multiple of the devices.
        """
        if batch_size < 1:
            raise InputError(f"batch_size: found {batch_size}, expected at least 1")
        self.step, self.eos_id, self.seq_len = 0, eos_id, config.seq_len
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer_path)
        self._mesh, self._graphdef = mesh, blueprint.graphdef
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        mask = eos_id if config.model.document_mask else None
        self._token_scores = make_token_scores(blueprint, mesh, mask)

    @classmethod
    @prints_lines
    def of_run(cls, run: str, *, batch_size: int = 8) -> "ScoringModel":
        """Restores the weights of a checkpoint on all devices.

        Args:
          run: `RUN@STEP`; best if STEP is left out.
          batch_size: as above.

        Raises:
          ValueError: there is no such checkpoint, it is damaged, or it has no tokenizer.
        """
        mesh = make_mesh(MeshConfig())
        selected, blueprint, params = load_selected(run, mesh)
        log_selected(selected)
        config, eos_id = selected.metadata.run_config(), selected.metadata.eos_id
        if eos_id is None:
            raise InputError(
                f"{run}: found no tokenizer, since the run was trained on custom batches; expected "
                "a run on text. jaxlm.load_model returns its model, for your own evaluation"
            )
        path = selected.folder / TOKENIZER
        model = cls(blueprint, mesh, config, path, eos_id, batch_size=batch_size)
        return model.at(selected.step, params)

    def at(self, step: int, params: Params) -> "ScoringModel":
        """The same model with these weights; compiled programs are shared."""
        found = copy.copy(self)
        found.step, found._params = step, params
        found._model = nnx.merge(self._graphdef, params)
        return found

    def likelihoods(
        self, pairs: Sequence[Pair], advance: Callable[[int], None] = lambda _: None
    ) -> list[Likelihood]:
        """The likelihood of each continuation after its context.

        A context that does not fit into `seq_len` with its continuation is cut from the left.

        Args:
          pairs: contexts and continuations, none empty.
          advance: called after each batch with its number of pairs.

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
            advance(len(batch))
        return [found[i] for i in range(len(pairs))]

    def continue_greedily(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Callable[[Sequence[int]], bool],
    ) -> list[list[int]]:
        """The likeliest tokens after each prompt, up to the end of the document.

        A prompt that does not fit into `seq_len` with the new tokens is cut from the left.

        Args:
          prompts: at least one token each.
          max_tokens: maximum number of new tokens.
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
            idle = [[self.eos_id]] * (self._batch_size - len(batch))  # one shape: no recompilation
            unfinished = set(batch)
            texts = [rows[i] for i in batch] + idle
            for tokens_B in stream(self._model, texts, greedy, eos_id=self.eos_id):
                for i, token in zip(batch, tokens_B.tolist(), strict=False):
                    if i not in unfinished:
                        continue
                    if token != self.eos_id:
                        new[i].append(token)
                    if token == self.eos_id or stop(new[i]):
                        unfinished.remove(i)
                if not unfinished:
                    break
        return new

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        # Yields padded length (a power of two, or seq_len) and row indices of each batch, the
        # longest rows first: if memory runs out, it does so in the first batch.
        padded = [min(self.seq_len, pad_to_power_of_two(n)) for n in lengths]
        order = sorted(range(len(lengths)), key=lambda i: -padded[i])
        while order:
            T = padded[order[0]]
            batch = [i for i in order[: self._batch_size] if padded[i] == T]
            order = order[len(batch) :]
            yield T, batch
