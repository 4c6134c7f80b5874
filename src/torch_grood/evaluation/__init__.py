"""How well a detector tells OOD from ID: metrics, and the baselines to hold it against (extra ``bench``)."""

from __future__ import annotations

from torch_grood.evaluation.baselines import BASELINES, baseline_scores, fit_baseline
from torch_grood.evaluation.metrics import (
    DetectionMetrics,
    aupr_id,
    aupr_ood,
    auroc,
    clopper_pearson,
    detection_metrics,
    id_flagged_at_ood_caught,
    ood_accepted_at_id_kept,
)

__all__ = [
    "BASELINES",
    "DetectionMetrics",
    "aupr_id",
    "aupr_ood",
    "auroc",
    "baseline_scores",
    "clopper_pearson",
    "detection_metrics",
    "fit_baseline",
    "id_flagged_at_ood_caught",
    "ood_accepted_at_id_kept",
]
