"""From scores to decisions: split conformal prediction.

Scores s_1 … s_n of held-out in-distribution (ID) samples give every new score s a p-value,

    p(s) = (1 + #{s_i ≥ s}) / (n + 1),

and a sample is called OOD if p ≤ fpr. If the new sample is ID and exchangeable with the held-out ones,
P(p ≤ fpr) ≤ fpr, whatever the distribution (Vovk et al. 2005). The same rule as a threshold (Algorithm 2: ID if
S(x) ≤ τ, else OOD): τ is the m-th largest held-out score, m = ⌊fpr·(n + 1)⌋. No rate below 1/(n + 1) can be promised.

- **Groups** (Mondrian): each group, such as a predicted class, has its own scores, n, m and τ, and its own promise.
- **This draw**: P(p ≤ fpr) is a mean over calibration sets. For continuous scores the false-alarm rate of one set,
  P(S > τ | s_1 … s_n), has the law Beta(m, n + 1 − m) (Vovk 2012, "Conditional validity of inductive conformal
  predictors"). Its quantiles are the limits of Clopper & Pearson (1934): the lower for m exceedances of n, the upper
  for m − 1. With ties the rate can only be smaller.
- **Many at once**: N samples tested at fpr make fpr·N false alarms, which may outnumber the outliers. Benjamini &
  Hochberg's rule (1995) bounds the share of ID samples among those flagged instead.

Everything works on log scores, which do not underflow; the order is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from torch_grood._conformal import beta_interval, checked_rate, flagged, least_rejections, promised, rank_of
from torch_grood.errors import GroodError

__all__ = ["ConformalThreshold", "benjamini_hochberg", "least_rejections"]


@dataclass(frozen=True, eq=False)
class ConformalThreshold:
    """A decision rule with a promised false-alarm rate.

    Attributes:
        log_scores: held-out ID scores, log S, float64 (n,), ascending; with groups: ascending within each group, the
            groups one after another.
        fpr: the false-alarm rate promised: at most this share of exchangeable ID samples is called OOD.
        groups: the group of each held-out score, int64 (n,), ascending; None: one group for all.
    """

    log_scores: Tensor
    fpr: float
    groups: Tensor | None = None

    @classmethod
    def fit(
        cls, log_scores: Tensor, fpr: float, groups: Tensor | None = None, *, describe: Callable[[int], str] = str
    ) -> ConformalThreshold:
        """Make the rule from held-out ID scores.

        Args:
            log_scores: log S, (n,), in any order; -inf for S = 0.
            fpr: in (0, 1), at least 1 / (n + 1) for the n of every group.
            groups: whole numbers (n,): a threshold for each of them; None: one for all.
            describe: names a group in an error.

        Raises:
            GroodError: for no score, NaN or +inf, or an fpr that is not in (0, 1) or too small to be promised.
        """
        scores = log_scores.detach().double().cpu().flatten()
        if len(scores) == 0:
            raise GroodError("there is no calibration sample; pass held-out in-distribution samples")
        if bool(scores.isnan().any()):
            raise GroodError("a calibration score is NaN; check the calibration images")
        if bool(scores.isposinf().any()):
            raise GroodError("a calibration score is infinite; check the calibration images")
        order = scores.argsort()
        if groups is not None:
            groups = _as_groups(groups, len(scores))
            order = order[groups[order].argsort(stable=True)]
            groups = groups[order]
        return cls(scores[order], math.nan, groups).at(fpr, describe=describe)

    def at(self, fpr: float, *, describe: Callable[[int], str] = str) -> ConformalThreshold:
        """Another operating point from the same scores; `describe` and errors as in `fit`."""
        fpr = promised(fpr, self.group_sizes, grouped=self.groups is not None, describe=describe)
        return replace(self, fpr=fpr)

    @property
    def n(self) -> int:
        """Number of held-out samples, of all groups together."""
        return len(self.log_scores)

    @property
    def group_ids(self) -> Tensor:
        """The groups that the calibration knows, ascending int64 (G,); [0] without groups."""
        return torch.tensor(list(self._parts))

    @property
    def group_sizes(self) -> dict[int, int]:
        """Number of held-out samples of each of `group_ids`."""
        return {group: len(scores) for group, scores in self._parts.items()}

    @property
    def log_taus(self) -> Tensor:
        """Log τ of each of `group_ids`, float64 (G,)."""
        return torch.stack([self._log_tau(scores) for scores in self._parts.values()])

    @property
    def log_tau(self) -> float:
        """Log τ: the m-th largest held-out score; a greater one is called OOD.

        Raises:
            GroodError: with groups, which have one each.
        """
        self._need_one_group("log_taus")
        return float(self.log_taus[0])

    @property
    def tau(self) -> float:
        """τ in the paper's units (0 where it underflows; decisions are made on logarithms); errors as `log_tau`."""
        return math.exp(self.log_tau)

    def p_values(self, log_scores: Tensor, groups: Tensor | None = None) -> Tensor:
        """p(s), float64 (n,); small for samples unlike the held-out ones of their group.

        Args:
            log_scores: log S, (n,).
            groups: their groups, (n,), if and only if the threshold has groups. In a group without a held-out score
                p = 1 / (0 + 1): nothing speaks against such a sample.

        Raises:
            GroodError: for a NaN, or another shape.
        """
        scores = _as_scores(log_scores)
        found = torch.ones_like(scores)
        for rows, held_out in self._matched(groups, len(scores)):
            at_least = len(held_out) - torch.searchsorted(held_out, scores[rows])
            found[rows] = (1 + at_least).double() / (len(held_out) + 1)
        return found

    def is_ood(self, log_scores: Tensor, groups: Tensor | None = None) -> Tensor:
        """S > τ, equivalently p ≤ fpr, bool (n,); arguments and errors as `p_values`."""
        scores = _as_scores(log_scores)
        found = torch.zeros(len(scores), dtype=torch.bool)
        for rows, held_out in self._matched(groups, len(scores)):
            found[rows] = scores[rows] > self._log_tau(held_out)
        return found

    def band(self, confidence: float = 0.95) -> tuple[float, float]:
        """Where the false-alarm rate of this very calibration lies with this confidence: two quantiles of its law.

        Raises:
            GroodError: with groups, which have one each; for a confidence that is not in (0, 1).
        """
        self._need_one_group("bands")
        low, high = self.bands(confidence)[0].tolist()
        return low, high

    def bands(self, confidence: float = 0.95) -> Tensor:
        """`band` of each of `group_ids`, each with this confidence by itself, float64 (G, 2)."""
        confidence = checked_rate(confidence, "confidence is the share of calibrations whose band holds the true rate")
        sizes = [len(scores) for scores in self._parts.values()]
        found = {n: beta_interval(rank_of(self.fpr, n), n, confidence) for n in set(sizes)}
        return torch.tensor([found[n] for n in sizes], dtype=torch.float64)

    @cached_property
    def _parts(self) -> dict[int, Tensor]:
        """The held-out scores of each group, ascending."""
        if self.groups is None:
            return {0: self.log_scores}
        ids, counts = torch.unique_consecutive(self.groups, return_counts=True)
        return dict(zip(ids.tolist(), torch.split(self.log_scores, counts.tolist()), strict=True))

    def _matched(self, groups: Tensor | None, n: int) -> Iterator[tuple[Tensor | slice, Tensor]]:
        """Which of n samples belong to which held-out scores; those of unknown groups belong to none."""
        if (groups is None) != (self.groups is None):
            given, expected = ("none", "one for each sample") if groups is None else ("some", "none")
            raise GroodError(f"groups must be given as they were at calibration: expected {expected}, got {given}")
        if groups is None:
            yield slice(None), self.log_scores
            return
        groups = _as_groups(groups, n)
        for group in torch.unique(groups).tolist():
            if group in self._parts:
                yield groups == group, self._parts[group]

    def _log_tau(self, held_out: Tensor) -> Tensor:
        return held_out[len(held_out) - rank_of(self.fpr, len(held_out))]

    def _need_one_group(self, instead: str) -> None:
        if self.groups is not None:
            raise GroodError(f"this threshold has {len(self._parts)} groups, not one; use {instead}")


