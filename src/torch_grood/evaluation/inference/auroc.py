"""How sure an AUROC is, by DeLong et al. (1988) with midranks (Sun & Xu 2014); and the AUROC of shuffled scores.

Of one ID set (n) and the OOD sets s = 1 … S (m_s each), let V_i be the share of OOD above ID sample i, averaged over
the sets, and W_sj the share of ID below sample j of set s, ties counting one half. Then

    AUROC = mean_s mean_j W_sj        variance = Var(V) / n + Σ_s Var(W_s) / (m_s S²)

For the difference of two methods, V and W are the differences of theirs, sample by sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from torch_grood.errors import GroodError
from torch_grood.evaluation.inference.estimates import EstimateWithTest, checked_confidence, sample_variance
from torch_grood.evaluation.inference.samples import Group, Placements, ScoreSets, names_of, paired_names
from torch_grood.evaluation.metrics import Scores, _as_scores, auroc

__all__ = ["ShuffledAuroc", "delong", "delong_difference", "shuffled_auroc"]


def delong(scores: ScoreSets, group: Group = None, *, confidence: float = 0.95) -> EstimateWithTest:
    """AUROC of one set, or its mean over a group of sets, with DeLong's standard error; tested against 0.5.

    The interval is normal on the logit scale: it stays within [0, 1], and covers better near 1, where far-OOD sets lie
    (a true 0.983 from 50 ID and 50 OOD samples in 93.4 % of 3,000 simulations, without the scale in 85 %).
    If the samples show no spread at all (complete separation), the standard error is 0, and normal theory would be
    sure of what it cannot know. Interval and p-value are then bounds that hold for the min(n, m_s) independent pairs
    that the samples make; constant scores alone have an interval of one point.

    Args:
        scores: at least two samples in every set.
        group: a set's name, or the names whose mean is taken; None: all.
        confidence: coverage of the interval, in (0, 1).

    Raises:
        GroodError: if a set is unknown or too small, or `confidence` is out of range.
    """
    names = names_of(scores.sizes, group)
    pairs = _pairs(scores, names)
    theta, error = _mean_auroc([scores.placements(name) for name in names])
    if error == 0:
        return _without_spread(theta, pairs, confidence, low=0.0)
    logit, width = math.log(theta / (1 - theta)), _quantile(confidence) * error / (theta * (1 - theta))
    z = (theta - 0.5) / error
    return EstimateWithTest(theta, error, _expit(logit - width), _expit(logit + width), z, _two_sided(z))


def delong_difference(
    first: ScoreSets, second: ScoreSets, group: Group = None, *, confidence: float = 0.95
) -> EstimateWithTest:
    """AUROC of the first method less that of the second on the same samples, tested against 0.

    Args:
        first: at least two samples in every set.
        second: the other method's scores of the same samples, in the same order.
        group: a set's name, or the names whose mean is taken; None: all, which both must have.
        confidence: coverage of the interval, which is normal and cut at ±1.

    Raises:
        GroodError: if the sets of the two differ, or as `delong`.
    """
    names = paired_names(group, first.id_scores.size, first.sizes, second.id_scores.size, second.sizes)
    pairs = _pairs(first, names)
    difference, error = _mean_auroc([first.placements(name) - second.placements(name) for name in names])
    if error == 0:
        return _without_spread(difference, pairs, confidence, low=-1.0)
    width, z = _quantile(confidence) * error, difference / error
    return EstimateWithTest(
        difference, error, max(-1.0, difference - width), min(1.0, difference + width), z, _two_sided(z)
    )


class ShuffledAuroc(NamedTuple):
    """AUROC of scores whose sets were shuffled: a gate that scores which know their set cannot pass.

    Attributes:
        auroc: after shuffling.
        standard_error: its exact standard deviation over all shuffles, ties included.
        z: (auroc − 0.5) / standard_error; 0 where all scores are equal.
    """

    auroc: float
    standard_error: float
    z: float


def shuffled_auroc(id_scores: Scores, ood_scores: Scores, *, seed: int = 0) -> ShuffledAuroc:
    """A sanity gate: shuffle which scores are ID and which OOD, and see that nothing is left to tell.

    The AUROC must lie around 0.5; |z| above 4 has a chance of 1 in 16,000.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: (m,) likewise.
        seed: a whole number from 0.

    Raises:
        GroodError: if a set is empty, not 1-D, not real numbers, or holds NaN; if `seed` is negative.
    """
    if seed < 0:
        raise GroodError(f"a seed is a whole number from 0, got {seed}")
    id_array, ood_array = _as_scores(id_scores, "ID"), _as_scores(ood_scores, "OOD")
    shuffled = np.random.default_rng(seed).permutation(np.concatenate([id_array, ood_array]))
    value = auroc(shuffled[: id_array.size], shuffled[id_array.size :])
    n, m, total = id_array.size, ood_array.size, shuffled.size
    _, ties = np.unique(shuffled, return_counts=True)
    # In Python's integers: the cube of a large group of ties exceeds 64 bits.
    tied = sum(int(t) ** 3 - int(t) for t in ties[ties > 1])
    error = math.sqrt((total**3 - total - tied) / (12 * n * m * total * (total - 1)))
    return ShuffledAuroc(value, error, (value - 0.5) / error if error else 0.0)


def _mean_auroc(placements: Sequence[Placements]) -> tuple[float, float]:
    """Mean AUROC over sets, and DeLong's standard error; of a difference, if the placements are one."""
    count = len(placements)
    above = np.sum([of_set.above for of_set in placements], axis=0)
    variance = sample_variance(above) / above.size + sum(
        sample_variance(of_set.below) / of_set.below.size for of_set in placements
    )
    return math.fsum(of_set.auroc for of_set in placements) / count, math.sqrt(variance) / count


def _without_spread(value: float, pairs: int, confidence: float, *, low: float) -> EstimateWithTest:
    """Bounds for the mean of a variable on [low, 1] of which all of so many independent observations are `value`.

    A variable on [a, b] with mean μ ≤ x is x with probability at most (μ − a) / (x − a): each end of the interval is
    where that, to the power of the pairs, falls to half of what may be missed. The test's hypothesis is the centre.
    """
    missed = ((1 - checked_confidence(confidence)) / 2) ** (1 / pairs)
    away = (value - 0.5) * 2 if low == 0 else value
    if away == 0:  # constant scores, or two methods that order all samples alike
        return EstimateWithTest(value, 0.0, value, value, 0.0, 1.0)
    p = min(1.0, 2 * (1 + abs(away)) ** -pairs)
    ends = low + (value - low) * missed, 1 - (1 - value) * missed
    return EstimateWithTest(value, 0.0, *ends, math.copysign(math.inf, away), p)


def _pairs(scores: ScoreSets, names: Sequence[str]) -> int:
    """How many pairs (or tuples: one sample of every set) can be made that share no sample."""
    sizes = {"ID": scores.id_scores.size, **{f"OOD ({name})": scores.sizes[name] for name in names}}
    for name, size in sizes.items():
        if size < 2:
            raise GroodError(f"there is one {name} score; a standard error needs at least two")
    return min(sizes.values())


def _quantile(confidence: float) -> float:
    return -NormalDist().inv_cdf((1 - checked_confidence(confidence)) / 2)


def _two_sided(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x))
