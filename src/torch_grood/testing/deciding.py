"""Laws of decisions: what `predict` says follows from the scores, and the promise of `calibrate` is kept."""

from __future__ import annotations

import math
import unittest

import torch
from torch import Tensor

from torch_grood.testing.clause import clause, require, require_same
from torch_grood.testing.uses import FPR, Use

# A promise that holds with equality is called broken once in 30,000 such suites, were their draws not fixed.
_SIGMAS = 4.0
# With 19 held-out samples the promise of 0.05 can be kept with equality, and a rank that is one off doubles the rate.
_RATE, _DRAWS, _HELD_OUT, _TESTED = 0.05, 100, 19, 40


@clause("calibrate", "predict")
def decisions_follow_scores(use: Use) -> None:
    """`predict` decides by the scores of `score`: is_ood is bool (n,), no flagged sample scores lower than one that
    passes, and one that scores above the whole calibration set is flagged.

    A score that is shown beside a decision must explain it.
    """
    detector = use.ready()
    scores, found = use.score(detector, use.queries), use.predict(detector, use.queries)
    is_ood = found["is_ood"]
    require(
        is_ood.dtype == torch.bool and is_ood.shape == scores.shape and is_ood.device.type == "cpu",
        f"is_ood is {is_ood.dtype} {tuple(is_ood.shape)} on {is_ood.device}; bool {tuple(scores.shape)} on the CPU is "
        "required",
    )
    if "score" in found:
        require_same({"predict's score": found["score"]}, {"predict's score": scores}, "from that of `score`")
    _require_ordered(scores, is_ood)
    missed = (scores > use.score(detector, use.held_out.inputs).max()) & ~is_ood
    require(not bool(missed.any()), f"{int(missed.sum())} samples score above all the calibration set and pass")


def _require_ordered(scores: Tensor, is_ood: Tensor) -> None:
    if bool(is_ood.any()) and not bool(is_ood.all()):
        lowest, highest = float(scores[is_ood].min()), float(scores[~is_ood].max())
        require(lowest >= highest, f"a sample with score {lowest:.6g} is flagged, and one with {highest:.6g} passes")


@clause("calibrate", "predict")
def p_values_agree(use: Use) -> None:
    """Where a prediction has p-values, they lie in (0, 1], fall as scores rise, and p ≤ fpr is the decision.

    Whoever decides by p and whoever decides by is_ood must decide alike.
    """
    detector = use.ready()
    scores, found = use.score(detector, use.queries), use.predict(detector, use.queries)
    if "p_value" not in found:
        raise unittest.SkipTest("its predictions have no p_value")
    p = found["p_value"]
    require(p.dtype == torch.float64 and p.shape == scores.shape, f"p_value is {p.dtype} {tuple(p.shape)}")
    require(bool(((p > 0) & (p <= 1)).all()), f"p-values range from {p.min():.4g} to {p.max():.4g}")
    by_score = p[scores.argsort()]
    rise = float(by_score.diff().max())
    require(rise <= 0, f"a sample with a higher score has a larger p-value, by {rise:.4g}")
    differing = int(((p <= FPR) != found["is_ood"]).sum())
    require(differing == 0, f"is_ood differs from p ≤ {FPR} for {differing} of {len(p)} samples")


@clause("calibrate", "predict")
def promised_rate_is_kept(use: Use) -> None:
    """At most `fpr` of known samples are flagged, on average over calibration sets: fpr=0.05 with 19 held-out samples.

    This is the promise of `calibrate`. The quantile of 19 scores breaks it (it flags 0.095): the new sample is one of
    twenty, whose rank is uniform. The average is over 100 sets with 40 new samples each, within 4 standard errors.
    """
    detector = use.fitted()
    n = _HELD_OUT + _TESTED
    drawn = use.draw(_DRAWS * n, seed=6)
    rates = []
    for start in range(0, _DRAWS * n, n):
        held_out = type(drawn)(*(part[start : start + _HELD_OUT] for part in drawn))
        use.calibrate(detector, held_out, fpr=_RATE)
        flagged = use.predict(detector, drawn.inputs[start + _HELD_OUT : start + n])["is_ood"]
        rates.append(flagged.double().mean())
    observed = torch.stack(rates)
    mean, error = float(observed.mean()), float(observed.std()) / math.sqrt(_DRAWS)
    require(
        mean <= _RATE + _SIGMAS * error,
        f"fpr={_RATE} was asked for, and {mean:.3f} ± {error:.3f} of known samples were flagged in {_DRAWS} draws",
    )