def benjamini_hochberg(p_values: Tensor, fdr: float) -> Tensor:
    """Which samples to call OOD such that, in expectation, at most `fdr` of them are ID.

    All p ≤ p_(k) are flagged, with the largest k such that the k-th smallest p-value p_(k) ≤ fdr·k/N. The p-values
    may share one calibration set: they depend on each other positively, and the bound holds (Bates, Candès, Lei,
    Romano, Sesia 2023, "Testing for outliers with conformal p-values", Annals of Statistics 51).

    Args:
        p_values: (N,), in [0, 1]; all that are tested together, not a selection by their values.
        fdr: false discovery rate, in (0, 1).

    Returns:
        bool (N,).

    Raises:
        GroodError: for NaN, p-values outside [0, 1], another shape, or an fdr that is not in (0, 1).
    """
    p = p_values.detach().double().cpu()
    if p.dim() != 1:
        raise GroodError(f"p-values must have the shape (n,), got {tuple(p.shape)}")
    return torch.from_numpy(flagged(p.numpy(), fdr))


def _as_scores(log_scores: Tensor) -> Tensor:
    scores = log_scores.detach().double().cpu().contiguous()  # searchsorted warns where it has to copy
    if scores.dim() != 1:
        raise GroodError(f"scores must have the shape (n,), got {tuple(scores.shape)}")
    if bool(scores.isnan().any()):
        raise GroodError("a score is NaN, of which nothing can be said; check the images")
    return scores


def _as_groups(groups: Tensor, n: int) -> Tensor:
    groups = groups.detach().cpu()
    if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
        raise GroodError(f"groups are whole numbers, one for each sample; got {groups.dtype}")
    if groups.shape != (n,):
        raise GroodError(f"groups must have the shape ({n},), one for each score; got {tuple(groups.shape)}")
    return groups.long()
