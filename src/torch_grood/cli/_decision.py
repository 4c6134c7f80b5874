"""How the user wants images to be decided about, and what there is to say of the outcome."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch_grood._conformal import least_rejections
from torch_grood.errors import GroodError, NotFittedError

if TYPE_CHECKING:
    from torch_grood import GROOD
    from torch_grood.cli._common import Reporter
    from torch_grood.cli._results import Results

__all__ = ["Decision", "check_decision", "need_calibration", "report_decision"]


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
    need_calibration(decision, detector.threshold_ is not None)
    if detector.threshold_ is not None or decision.tau is not None:
        import torch

        detector.predict_features(torch.empty(0, detector.fit_info_.n_features), **asdict(decision))


def need_calibration(decision: Decision, is_calibrated: bool) -> None:
    """Fail if a decision is wanted that rests on a calibration, and there is none.

    Raises:
        NotFittedError: then.
    """
    if not is_calibrated and (decision.fpr is not None or decision.fdr is not None):
        raise NotFittedError(
            f"this detector is not calibrated, which {'--fpr' if decision.fdr is None else '--fdr'} needs; run "
            "grood calibrate, or give a threshold of your own: --tau"
        )


def report_decision(results: Results, decision: Decision, reporter: Reporter) -> None:
    """What the numbers do not say by themselves."""
    if results.is_ood is None:
        reporter.warn(
            "this detector is not calibrated: there are scores and classes, but no p-values and decisions; run grood "
            "calibrate, or give a threshold of your own: --tau"
        )
    held_out = results.n_held_out
    if decision.fdr is None or results.is_ood is None or held_out is None:
        return
    n, flagged = len(results), int(results.is_ood.sum())
    reporter.say(f"{flagged:,} of {n:,} images are flagged at a false discovery rate of {decision.fdr:g}")
    if flagged:
        return
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
