"""Threshold-free figures of an OOD detector: OOD is the positive class, a higher score means more OOD.

    AUROC = P(S_ood > S_id) + ½ P(S_ood = S_id)

Two different figures go by the name "FPR@95" in the literature. Here neither does; each is called what it is:

- `ood_accepted_at_id_kept`: the share of OOD that is accepted when the threshold keeps at least 95 % of ID.
  What most papers print.
- `id_flagged_at_ood_caught`: the share of ID that is flagged when the threshold catches at least 95 % of OOD.
  What OpenOOD prints, but for ties (`openood_metrics`).

All figures depend on the order of the scores only: both sets are sorted once, and every figure comes from the counts at
or below each distinct score. Infinite scores are therefore legal (−∞ is the most ID, +∞ the most OOD), scores that
differ in the last bit or lie at 1e-300 stay apart, and any strictly increasing map of the scores changes nothing. Equal
scores stand or fall together: no threshold can part them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from torch_grood._optional import require
from torch_grood.errors import GroodError

__all__ = [
    "FIGURES",
    "DetectionMetrics",
    "OpenOODMetrics",
    "Scores",
    "aupr_id",
    "aupr_ood",
    "auroc",
    "classifier_accuracy",
    "clopper_pearson",
    "detection_metrics",
    "id_flagged_at_ood_caught",
    "ood_accepted_at_id_kept",
    "openood_metrics",
    "prototype_accuracy",
]

Scores = Tensor | ArrayLike

FIGURES = ("auroc", "ood_accepted_at_95_id_kept", "id_flagged_at_95_ood_caught", "aupr_ood", "aupr_id")
"""The figures of `DetectionMetrics`, by name."""

_BLOCK_ROWS = 4096  # bounds the matrix of distances to the prototypes


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


def classifier_accuracy(logits: Tensor, labels: Tensor | None) -> float:
    """Share of samples whose largest logit is their label's; the first of equal logits counts.

    Args:
        logits: (n, C).
        labels: whole numbers (n,), 0 to C − 1.

    Raises:
        GroodError: if there are no samples or labels, shapes do not fit, a logit is NaN, or a label is no class.
    """
    labels = _checked_labels(logits, labels, classes=logits.shape[-1] if logits.ndim else 0, name="logits")
    _refuse(logits.isnan(), "logits", "NaN")
    return int((logits.argmax(1) == labels.to(logits.device)).sum()) / len(labels)


def prototype_accuracy(features: Tensor, prototypes: Tensor, labels: Tensor | None) -> float:
    """Share of samples whose nearest class prototype is their label's, in float64; the first of equally near counts.

    Args:
        features: (n, d), penultimate.
        prototypes: (C, d), in the order of the labels.
        labels: whole numbers (n,), 0 to C − 1.

    Raises:
        GroodError: if there are no samples or labels, shapes do not fit, a number is not finite, or a label no class.
    """
    if features.ndim != 2 or prototypes.ndim != 2 or features.shape[1] != prototypes.shape[1]:
        raise GroodError(
            f"expected features (n, d) and prototypes (C, d), got {tuple(features.shape)} and {tuple(prototypes.shape)}"
        )
    labels = _checked_labels(features, labels, classes=len(prototypes), name="features").to(features.device)
    _refuse(~features.isfinite(), "features", "not finite")
    points = prototypes.detach().to(features.device, torch.float64)
    # ‖h − p‖² = ‖h‖² − 2 h·p + ‖p‖²; from the centre of the prototypes little of it cancels.
    origin = points.mean(0)
    points = points - origin
    squares = points.square().sum(1)
    if not bool(squares.isfinite().all()):
        raise GroodError("a class prototype is not finite; check the features that it comes from")
    hits = 0
    for first in range(0, len(features), _BLOCK_ROWS):
        block = slice(first, first + _BLOCK_ROWS)
        h = features[block].detach().to(torch.float64) - origin
        hits += int(((squares - 2 * (h @ points.T)).argmin(1) == labels[block]).sum())
    return hits / len(labels)


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


def _both(id_scores: Scores, ood_scores: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return _as_scores(id_scores, "ID"), _as_scores(ood_scores, "OOD")


def _as_scores(scores: Scores, name: str) -> NDArray[np.float64]:
    raw: NDArray[Any]
    if isinstance(scores, Tensor):
        # bfloat16 has no numpy counterpart; complex would lose its imaginary part with a mere warning.
        raw = (scores if scores.is_complex() else scores.to(torch.float64)).detach().cpu().numpy()
    else:
        raw = np.asarray(scores)
    if raw.ndim != 1:
        raise GroodError(f"{name} scores must be 1-D, one number a sample; got shape {raw.shape}. Flatten them first.")
    if raw.size == 0:
        raise GroodError(
            f"there are no {name} scores; at least one is needed. Check the {name} data set's path or list."
        )
    if raw.dtype.kind not in "fiub":
        raise GroodError(f"{name} scores must be real numbers, got dtype {raw.dtype}; convert them to float first")
    array = raw.astype(np.float64)
    missing = np.flatnonzero(np.isnan(array))
    if missing.size:
        raise GroodError(
            f"{missing.size} of {array.size} {name} scores are NaN, the first at index {missing[0]}; NaN has no place "
            f"in an order. Mend the input or the detector, or drop these samples and report how many."
        )
    return array


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


def _checked_labels(samples: Tensor, labels: Tensor | None, *, classes: int, name: str) -> Tensor:
    if labels is None:
        raise GroodError("there are no labels, so there is no accuracy; pass the labels of ID samples")
    if samples.ndim != 2 or labels.shape != (len(samples),):
        raise GroodError(
            f"expected {name} with one row and one label a sample, got {name} {tuple(samples.shape)} and labels "
            f"{tuple(labels.shape)}"
        )
    if len(labels) == 0:
        raise GroodError("there are no samples, so there is no accuracy; pass at least one ID sample")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise GroodError(f"labels must be whole numbers, got {labels.dtype}; convert them to int64")
    strange = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(strange):
        row = int(strange[0])
        raise GroodError(
            f"{len(strange)} of {len(labels)} labels are none of the {classes} classes, the first at sample {row}: "
            f"{int(labels[row])}; pass ID samples, labelled 0 to {classes - 1}"
        )
    return labels


def _refuse(bad: Tensor, name: str, fault: str) -> None:
    rows = bad.any(1).nonzero().flatten()
    if len(rows):
        raise GroodError(
            f"the {name} of {len(rows)} of {len(bad)} samples are {fault}, the first at sample {int(rows[0])}; check "
            "the images and the network"
        )


def _count_for(level: float, n: int) -> int:
    """Smallest k with k / n ≥ level."""
    if not 0 < level <= 1:
        raise GroodError(f"level must be a share in (0, 1], such as 0.95; got {level}")
    # Division is correctly rounded, so 19 / 20 equals the literal 0.95; ceil(level · n) can be one too high.
    return int(np.searchsorted(np.arange(1, n + 1) / n, level)) + 1
