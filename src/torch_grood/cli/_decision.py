"""How the user wants images to be decided about, and what there is to say of the outcome."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from torch_grood import GROOD, NotFittedError
from torch_grood.errors import GroodError
from torch_grood.threshold import least_rejections

if TYPE_CHECKING:
    from torch_grood.cli._common import Reporter
    from torch_grood.cli._results import Results

__all__ = ["Decision", "check_decision", "report_decision"]


@dataclass(frozen=True)
class Decision:
    """The user's way to decide, one of three, or by τ of the calibration."""

    fpr: float | None = None
    tau: float | None = None
    fdr: float | None = None

    def __post_init__(self) -> None:
        given = [f"--{name}" for name, value in asdict(self).items() if value is not None]
        if len(given) > 1:
            raise GroodError(f"{' and '.join(given)} are different ways to decide; give one of them")


def check_decision(detector: GROOD, decision: Decision) -> None:
    """Fail before the pass, not after it.

    Raises:
        GroodError: for a number out of range, or one that the calibration cannot promise.
        NotFittedError: without a calibration that it needs.
    """
    if detector.threshold_ is None and decision.tau is None:
        if decision != Decision():
            raise NotFittedError(
                f"this detector is not calibrated, which {'--fpr' if decision.fdr is None else '--fdr'} needs; run "
                "grood calibrate, or give a threshold of your own: --tau"
            )
        return
    detector.predict_features(torch.empty(0, detector.fit_info_.n_features), **asdict(decision))


def report_decision(results: Results, decision: Decision, reporter: Reporter) -> None:
    """What the numbers do not say by themselves."""
    threshold = results.detector.threshold_
    if results.is_ood is None:
        reporter.warn(
            "this detector is not calibrated: there are scores and classes, but no p-values and decisions; run grood "
            "calibrate, or give a threshold of your own: --tau"
        )
    if decision.fdr is None or results.is_ood is None or threshold is None:
        return
    n, flagged = len(results), int(results.is_ood.sum())
    reporter.say(f"{flagged:,} of {n:,} images are flagged at a false discovery rate of {decision.fdr:g}")
    if flagged:
        return
    held_out = threshold.n if threshold.groups is None else int(threshold.groups.bincount().max())
    needed, least = least_rejections(held_out, n, decision.fdr), 1 / (held_out + 1)
    assert results.p_value is not None
    most_extreme = float(results.p_value.min())
    if needed > n:
        reporter.warn(
            f"nothing can be flagged at --fdr {decision.fdr:g}, whatever the images: no p-value from {held_out:,} "
            f"calibration images is below {least:.2g}. Calibrate on more images, at least {1 / decision.fdr:.0f}, or "
            "choose a larger --fdr"
        )
    elif most_extreme <= least and needed > 1:
        reporter.warn(
            f"{int((results.p_value <= least).sum()):,} of the images have the smallest p-value that {held_out:,} "
            f"calibration images can give, {least:.2g}, but among {n:,} images fewer than {needed:,} are never "
            f"flagged at --fdr {decision.fdr:g}. Calibrate on more images, choose a larger --fdr, or decide about each "
            "image by itself: --fpr"
        )
    else:
        reporter.say(
            f"the smallest p-value is {most_extreme:.2g}, which is not small enough among {n:,} images; a larger "
            "--fdr, or --fpr for each image by itself, flags more"
        )
