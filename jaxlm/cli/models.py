"""`jaxlm eval`, `jaxlm sample` and `jaxlm benchmark`."""

import json
from typing import Any

from jaxlm.cli.arguments import RunAtStep, RunsAtSteps
from jaxlm.cli.output import notes, show
from jaxlm.errors import InputError


def evaluate(
    runs: RunsAtSteps,
    *,
    paired: bool = False,
    source: str | None = None,
    held_out: bool = False,
    follow: bool = False,
    out: str | None = None,
    poll_s: float = 10.0,
    json: bool = False,
) -> int:
    """Evaluate checkpoints on the held-out sets of their runs, or compare two of them.

    Args:
      runs: RUN@STEP each; STEP is best, latest, final or a number, and best if left out.
      paired: compare two checkpoints on the same batches, or on the same documents if their
        tokenizers differ, with a 95% confidence interval.
      source: evaluate on all of another source, such as text:GLOB.
      held_out: of --source, take only the documents that a run on it would hold out (1 of 20).
      follow: evaluate each new checkpoint of a training run until the run ends (exit code 0; 130
        after Ctrl-C, and the same command continues).
      out: with --follow, the file to append to; evals.jsonl in the run folder if left out.
      poll_s: with --follow, seconds between two scans of the folder.
      json: print JSON; with --follow, an object a line.

    Examples:
      jaxlm eval runs/tiny@best runs/tiny-2@best --paired
      jaxlm eval runs/tiny --source "text:books/*.txt"
      jaxlm eval runs/tiny --follow
    """
    if follow:
        from jaxlm.checkpoints.names import split_step

        if len(runs) != 1 or split_step(runs[0])[1] or paired:
            found = " ".join(runs)
            raise InputError(f"--follow: found {found}, expected one RUN; leave out the rest")
        return _follow(runs[0], source, held_out, out, poll_s, json)
    if out:
        raise InputError(f"--out: found {out}, expected it with --follow only; add --follow")
    from jaxlm.evaluation.paired import paired_difference
    from jaxlm.evaluation.score import score

    if not runs or (paired and len(runs) != 2):
        expected = "two of them with --paired" if paired else "at least one"
        raise InputError(f"RUN@STEP: found {len(runs)}, expected {expected}; add or drop some")
    with notes(json):
        scores = score(runs, source=source, held_out=held_out, paired=paired)
    values: list[Any] = [s.to_json() for s in scores]
    part = "of" if source else "held out of"
    lines = [
        f"{s.run} (step {s.step}): loss {s.loss:.4f}, perplexity {s.perplexity:.2f}, "
        f"{s.bits_per_byte:.4f} bits per byte, {s.num_tokens:,} tokens {part} {s.source}"
        for s in scores
    ]
    if paired:
        found = paired_difference(scores[0].sums, scores[1].sums)
        verdict = "cannot tell" if found.better is None else f"{scores[found.better].run} is better"
        unit = scores[0].unit
        values.append({**found._asdict(), "unit": unit, "verdict": verdict})
        parts = "documents" if unit == "bits per byte" else "batches"
        lines.append(
            f"difference: {found.mean:+.5f} {unit}, 95% confidence {found.low:+.5f} to "
            f"{found.high:+.5f}, over {found.num_parts} {parts}: {verdict}"
        )
    show(values if len(values) != 1 else values[0], "\n".join(lines), json)
    return 0


def _follow(
    run: str, source: str | None, held_out: bool, out: str | None, poll_s: float, as_json: bool
) -> int:
    from jaxlm.evaluation.follow import follow

    def print_row(row: Any) -> None:
        line = f"step {row['step']}: loss {row['loss']:.4f}, perplexity {row['perplexity']:.2f}"
        print(json.dumps(row) if as_json else f"{line}, on {row['source']}", flush=True)

    with notes(as_json):
        follow(run, source=source, held_out=held_out, out=out, poll_s=poll_s, on_row=print_row)
    return 0


def benchmark(
    run: RunAtStep,
    *,
    tasks: str,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    json: bool = False,
) -> int:
    """Run tasks of EleutherAI's lm-eval on a checkpoint (extra lm-eval).

    Args:
      run: RUN@STEP; STEP is best, latest, final or a number, and best if left out.
      tasks: names of tasks, separated by commas.
      include_path: a folder with your own tasks (YAML).
      num_fewshot: examples in each prompt; by default the number in the task.
      limit: maximum number of documents of each task.
      batch_size: rows of a batch.
      json: print JSON.

    Examples:
      jaxlm benchmark runs/tiny@best --tasks lambada_openai --limit 100
      jaxlm benchmark runs/tiny --tasks mine --include_path tasks --json
    """
    from jaxlm.extras import MODULES, needs

    needs(MODULES["lm-eval"], "jaxlm benchmark")
    from jaxlm.evaluation.harness import load_tasks, run_tasks
    from jaxlm.files.durable import expand
    from jaxlm.inference.reader import ScoringModel

    with notes(json):
        loaded = load_tasks(tasks, include_path and expand(include_path, "--include_path"))
        model = ScoringModel.of_run(run, batch_size=batch_size)
        found = run_tasks(model, loaded, num_fewshot=num_fewshot, limit=limit)
    about = ("samples", "version")
    lines = [
        f"{name} ({values['samples']} documents): "
        + ", ".join(f"{key} {value:.4f}" for key, value in values.items() if key not in about)
        for name, values in found.items()
    ]
    show({"run": run, "step": model.step, "tasks": found}, "\n".join(lines), json)
    return 0


def sample(
    run: RunAtStep,
    *,
    prompt: tuple[str, ...] = ("",),
    num_samples: int = 1,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    json: bool = False,
) -> int:
    """Continue a prompt with a trained model, at most to the end of the document.

    Args:
      run: RUN@STEP; STEP is best, latest, final or a number, and best if left out.
      prompt: one text or several; by default the beginning of a document.
      num_samples: texts for each prompt.
      max_tokens: maximum number of new tokens of each text; by default 256, or less if seq_len
        leaves less room.
      temperature: above 1 is more varied, below 1 less; 0 always takes the most likely token.
      top_k: sample from this many of the most likely tokens only.
      top_p: sample from the smallest set of most likely tokens with at least this probability.
      seed: the same seed gives the same text.
      json: print JSON.

    Examples:
      jaxlm sample runs/tiny@best --prompt "My fellow citizens"
      jaxlm sample runs/tiny --num_samples 3 --temperature 0.8 --top_k 50
    """
    from jaxlm.inference.sample import Sampling, printable, sample_run

    if num_samples < 1:
        raise InputError(f"num_samples: found {num_samples}, expected at least 1")
    prompts = [text for text in prompt for _ in range(num_samples)]
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
    streams = len(prompts) == 1 and not json

    def write(text: str) -> None:
        print(printable(text), end="", flush=True)

    with notes(True):
        samples = sample_run(run, prompts, sampling, write=write if streams else None)
    lines = [printable(found.prompt + found.text) for found in samples]
    values = [found._asdict() for found in samples]
    if streams:
        print()
    else:
        show(values if len(values) != 1 else values[0], "\n\n---\n\n".join(lines), json)
    return 0
