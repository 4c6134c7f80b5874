"""Exact confidence interval for a rate (Clopper and Pearson, 1934)."""

from __future__ import annotations

from torch_grood._optional import require
from torch_grood.errors import GroodError

__all__ = ["clopper_pearson"]


def clopper_pearson(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval for the probability behind `count` events in `n` trials (Clopper and Pearson, 1934).

    It answers whether an observed false-alarm rate is consistent with the promised one: it covers the true rate in
    at least `confidence` of all experiments, also for counts near 0, where the normal approximation does not.

    Args:
        count: number of events, 0 to `n`.
        n: number of independent trials, at least 1.
        confidence: coverage, in (0, 1).

    Raises:
        GroodError: if an argument is out of range.
    """
    if not (n >= 1 and 0 <= count <= n):
        raise GroodError(f"got {count} events in {n} trials; expected at least 1 trial and 0 to n events")
    if not 0 < confidence < 1:
        raise GroodError(f"confidence must lie between 0 and 1 (0.95 is usual), got {confidence}")
    test = require("scipy.stats", extra="bench").binomtest(int(count), int(n))
    low, high = test.proportion_ci(confidence_level=confidence, method="exact")
    return float(low), float(high)
