"""Figures with intervals and tests, whatever they come from, and Holm's correction for many tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch_grood.errors import GroodError
from torch_grood.evaluation.inference.samples import Floats

__all__ = ["Estimate", "EstimateWithTest", "checked_confidence", "holm", "sample_variance"]


@dataclass(frozen=True)
class Estimate:
    """A figure and how sure it is.

    Attributes:
        value: the figure on all samples.
        standard_error: of the value.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    standard_error: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return the numbers as a plain dictionary."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class EstimateWithTest(Estimate):
    """An estimate and a two-sided test: of one method against chance, or of two methods against no difference.

    Attributes:
        z: distance from the hypothesis in standard errors; infinite if the standard error is 0.
        p: two-sided p-value.
    """

    z: float
    p: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): reject where it is at most α, and a false one is among them with at most α.

    The promise holds whatever the comparisons have in common, such as one method that all others are held against.

    Args:
        p_values: of all comparisons that are made, in any order.

    Returns:
        Adjusted p-values in the same order.

    Raises:
        GroodError: if a p-value lies outside [0, 1].
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise GroodError(f"a p-value lies between 0 and 1, got {p}")
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = least
    return adjusted


def checked_confidence(confidence: float) -> float:
    """The coverage of an interval, if it is one."""
    if not 0 < confidence < 1:
        raise GroodError(f"confidence must lie between 0 and 1 (0.95 is usual), got {confidence}")
    return confidence


def sample_variance(values: Floats) -> float:
    """With n − 1; exactly 0 of equal numbers."""
    # The mean of equal numbers may differ from them in the last bit; no spread is told exactly.
    return 0.0 if values.min() == values.max() else float(values.var(ddof=1))
