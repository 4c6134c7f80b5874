"""Figures of one detector on one pair of ID and OOD sets: AUROC, the two "FPR@95" by what they are, average precision.

All come from the same counts (`_curves`), so that `detection_metrics` sorts once for all of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch_grood.evaluation.metrics._curves import _auroc, _average_precision, _curve, _id_flagged, _ood_accepted
from torch_grood.evaluation.metrics._scores import Scores, _both
from torch_grood.evaluation.metrics.openood import _openood

__all__ = [
    "FIGURES",
    "DetectionMetrics",
    "aupr_id",
    "aupr_ood",
    "auroc",
    "detection_metrics",
    "id_flagged_at_ood_caught",
    "ood_accepted_at_id_kept",
]

FIGURES = ("auroc", "ood_accepted_at_95_id_kept", "id_flagged_at_95_ood_caught", "aupr_ood", "aupr_id")
"""The figures of `DetectionMetrics`, by name."""


@dataclass(frozen=True)
class DetectionMetrics:
    """One detector on one pair of ID and OOD sets; every figure but the counts lies in [0, 1].

    Attributes:
        auroc: area under the ROC curve, 0.5 for scores that tell nothing.
        ood_accepted_at_95_id_kept: share of OOD accepted when at least 95 % of ID is kept ("FPR@95" in most papers).
        id_flagged_at_95_ood_caught: share of ID flagged when at least 95 % of OOD is caught ("FPR@95" in OpenOOD).
        aupr_ood: average precision with OOD as the positive class.
        aupr_id: average precision with ID as the positive class.
        openood_fpr95: that share of flagged ID as OpenOOD computes it, larger where scores tie (`openood_metrics`).
        openood_aupr_ood: OpenOOD's trapezoidal AUPR with OOD as the positive class.
        openood_aupr_id: OpenOOD's trapezoidal AUPR with ID as the positive class.
        n_id: number of ID scores; n_ood: number of OOD scores. All AUPR depend on their ratio.
    """

    auroc: float
    ood_accepted_at_95_id_kept: float
    id_flagged_at_95_ood_caught: float
    aupr_ood: float
    aupr_id: float
    openood_fpr95: float
    openood_aupr_ood: float
    openood_aupr_id: float
    n_id: int
    n_ood: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the figures as a plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)


def auroc(id_scores: Scores, ood_scores: Scores) -> float:
    """Area under the ROC curve: the chance that an OOD sample scores above an ID sample, ties counting one half.

    The pairs are counted as integers, so the figure is the true quotient, rounded once.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: (m,) likewise.

    Raises:
        GroodError: if a set is empty, not 1-D, not real numbers, or holds NaN.
    """
    return _auroc(_curve(*_both(id_scores, ood_scores)))


def ood_accepted_at_id_kept(id_scores: Scores, ood_scores: Scores, level: float = 0.95) -> float:
    """Share of OOD that is accepted when at least `level` of ID is kept ("FPR@95" in most papers).

    The threshold is the lowest ID score at or below which `level` of the ID scores lie; a sample is kept if its score
    does not exceed it, as GROOD decides (Algorithm 2: ID if S(x) ≤ τ). Lower is better.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: (m,) likewise.
        level: share of ID to keep, in (0, 1].

    Raises:
        GroodError: as `auroc`, or if `level` is outside (0, 1].
    """
    return _ood_accepted(_curve(*_both(id_scores, ood_scores)), level)


def id_flagged_at_ood_caught(id_scores: Scores, ood_scores: Scores, level: float = 0.95) -> float:
    """Share of ID that is flagged when at least `level` of OOD is caught ("FPR@95" in OpenOOD, but for ties).

    The threshold is the highest OOD score at or above which `level` of the OOD scores lie; a sample is flagged if its
    score reaches it. Lower is better.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: (m,) likewise.
        level: share of OOD to catch, in (0, 1].

    Raises:
        GroodError: as `auroc`, or if `level` is outside (0, 1].
    """
    return _id_flagged(_curve(*_both(id_scores, ood_scores)), level)


def aupr_ood(id_scores: Scores, ood_scores: Scores) -> float:
    """Average precision with OOD as the positive class; m / (n + m) for scores that tell nothing.

    Average precision is the step-wise sum, not the trapezoidal area that OpenOOD prints: the trapezoid interpolates
    between precisions that no threshold attains, and gives constant scores more than their prevalence.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: (m,) likewise.

    Raises:
        GroodError: as `auroc`.
    """
    return _average_precision(_curve(*_both(id_scores, ood_scores)).catching_ood())


def aupr_id(id_scores: Scores, ood_scores: Scores) -> float:
    """Average precision with ID as the positive class; n / (n + m) for scores that tell nothing.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: (m,) likewise.

    Raises:
        GroodError: as `auroc`.
    """
    return _average_precision(_curve(*_both(id_scores, ood_scores)).keeping_id())


def detection_metrics(id_scores: Scores, ood_scores: Scores) -> DetectionMetrics:
    """Every figure of this module, for one detector on one pair of sets, which are sorted once.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: (m,) likewise.

    Raises:
        GroodError: as `auroc`.
    """
    id_array, ood_array = _both(id_scores, ood_scores)
    curve = _curve(id_array, ood_array)
    openood = _openood(curve)
    return DetectionMetrics(
        auroc=_auroc(curve),
        ood_accepted_at_95_id_kept=_ood_accepted(curve, 0.95),
        id_flagged_at_95_ood_caught=_id_flagged(curve, 0.95),
        aupr_ood=_average_precision(curve.catching_ood()),
        aupr_id=_average_precision(curve.keeping_id()),
        openood_fpr95=openood.fpr95,
        openood_aupr_ood=openood.aupr_out,
        openood_aupr_id=openood.aupr_in,
        n_id=id_array.size,
        n_ood=ood_array.size,
    )
