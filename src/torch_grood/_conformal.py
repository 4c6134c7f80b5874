"""The arithmetic of conformal p-values and rates, in numpy: it needs no torch, nor knows any score.

See `torch_grood.threshold` for what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "beta_interval",
    "checked_rate",
    "exceedance_p_value",
    "flagged",
    "flagged_law",
    "least_rejections",
    "promised",
    "rank_of",
]

_NAMED = 5  # groups that an error names; the rest is counted
_ROUNDING = 1 + 2**-50  # p = 1/1000 and fdr·k/N = 0.1·1/100 are equal, whichever way the quotients were rounded


def flagged(p_values: NDArray[np.float64], fdr: float) -> NDArray[np.bool_]:
    """The rule of `torch_grood.benjamini_hochberg` for p-values (N,), with its errors."""
    fdr = checked_rate(fdr, "fdr is the share of the flagged samples that may be ID")
    if not ((p_values >= 0) & (p_values <= 1)).all():
        raise GroodError("p-values must be between 0 and 1, and not NaN; pass those of predict, not scores")
    ordered, counts = np.sort(p_values), np.arange(1, len(p_values) + 1)
    passed = ordered[ordered <= counts * (fdr * _ROUNDING / max(len(p_values), 1))]
    found: NDArray[np.bool_] = p_values <= (passed[-1] if len(passed) else -1.0)
    return found


def least_rejections(n_calibration: int, n_tested: int, fdr: float) -> int:
    """The fewest samples that `torch_grood.benjamini_hochberg` can flag if it flags any.

    k samples are flagged if p_(k) ≤ fdr·k/N, and no p-value is below 1/(n + 1). More than `n_tested`: nothing can be
    flagged, whatever the scores; a larger calibration set mends it.

    Raises:
        GroodError: for no calibration sample, a negative `n_tested`, or an fdr that is not in (0, 1).
    """
    fdr = checked_rate(fdr, "fdr is the share of the flagged samples that may be ID")
    if n_calibration < 1 or n_tested < 0:
        raise GroodError(f"expected n_calibration ≥ 1 and n_tested ≥ 0, got {n_calibration} and {n_tested}")
    if n_tested == 0:
        return 0
    smallest, slope = 1 / (n_calibration + 1), fdr * _ROUNDING / n_tested
    guess = math.ceil(smallest / slope)
    return next(k for k in (guess - 1, guess, guess + 1) if smallest <= slope * k)


def promised(fpr: float, sizes: Mapping[int, int], *, grouped: bool, describe: Callable[[int], str] = str) -> float:
    """The rate, if it can be promised.

    Args:
        fpr: false-alarm rate.
        sizes: number of held-out samples of each group.
        grouped: each group has its own threshold; else there is one group.
        describe: names a group in an error.

    Raises:
        GroodError: if it is not in (0, 1), or below 1/(n + 1) for the n of a group.
    """
    fpr = checked_rate(fpr, "fpr is the share of ID samples that may be flagged")
    short = {group: n for group, n in sizes.items() if rank_of(fpr, n) < 1}
    if short and not grouped:
        n = next(iter(short.values()))
        raise GroodError(
            f"a false-alarm rate of {fpr:g} cannot be promised from {n} calibration samples: the smallest possible is "
            f"1/(n + 1) = {1 / (n + 1):.4g}. Pass at least {_needed(fpr)} samples, or a larger fpr."
        )
    if short:
        named = [f"{describe(group)} ({n})" for group, n in list(short.items())[:_NAMED]]
        more = f" and {len(short) - _NAMED} more" if len(short) > _NAMED else ""
        raise GroodError(
            f"a false-alarm rate of {fpr:g} needs at least {_needed(fpr)} calibration samples for each class; too few: "
            f"{', '.join(named)}{more}. Pass more of them, a larger fpr, or use one threshold for all classes."
        )
    return fpr


def rank_of(fpr: float, n: int) -> int:
    """m: how many of the p-values 1/(n + 1), 2/(n + 1), … are at most fpr, as floating-point numbers."""
    rank = math.floor(fpr * (n + 1))
    # The product may round to either side of a whole number.
    return next(m for m in (rank + 1, rank, rank - 1) if m / (n + 1) <= fpr)


def _needed(fpr: float) -> int:
    """The least n with 1/(n + 1) ≤ fpr; where that is beyond any data set, such a number."""
    fpr = max(fpr, 1e-15)
    guess = max(math.floor(1 / fpr) - 2, 1)
    return next(n for n in range(guess, guess + 5) if 1 / (n + 1) <= fpr)


def beta_interval(rank: int, n: int, confidence: float) -> tuple[float, float]:
    """The quantiles (1 ∓ confidence)/2 of Beta(m, n + 1 - m), by bisection.

    V of this law has P(V ≤ v) = P(K ≥ m) with K binomial (n, v). Near m, the probability of m + j is proportional to
    exp(c_j + j·logit v); the odds of K ≥ m are a quotient of two sums of such terms, and rise with v wherever the sums
    are cut. They are cut 40 standard deviations from m. Within 1e-12 of the true quantile for n up to a million.
    """
    reach = 20 * math.isqrt(n) + 40  # the deviation of K is at most √n / 2
    low, high = max(rank - reach, 0), min(rank + reach, n)
    centre = math.log(rank / (n + 1 - rank))  # about logit v, which keeps c_j small where it matters
    below = np.arange(low, high, dtype=np.float64)
    c = np.concatenate([[0.0], np.cumsum(np.log((n - below) / (below + 1)) + centre)])
    c -= c[rank - low]
    j = np.arange(low - rank, high - rank + 1, dtype=np.float64)

    def quantile(odds: float) -> float:
        left, right = 0.0, 1.0
        for _ in range(52):
            v = (left + right) / 2
            exponent = c + j * (math.log(v) - math.log1p(-v) - centre)
            terms = np.exp(exponent - exponent.max())
            if terms[rank - low :].sum() < odds * terms[: rank - low].sum():
                left = v
            else:
                right = v
        return (left + right) / 2

    odds = (1 - confidence) / (1 + confidence)
    return quantile(odds), quantile(1 / odds)


def exceedance_p_value(rate: float, sizes: Mapping[int, int], counts: Mapping[int, int], flagged: int) -> float:
    """P(K ≥ flagged) of new ID samples that are exchangeable with the held-out ones, on average over calibrations.

    The false-alarm rate that a calibration has fixed is Beta(m, n + 1 - m) (see `torch_grood.threshold`), so that the
    number of flagged ones among W is beta-binomial; with groups, a sum of independent ones. Ties only make it smaller.

    Args:
        rate: α.
        sizes: n of each group.
        counts: W of each group; a group without a calibration flags nothing.
        flagged: k, of all groups together.
    """
    total = np.ones(1)
    for group, count in counts.items():
        if group in sizes:
            total = np.convolve(total, flagged_law(count, rank_of(rate, sizes[group]), sizes[group]))
    return float(min(1.0, total[flagged:].sum()))


def flagged_law(images: int, rank: int, n: int) -> NDArray[np.float64]:
    """P(K = 0), …, P(K = images) of the law above, with m = rank, from the quotient of each to the one before."""
    rest = n + 1 - rank
    j = np.arange(images, dtype=np.float64)
    steps = np.log((images - j) * (rank + j)) - np.log((j + 1) * (rest + images - j - 1))
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    found: NDArray[np.float64] = np.exp(logs - logs.max())
    found /= found.sum()
    return found


def checked_rate(value: float, meaning: str) -> float:
    """A number in (0, 1).

    Raises:
        GroodError: for any other, with its meaning.
    """
    if not (isinstance(value, Real) and 0 < value < 1):
        raise GroodError(f"{meaning}, between 0 and 1; got {value!r}")
    return float(value)
