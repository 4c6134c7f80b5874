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

from torch_grood.evaluation.metrics._curves import _count_for as _count_for
from torch_grood.evaluation.metrics._scores import Scores
from torch_grood.evaluation.metrics._scores import _as_scores as _as_scores
from torch_grood.evaluation.metrics.accuracy import classifier_accuracy, prototype_accuracy
from torch_grood.evaluation.metrics.detection import (
    FIGURES,
    DetectionMetrics,
    aupr_id,
    aupr_ood,
    auroc,
    detection_metrics,
    id_flagged_at_ood_caught,
    ood_accepted_at_id_kept,
)
from torch_grood.evaluation.metrics.intervals import clopper_pearson
from torch_grood.evaluation.metrics.openood import OpenOODMetrics, openood_metrics

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
