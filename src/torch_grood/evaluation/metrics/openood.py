"""OpenOOD v1.5's own definitions, to the last bit: what it prints of a pair of ID and OOD sets."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torch_grood.evaluation.metrics._curves import _Curve, _curve, _Found
from torch_grood.evaluation.metrics._scores import Scores, _both

__all__ = ["OpenOODMetrics", "openood_metrics"]


class OpenOODMetrics(NamedTuple):
    """What OpenOOD v1.5 prints of one pair of sets, each in [0, 1].

    Attributes:
        fpr95: share of ID flagged at the first point of OpenOOD's ROC curve where 95 % of OOD is caught.
        auroc: area under that curve.
        aupr_in: trapezoidal area under the precision-recall curve, ID as the positive class.
        aupr_out: the same with OOD as the positive class.
    """

    fpr95: float
    auroc: float
    aupr_in: float
    aupr_out: float


def openood_metrics(id_scores: Scores, ood_scores: Scores) -> OpenOODMetrics:
    """What OpenOOD v1.5 computes of confidences −S, to the last bit (its openood/evaluators/metrics.py).

    Its figures come from scikit-learn's curves, and differ from this module's own in two ways:

    - AUPR is the trapezoidal area, as a rule another number than the average precision: 1 − ½ n / (n + m) for constant
      scores (n, m: negatives, positives). Until its issue 211 (December 2023) was mended, OpenOOD printed the two AUPR
      under each other's names.
    - FPR@95 is read off a curve from which collinear points are dropped. Without ties nothing is lost. With ties it may
      pass over the first threshold that catches 95 % and report a later one: never less than
      `id_flagged_at_ood_caught`, and up to 1 in its place.

    OpenOOD itself stops at NaN and at infinities. NaN is an error here, too; infinite scores are ranked.

    Args:
        id_scores: (n,) numbers, higher = more OOD. OpenOOD keeps confidences as the method returns them, often in
            float32, where more scores tie: pass the same numbers to get the same figures.
        ood_scores: (m,) likewise.

    Raises:
        GroodError: as `auroc`.
    """
    return _openood(_curve(*_both(id_scores, ood_scores)))


def _openood(curve: _Curve) -> OpenOODMetrics:
    caught = curve.catching_ood()
    true, false = caught
    if true.size > 2:
        corners = np.r_[True, (np.diff(true, 2) != 0) | (np.diff(false, 2) != 0), True]
        true, false = true[corners], false[corners]
    tpr, fpr = np.r_[0, true] / true[-1], np.r_[0, false] / false[-1]
    return OpenOODMetrics(
        fpr95=float(fpr[np.argmax(tpr >= 0.95)]),
        auroc=_trapezoid(fpr, tpr),
        aupr_in=_trapezoidal_aupr(curve.keeping_id()),
        aupr_out=_trapezoidal_aupr(caught),
    )


def _trapezoidal_aupr(found: _Found) -> float:
    precision = found.positive / (found.positive + found.negative)
    recall = found.positive / found.positive[-1]
    # From the loosest threshold to the strictest, and on to recall 0 at precision 1: the order decides the last bit.
    return -_trapezoid(np.append(recall[::-1], 0.0), np.append(precision[::-1], 1.0))


def _trapezoid(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2.0).sum())
