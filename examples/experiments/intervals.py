"""Differences to a baseline over the same seeds, with their intervals."""

from __future__ import annotations

import math
import statistics


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """The t with ``P(|T| < t) = level`` for Student's T with `freedom` degrees of freedom.

    Bisection on the distribution, a finite sum of powers of cosines (Abramowitz and Stegun 26.7.3
    and 26.7.4).
    """
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1, got {freedom}")

    def inside(angle: float) -> float:  # P(|T| < sqrt(freedom) tan(angle))
        odd = freedom % 2
        total, term = 0.0, math.cos(angle) if odd else 1.0
        for power in range(odd, freedom - 1, 2):
            total += term
            term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def paired(values: list[float], baseline: list[float]) -> tuple[float, float | None]:
    """Mean of the differences to the baseline, seed by seed, and half the 95 % interval's width.

    The half width is t s / sqrt(n): s the standard deviation of the n differences, t of n - 1
    degrees of freedom. None with a single seed.
    """
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return mean, None
    return mean, t_quantile(count - 1) * statistics.stdev(differences) / math.sqrt(count)
