"""`jaxlm eval`: a trained model at work."""

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
