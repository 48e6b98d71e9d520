"""`jaxlm eval` and `jaxlm sample`: a trained model at work."""

import sys
from typing import Any

from tyro.conf import Positional

from jaxlm.cli.output import note, show


def evaluate(
    runs: Positional[tuple[str, ...]],
    *,
    paired: bool = False,
    source: str | None = None,
    json: bool = False,
) -> int:
    """Evaluate checkpoints on the held-out sets of their runs, or tell which of two is better.

    Args:
      runs: RUN@STEP each; STEP is best, latest, final or a number, and best if left out.
      paired: of two, the difference over the same batches, with a 95% confidence interval.
      source: take the held-out documents of another source, such as text:GLOB.
      json: print JSON.
    """
    from jaxlm.score import paired_difference, score

    if not runs or (paired and len(runs) != 2):
        expected = "two of them with --paired" if paired else "at least one"
        raise ValueError(f"RUN@STEP: found {len(runs)}, expected {expected}")
    scores = score(runs, source=source, paired=paired, say=note(json))
    values: list[Any] = [s.to_json() for s in scores]
    lines = [
        f"{s.run} (step {s.step}): loss {s.loss:.4f}, perplexity {s.perplexity:.2f}, "
        f"{s.num_tokens:,} tokens held out of {s.source}"
        for s in scores
    ]
    if paired:
        found = paired_difference(scores[0].sums, scores[1].sums)
        verdict = "cannot tell" if found.better is None else f"{scores[found.better].run} is better"
        values.append({**found._asdict(), "verdict": verdict})
        lines.append(
            f"difference: {found.mean:+.5f}, 95% confidence {found.low:+.5f} to {found.high:+.5f}, "
            f"over {found.num_batches} batches: {verdict}"
        )
    show(values if len(values) != 1 else values[0], "\n".join(lines), json)
    return 0


def sample(
    run: Positional[str],
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
    """Have a trained model write on from a prompt, to the end of the document at most.

    Args:
      run: RUN@STEP; STEP is best, latest, final or a number, and best if left out.
      prompt: one text or several, as many as there are; by default the beginning of a document.
      num_samples: texts for each prompt.
      max_tokens: new tokens of each text, at most; by default 256, or what seq_len leaves.
      temperature: above 1 is more varied, below 1 less; 0 takes the most likely token, always.
      top_k: choose among this many of the most likely tokens.
      top_p: choose among the fewest most likely tokens that together have this probability.
      seed: the same seed gives the same text.
      json: print JSON.
    """
    from jaxlm.sample import Sampling, printable, sample_run

    if num_samples < 1:
        raise ValueError(f"num_samples: found {num_samples}, expected at least 1")
    prompts = [text for text in prompt for _ in range(num_samples)]
    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
    streams = len(prompts) == 1 and not json

    def write(text: str) -> None:
        print(printable(text), end="", flush=True)

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    samples = sample_run(run, prompts, sampling, say=say, write=write if streams else None)
    lines = [printable(found.prompt + found.text) for found in samples]
    values = [found._asdict() for found in samples]
    if streams:
        print()
    else:
        show(values if len(values) != 1 else values[0], "\n\n---\n\n".join(lines), json)
    return 0
