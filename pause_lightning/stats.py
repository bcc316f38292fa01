"""The statistics every accuracy is shown with: Wilson's interval and the exact paired test. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054


def wilson_interval(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (95% by default) of a proportion. (nan, nan) for n = 0."""
    if n <= 0:
        return (math.nan, math.nan)
    p = successes / n
    denominator = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / denominator
    half = z / denominator * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (max(0.0, centre - half), min(1.0, centre + half))


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int, float]:
    """Exact two-sided McNemar test on paired verdicts: (lost, gained, p).

    Raises:
        ValueError: the two do not have the same length.
    """
    if len(before) != len(after):
        raise ValueError(f"paired verdicts of different length: {len(before)} and {len(after)}")
    lost = sum(b and not a for b, a in zip(before, after))
    gained = sum(a and not b for b, a in zip(before, after))
    n, k = lost + gained, min(lost, gained)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return lost, gained, min(1.0, 2 * tail / 2**n) if n else 1.0


def show_accuracy(accuracy: float, low: float, high: float, n: int) -> str:
    """``67.2% [64.1, 70.1] (n=1000)``: the one way an accuracy is printed."""
    return f"{100 * accuracy:.1f}% [{100 * low:.1f}, {100 * high:.1f}] (n={n})"
