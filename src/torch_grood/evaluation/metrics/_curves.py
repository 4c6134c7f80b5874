"""How many scores of each set lie at or below each distinct score, and the figures that follow from these counts.

Both sets are sorted once. Equal scores stand or fall together: no threshold can part them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torch_grood.errors import GroodError

__all__: list[str] = []


class _Found(NamedTuple):
    """Positive and negative samples found at each threshold, from the strictest to the loosest; int64."""

    positive: NDArray[np.int64]
    negative: NDArray[np.int64]


class _Curve(NamedTuple):
    """How many scores of each set lie at or below each distinct score, ascending; int64."""

    id_upto: NDArray[np.int64]
    ood_upto: NDArray[np.int64]

    @property
    def n_id(self) -> int:
        return int(self.id_upto[-1])

    @property
    def n_ood(self) -> int:
        return int(self.ood_upto[-1])

    def catching_ood(self) -> _Found:
        """Thresholds from the highest score down, OOD being positive."""
        return _Found(
            (self.n_ood - _shifted(self.ood_upto))[::-1],
            (self.n_id - _shifted(self.id_upto))[::-1],
        )

    def keeping_id(self) -> _Found:
        """Thresholds from the lowest score up, ID being positive."""
        return _Found(self.id_upto, self.ood_upto)


def _curve(id_array: NDArray[np.float64], ood_array: NDArray[np.float64]) -> _Curve:
    scores = np.concatenate([np.sort(id_array), np.sort(ood_array)])
    order = np.argsort(scores, kind="stable")  # which merges the two sorted runs
    ordered = scores[order]
    last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), scores.size - 1)
    ood_upto = np.cumsum(order >= id_array.size, dtype=np.int64)[last]
    return _Curve(last + 1 - ood_upto, ood_upto)


def _shifted(upto: NDArray[np.int64]) -> NDArray[np.int64]:
    """From counts at or below each score to counts below it."""
    return np.concatenate([[0], upto[:-1]])


def _auroc(curve: _Curve) -> float:
    below = _shifted(curve.id_upto)
    twice_won = int((np.diff(curve.ood_upto, prepend=0) * (below + curve.id_upto)).sum())
    return twice_won / (2 * curve.n_id * curve.n_ood)


def _ood_accepted(curve: _Curve, level: float) -> float:
    at = np.searchsorted(curve.id_upto, _count_for(level, curve.n_id))
    return int(curve.ood_upto[at]) / curve.n_ood


def _id_flagged(curve: _Curve, level: float) -> float:
    spared = curve.n_ood - _count_for(level, curve.n_ood)
    at = np.searchsorted(curve.ood_upto, spared, side="right")
    return (curve.n_id - int(_shifted(curve.id_upto)[at])) / curve.n_id


def _average_precision(found: _Found) -> float:
    precision = found.positive / (found.positive + found.negative)
    # Weighted by whole numbers and divided last: a perfect order gives 1 and not nearly 1.
    return float((np.diff(found.positive, prepend=0) * precision).sum() / found.positive[-1])


def _count_for(level: float, n: int) -> int:
    """Smallest k with k / n ≥ level."""
    if not 0 < level <= 1:
        raise GroodError(f"level must be a share in (0, 1], such as 0.95; got {level}")
    # Division is correctly rounded, so 19 / 20 equals the literal 0.95; ceil(level · n) can be one too high.
    return int(np.searchsorted(np.arange(1, n + 1) / n, level)) + 1
