"""Threshold-free figures of an OOD detector: OOD is the positive class, a higher score means more OOD.

    AUROC = P(S_ood > S_id) + ½ P(S_ood = S_id)

Two different figures go by the name "FPR@95" in the literature. Here neither does; each is called what it is:

- `ood_accepted_at_id_kept`: the share of OOD that is accepted when the threshold keeps at least 95 % of ID.
  What most papers print.
- `id_flagged_at_ood_caught`: the share of ID that is flagged when the threshold catches at least 95 % of OOD.
  What OpenOOD prints.

All figures depend on the order of the scores only, so scores are replaced by their ranks before scikit-learn sees
them. Infinite scores are therefore legal (−∞ is the most ID, +∞ the most OOD), scores that differ in the last bit or
lie at 1e-300 stay apart, and any strictly increasing map of the scores changes nothing. Equal scores stand or fall
together: no threshold can part them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from torch_grood._optional import require
from torch_grood.errors import GroodError

__all__ = [
    "DetectionMetrics",
    "aupr_id",
    "aupr_ood",
    "auroc",
    "clopper_pearson",
    "detection_metrics",
    "id_flagged_at_ood_caught",
    "ood_accepted_at_id_kept",
]

Scores = Tensor | ArrayLike


@dataclass(frozen=True)
class DetectionMetrics:
    """One detector on one pair of ID and OOD sets; every figure but the counts lies in [0, 1].

    Attributes:
        auroc: area under the ROC curve, 0.5 for scores that tell nothing.
        ood_accepted_at_95_id_kept: share of OOD accepted when at least 95 % of ID is kept ("FPR@95" in most papers).
        id_flagged_at_95_ood_caught: share of ID flagged when at least 95 % of OOD is caught ("FPR@95" in OpenOOD).
        aupr_ood: average precision with OOD as the positive class.
        aupr_id: average precision with ID as the positive class.
        n_id: number of ID scores; n_ood: number of OOD scores. The two AUPR depend on their ratio.
    """

    auroc: float
    ood_accepted_at_95_id_kept: float
    id_flagged_at_95_ood_caught: float
    aupr_ood: float
    aupr_id: float
    n_id: int
    n_ood: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the figures as a plain dictionary, ready for JSON."""
        return dataclasses.asdict(self)


def auroc(id_scores: Scores, ood_scores: Scores) -> float:
    """Area under the ROC curve: the chance that an OOD sample scores above an ID sample, ties counting one half.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: (m,) likewise.

    Raises:
        GroodError: if a set is empty, not 1-D, not real numbers, or holds NaN.
    """
    ranks, is_ood = _ranked(*_both(id_scores, ood_scores))
    return float(require("sklearn.metrics", extra="bench").roc_auc_score(is_ood, ranks))


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
    id_array, ood_array = _both(id_scores, ood_scores)
    threshold = np.sort(id_array)[_count_for(level, id_array.size) - 1]
    return float(np.mean(ood_array <= threshold))


def id_flagged_at_ood_caught(id_scores: Scores, ood_scores: Scores, level: float = 0.95) -> float:
    """Share of ID that is flagged when at least `level` of OOD is caught ("FPR@95" in OpenOOD).

    The threshold is the highest OOD score at or above which `level` of the OOD scores lie; a sample is flagged if its
    score reaches it. Lower is better.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: (m,) likewise.
        level: share of OOD to catch, in (0, 1].

    Raises:
        GroodError: as `auroc`, or if `level` is outside (0, 1].
    """
    id_array, ood_array = _both(id_scores, ood_scores)
    threshold = np.sort(ood_array)[ood_array.size - _count_for(level, ood_array.size)]
    return float(np.mean(id_array >= threshold))


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
    ranks, is_ood = _ranked(*_both(id_scores, ood_scores))
    return float(require("sklearn.metrics", extra="bench").average_precision_score(is_ood, ranks))


def aupr_id(id_scores: Scores, ood_scores: Scores) -> float:
    """Average precision with ID as the positive class; n / (n + m) for scores that tell nothing.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: (m,) likewise.

    Raises:
        GroodError: as `auroc`.
    """
    ranks, is_ood = _ranked(*_both(id_scores, ood_scores))
    return float(require("sklearn.metrics", extra="bench").average_precision_score(~is_ood, -ranks))


def detection_metrics(id_scores: Scores, ood_scores: Scores) -> DetectionMetrics:
    """Every figure of this module, for one detector on one pair of sets.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: (m,) likewise.

    Raises:
        GroodError: as `auroc`.
    """
    id_array, ood_array = _both(id_scores, ood_scores)
    return DetectionMetrics(
        auroc=auroc(id_array, ood_array),
        ood_accepted_at_95_id_kept=ood_accepted_at_id_kept(id_array, ood_array),
        id_flagged_at_95_ood_caught=id_flagged_at_ood_caught(id_array, ood_array),
        aupr_ood=aupr_ood(id_array, ood_array),
        aupr_id=aupr_id(id_array, ood_array),
        n_id=id_array.size,
        n_ood=ood_array.size,
    )


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


def _ranked(
    id_array: NDArray[np.float64], ood_array: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Dense ranks of all scores, equal scores sharing one, and which of them are OOD."""
    _, ranks = np.unique(np.concatenate([id_array, ood_array]), return_inverse=True)
    is_ood = np.arange(ranks.size) >= id_array.size
    return ranks.astype(np.int64), is_ood


def _count_for(level: float, n: int) -> int:
    """Smallest k with k / n ≥ level."""
    if not 0 < level <= 1:
        raise GroodError(f"level must be a share in (0, 1], such as 0.95; got {level}")
    # Division is correctly rounded, so 19 / 20 equals the literal 0.95; ceil(level · n) can be one too high.
    return int(np.searchsorted(np.arange(1, n + 1) / n, level)) + 1
