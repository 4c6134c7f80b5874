"""What the settings and searches of other libraries have in common: outlier sources by name, scores that are finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.outliers import Mixup, OutlierSamples, OutlierSource, named_source

__all__ = ["LAMBDAS", "SOURCES", "finite", "make_source"]

SOURCES = ("energy", "mixup", "noise", "mean", "val_ood")
# The paper's search.
LAMBDAS = (0.1, 0.3, 0.6, 0.8, 0.9)

# Finite in float32 too, where a caller may put it.
_LARGEST = torch.finfo(torch.float32).max


def make_source(
    outliers: str | OutlierSource, lam: float = Mixup.lam, n: int | None = None, val_ood: Iterable[Any] | None = None
) -> OutlierSource:
    """The outlier source of a name; what it has no use for of the other arguments is ignored, as in a grid.

    Args:
        outliers: a name in `SOURCES`, or a source.
        lam: of `Mixup`.
        n: of `HighEnergy`, `Mixup`, `UniformNoise` and `OutlierSamples`; None: their own default.
        val_ood: batches of real outliers, for "val_ood".

    Raises:
        GroodError: for another name, arguments out of range, or outliers that are not there.
    """
    if isinstance(outliers, OutlierSource):
        return outliers
    if outliers not in SOURCES:
        raise GroodError(f"outliers must be one of {', '.join(SOURCES)}, or a source such as Mixup(); got {outliers!r}")
    if outliers != "val_ood":
        return named_source(outliers, n, lam)
    if val_ood is None:
        raise GroodError(
            "outliers='val_ood' needs real outliers, and there are none here; pass OutlierSamples(loader) instead, or "
            "outliers='mixup', which makes its own"
        )
    return OutlierSamples(val_ood, n)


def finite(log_scores: Tensor) -> Tensor:
    """Scores in the same order without infinities: log S is −∞ for what has a training sample's very gradient."""
    return log_scores.clamp(-_LARGEST, _LARGEST)
