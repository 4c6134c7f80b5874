"""The bootstrap: figures of samples drawn anew.

ID samples and each OOD set's are drawn with replacement, separately; that serves every figure, also those that have no
simple variance. Draws depend on the seed, the set's name and its size alone: they are the same for all methods, and a
set's interval does not depend on which other sets there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torch_grood.errors import GroodError
from torch_grood.evaluation.inference.estimates import Estimate, EstimateWithTest, checked_confidence, sample_variance
from torch_grood.evaluation.inference.samples import Counts, Floats, Group, Ordering, ScoreSets, names_of, paired_names
from torch_grood.evaluation.metrics import FIGURES, DetectionMetrics, detection_metrics

__all__ = ["Bootstrap", "bootstrap", "paired_bootstrap", "resampling_counts"]


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """One method's figures, and what becomes of them when the samples are drawn anew; make it with `bootstrap`.

    Attributes:
        seed: of the draws.
        n_id: number of ID samples.
        sizes: number of OOD samples by set.
        observed: the figures on the samples as they are, by set.
        replicates: float64 (draws, 5) by set, one column for each of `FIGURES`.
    """

    seed: int
    n_id: int
    sizes: dict[str, int]
    observed: dict[str, DetectionMetrics]
    replicates: dict[str, Floats]

    @property
    def draws(self) -> int:
        """Number of draws."""
        return len(next(iter(self.replicates.values())))

    def estimate(self, figure: str, group: Group = None, *, confidence: float = 0.95) -> Estimate:
        """A figure of one set, or its mean over a group of sets, with its percentile interval.

        The interval is a point where no draw can differ, such as at complete separation; `delong` has an answer there.

        Args:
            figure: one of `FIGURES`.
            group: a set's name, or the names whose mean is taken; None: all.
            confidence: coverage of the interval, in (0, 1).

        Raises:
            GroodError: if figure or set is unknown, or the draws are too few for such an interval.
        """
        value, drawn = self._figure(figure, group)
        return Estimate(value, math.sqrt(sample_variance(drawn)), *_percentiles(drawn, confidence))

    def _figure(self, figure: str, group: Group) -> tuple[float, Floats]:
        if figure not in FIGURES:
            raise GroodError(f"there is no figure {figure!r}; there are: {', '.join(FIGURES)}")
        names = names_of(self.sizes, group)
        value = math.fsum(getattr(self.observed[name], figure) for name in names) / len(names)
        columns = [self.replicates[name][:, FIGURES.index(figure)] for name in names]
        return value, np.mean(columns, axis=0)


def bootstrap(scores: ScoreSets, draws: int = 1000, *, seed: int = 0) -> Bootstrap:
    """Draw ID and OOD samples anew, and compute every figure of every set each time.

    Scores are sorted once; a draw is a count for each sample. The same seed gives the same bytes, and the same
    draws for all methods with sets of these names and sizes.

    Args:
        scores: one method's.
        draws: how often, at least 2; at 1,000, chance moves an end of a 95 % interval by 0.08 standard errors.
        seed: a whole number from 0.

    Raises:
        GroodError: if `draws` or `seed` is out of range.
    """
    if draws < 2:
        raise GroodError(f"a bootstrap needs at least 2 draws (1000 are usual), got {draws}")
    n, sizes = scores.id_scores.size, scores.sizes
    replicates = {name: np.empty((draws, len(FIGURES))) for name in sizes}
    streams = [resampling_counts(m, seed=seed, stream=name) for name, m in sizes.items()]
    orders = [Ordering(scores.id_scores, ood) for ood in scores.ood_scores.values()]
    # Draw by draw, since one draw of a set fits into the processor's cache and a matrix of them does not.
    for draw, id_counts in zip(range(draws), resampling_counts(n, seed=seed), strict=False):
        for order, stream, found in zip(orders, streams, replicates.values(), strict=True):
            found[draw] = order.figures(id_counts, next(stream))
    observed = {name: detection_metrics(scores.id_scores, ood) for name, ood in scores.ood_scores.items()}
    return Bootstrap(seed, n, sizes, observed, replicates)


def paired_bootstrap(
    first: Bootstrap, second: Bootstrap, figure: str, group: Group = None, *, confidence: float = 0.95
) -> EstimateWithTest:
    """A figure of the first method less that of the second, drawn from the same samples; tested against 0.

    p is twice the share of draws on the rarer side of 0, those at 0 included and one draw added: it is below 5 %
    where the 95 % interval leaves 0 out, but for a draw at its edge, and never below 2 / (draws + 1). z is the value in
    bootstrap standard errors.

    Args:
        first: of `bootstrap`.
        second: of `bootstrap` with the same seed and number of draws, on the same samples in the same order.
        figure: one of `FIGURES`. Of the two FPR lower is better, so that a negative difference favours the first.
        group: a set's name, or the names whose mean is taken; None: all, which both must have.
        confidence: coverage of the percentile interval, in (0, 1).

    Raises:
        GroodError: if the two were not drawn alike, or as `Bootstrap.estimate`.
    """
    if (first.seed, first.draws) != (second.seed, second.draws):
        raise GroodError(
            f"the methods were drawn differently: {first.draws} draws of seed {first.seed}, {second.draws} of seed "
            f"{second.seed}; a pair needs the same draws"
        )
    names = paired_names(group, first.n_id, first.sizes, second.n_id, second.sizes)
    value_a, drawn_a = first._figure(figure, names)
    value_b, drawn_b = second._figure(figure, names)
    value, drawn = value_a - value_b, drawn_a - drawn_b
    error = math.sqrt(sample_variance(drawn))
    rarer = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (1 + rarer) / (len(drawn) + 1))
    z = value / error if error > 0 else math.copysign(math.inf, value) if value else 0.0
    return EstimateWithTest(value, error, *_percentiles(drawn, confidence), z, p)


def resampling_counts(n: int, *, seed: int, stream: str = "") -> Iterator[Counts]:
    """How often each of n samples is drawn when n are drawn with replacement, int64 (n,), for one draw after another.

    Args:
        n: number of samples.
        seed: a whole number from 0.
        stream: name of an OOD set; empty for ID. Streams of other names are independent.

    Raises:
        GroodError: if `seed` is negative.
    """
    if seed < 0:
        raise GroodError(f"a seed is a whole number from 0, got {seed}")
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(stream.encode())))

    def counts() -> Iterator[Counts]:
        while True:
            yield np.bincount(generator.integers(0, n, n), minlength=n).astype(np.int64, copy=False)

    return counts()


def _percentiles(drawn: Floats, confidence: float) -> tuple[float, float]:
    tail = (1 - checked_confidence(confidence)) / 2
    if len(drawn) * tail < 1:
        raise GroodError(
            f"{len(drawn)} draws are too few for an interval of {confidence:.6g}: none lies outside; draw at least "
            f"{math.ceil(1 / tail)} times"
        )
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
