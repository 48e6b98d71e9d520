"""The difference of two checkpoints on the same text, with its confidence interval."""

import math
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from jaxlm.errors import InputError


class PairedDifference(NamedTuple):
    """The difference of two losses on the same parts of text, with its confidence interval."""

    mean: float
    """Loss of the first minus loss of the second (in `Score.unit`)."""
    low: float
    high: float
    """95% confidence interval of the mean."""
    num_parts: int
    """Batches, or documents."""

    @property
    def better(self) -> int | None:
        """0 if the first is better, 1 if the second; None if the interval contains 0."""
        if self.high < 0:
            return 0
        return 1 if self.low > 0 else None


def paired_difference(sums_a: np.ndarray, sums_b: np.ndarray) -> PairedDifference:
    """The difference of two mean losses per token, with its 95% confidence interval.

    The difficulty of a batch is common to both, and cancels in the difference (Miller, "Adding
    Error Bars to Evals", 2411.00640, section 3). The mean is a ratio, of the sum of differences to
    the number of tokens; its error is that of a ratio estimator over batches (Cochran, "Sampling
    Techniques", 3rd ed. 1977, chapter 6), with Student's t of (batches - 1) degrees of freedom. The
    interval holds for more text of this kind, not for other text.

    Args:
      sums_a: `Score.sums` of the first: loss sum and number of tokens (or bytes) [parts, 2].
      sums_b: the same of the second, on the same parts.

    Raises:
      ValueError: fewer than two parts.
    """
    count = len(sums_a)
    if count < 2:
        raise InputError(
            f"held-out set: found {count} batches or documents in common, expected at least 2 for "
            "a confidence interval; raise data.eval_tokens, or name text with --source"
        )
    tokens, gaps = sums_a[:, 1], sums_a[:, 0] - sums_b[:, 0]
    mean = gaps.sum() / tokens.sum()
    variance = count / (count - 1) * np.square(gaps - mean * tokens).sum()
    margin = float(stdtrit(count - 1, 0.975)) * math.sqrt(variance) / tokens.sum()
    return PairedDifference(float(mean), float(mean - margin), float(mean + margin), count)
