"""Runs tasks of EleutherAI's lm-eval (the extra `lm-eval`) on a checkpoint."""

import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxlm.errors import InputError
from jaxlm.inference.reader import Likelihood, Pair, ScoringModel
from jaxlm.terminal import prints_lines, progress

_log = logging.getLogger(__name__)

_MAX_NEW_TOKENS = 256  # default of lm-eval's adapters


class HarnessModel(TemplateLM):
    """A `ScoringModel` with lm-eval's interface; the base class tokenizes text into pairs.

    Args:
      model: the model.
      look: called between batches and between generated tokens, and may raise to end the tasks.
        Without it, a bar shows the progress.
    """

    def __init__(self, model: ScoringModel, look: Callable[[], None] | None = None):
        super().__init__()
        self._scoring_model, self._look = model, look

    @property
    def eot_token_id(self) -> int:
        """The EOS token, which is also the context of a text without one."""
        return self._scoring_model.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text, without special tokens."""
        del add_special_tokens, kwargs
        return self._scoring_model.tokenizer.encode(string, add_special_tokens=False).ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs: list[Pair] = [(context, continuation) for _, context, continuation in requests]
        return [(found.logprob, found.is_greedy) for found in self._likelihoods(pairs)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood (nats) of whole texts, each token predicted once, in full windows."""
        del disable_tqdm
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scoring_model.seq_len,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, self._likelihoods(pairs), strict=True):
            totals[owner] += found.logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop sequence, the end of the document or a token limit.

        Raises:
          ValueError: the task asks for sampling, or for more new tokens than `seq_len` allows.
        """
        del disable_tqdm
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        calls: list[Any] = [request.args for request in requests]  # context, options
        for number, (_, options) in enumerate(calls):
            groups.setdefault(repr(options), []).append(number)
        for numbers in groups.values():
            contexts, options = [calls[n][0] for n in numbers], calls[numbers[0]][1]
            for number, text in zip(numbers, self._generate(contexts, options), strict=True):
                texts[number] = text
        return texts

    def _generate(self, contexts: Sequence[str], kwargs: dict[str, Any]) -> list[str]:
        decode = self._scoring_model.tokenizer.decode
        default = min(_MAX_NEW_TOKENS, self._scoring_model.seq_len // 2)
        options: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, default))
        if options["do_sample"]:
            raise InputError(
                f"generation_kwargs: found {kwargs}, expected greedy decoding; set do_sample: "
                "false in the task"
            )
        until = handle_stop_sequences(options.get("until"), eos=None)
        found = self._scoring_model.continue_greedily(
            [self.tok_encode(context) or [self.eot_token_id] for context in contexts],
            options["max_gen_toks"],
            lambda tokens: self._is_end(decode(tokens), until),
        )
        return [postprocess_generated_text(decode(tokens), until, None) for tokens in found]

    def _is_end(self, text: str, until: Sequence[str]) -> bool:
        if self._look:
            self._look()
        return any(stop and stop in text for stop in until)

    def _likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        if look := self._look:
            return self._scoring_model.likelihoods(pairs, lambda _: look())
        with progress("Reading", len(pairs)) as advance:
            return self._scoring_model.likelihoods(pairs, advance)


@prints_lines
def load_tasks(names: str, include_path: str | None = None) -> dict[str, Any]:
    """The tasks, with their documents.

    Args:
      names: of tasks, groups or tags, separated by commas.
      include_path: a folder of YAML tasks. If it has all tasks, lm-eval's own are not indexed,
        which takes half a minute.

    Raises:
      ValueError: there is no such task or folder, or a task cannot be loaded.
    """
    if include_path and not os.path.isdir(include_path):
        raise InputError(f"include_path: found {include_path}, expected a folder of YAML tasks")
    tasks = [name.strip() for name in names.split(",") if name.strip()]
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if missing := [task for task in tasks if task not in manager.all_tasks]:
        _log.info(f"looking for {', '.join(missing)} among the tasks of lm-eval")
        manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.all_tasks:
            near = " or ".join(get_close_matches(task, manager.all_tasks))
            raise InputError(
                f"tasks: found {task}, expected the name of a task of lm-eval"
                + (f" or of one in {include_path}" if include_path else "")
                + (f"; did you mean {near}?" if near else "")
            )
    try:
        with own_random_state():
            loaded: Any = manager.load(tasks)
        return loaded
    except Exception as error:
        raise InputError(
            f"tasks: {', '.join(tasks)} cannot be loaded ({type(error).__name__}: {error}); look "
            "at the YAML, and at the files that it names"
        ) from error


@prints_lines
def run_tasks(
    model: ScoringModel,
    loaded: dict[str, Any],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    look: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Results of lm-eval tasks.

    Args:
      model: the model.
      loaded: the tasks, from `load_tasks`.
      num_fewshot: examples in a prompt; None for the number in the task.
      limit: maximum number of documents of each task.
      look: as in `HarnessModel`.

    Returns:
      Task -> its metrics, `samples` (number of documents) and `version`.
    """
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        wanted = own if num_fewshot is None or own == 0 else num_fewshot
        task.set_config(key="num_fewshot", value=wanted or 0)
        task.set_fewshot_seed(seed=1234)  # lm-eval's default
    # Not simple_evaluate, which starts git and seeds the process. Its annotations are wrong.
    evaluate: Any = lm_eval.evaluate
    with own_random_state():
        found = evaluate(
            lm=HarnessModel(model, look),
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=0,  # bootstrapping forks, which is unsafe with JAX
            log_samples=False,
        )
    return {
        name: {
            **{key: value for key, value in metrics.items() if isinstance(value, float)},
            "samples": found["n-samples"].get(name, {}).get("effective"),
            "version": found["versions"].get(name),
        }
        for name, metrics in found["results"].items()
    }


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """Restores the generators of the process, which a task may use, and a caller's own batches."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
