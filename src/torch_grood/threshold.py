"""From scores to decisions: split conformal prediction.

Scores s_1 … s_n of held-out in-distribution (ID) samples give every new score s a p-value,

    p(s) = (1 + #{s_i ≥ s}) / (n + 1),

and a sample is called OOD if p ≤ fpr. If the new sample is ID and exchangeable with the held-out ones,
P(p ≤ fpr) ≤ fpr, whatever the distribution (Vovk et al. 2005). The same rule as a threshold (Algorithm 2: ID if
S(x) ≤ τ, else OOD): τ is the m-th largest held-out score, m = ⌊fpr·(n + 1)⌋. No rate below 1/(n + 1) can be promised.

Everything works on log scores, which do not underflow; the order is the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from torch_grood.errors import GroodError

__all__ = ["ConformalThreshold"]


@dataclass(frozen=True)
class ConformalThreshold:
    """A decision rule with a promised false-alarm rate.

    Attributes:
        log_scores: held-out ID scores, log S, ascending, float64 (n,).
        fpr: the false-alarm rate promised: at most this share of exchangeable ID samples is called OOD.
    """

    log_scores: Tensor
    fpr: float

    @classmethod
    def fit(cls, log_scores: Tensor, fpr: float) -> ConformalThreshold:
        """Make the rule from held-out ID scores.

        Args:
            log_scores: log S, (n,), in any order; -inf for S = 0.
            fpr: in (0, 1), at least 1 / (n + 1).

        Raises:
            GroodError: for no score, NaN, or an fpr that is not in (0, 1) or too small to be promised.
        """
        scores = log_scores.detach().double().cpu().flatten().sort().values
        if not (isinstance(fpr, Real) and 0 < fpr < 1):
            raise GroodError(f"fpr is the share of ID samples that may be flagged, between 0 and 1; got {fpr!r}")
        if len(scores) == 0:
            raise GroodError("there is no calibration sample; pass held-out in-distribution samples")
        if bool(scores.isnan().any()):
            raise GroodError("a calibration score is NaN; check the calibration images")
        threshold = cls(scores, float(fpr))
        if threshold._rank < 1:
            needed = math.ceil(1 / fpr - 1e-9) - 1 if fpr > 1e-15 else 10**15
            raise GroodError(
                f"a false-alarm rate of {fpr:g} cannot be promised from {len(scores)} calibration samples: the "
                f"smallest possible is 1/(n + 1) = {1 / (len(scores) + 1):.4g}. "
                f"Pass at least {needed} samples, or a larger fpr."
            )
        return threshold

    @property
    def n(self) -> int:
        """Number of held-out samples."""
        return len(self.log_scores)

    @property
    def log_tau(self) -> float:
        """Log τ: the m-th largest held-out score; a greater one is called OOD."""
        return float(self.log_scores[self.n - self._rank])

    @property
    def tau(self) -> float:
        """τ in the paper's units (0 where it underflows; decisions are made on logarithms)."""
        return math.exp(self.log_tau)

    @property
    def _rank(self) -> int:
        """m: how many of the p-values 1/(n + 1), 2/(n + 1), … are at most fpr, as floating-point numbers."""
        rank = math.floor(self.fpr * (self.n + 1))
        # The product may round to either side of a whole number.
        return next(m for m in (rank + 1, rank, rank - 1) if m / (self.n + 1) <= self.fpr)

    def p_values(self, log_scores: Tensor) -> Tensor:
        """p(s), float64 (n,); small for samples unlike the held-out ones."""
        scores = log_scores.detach().double().cpu()
        at_least = self.n - torch.searchsorted(self.log_scores, scores, right=False)
        return (1 + at_least).double() / (self.n + 1)

    def is_ood(self, log_scores: Tensor) -> Tensor:
        """S > τ, equivalently p ≤ fpr, bool (n,)."""
        return log_scores.detach().double().cpu() > self.log_tau
