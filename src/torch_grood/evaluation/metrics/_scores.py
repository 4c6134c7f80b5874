"""Scores of an ID and an OOD set, in any container, as float64 arrays without NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from torch_grood.errors import GroodError

__all__ = ["Scores"]

Scores = Tensor | ArrayLike


def _both(id_scores: Scores, ood_scores: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return _as_scores(id_scores, "ID"), _as_scores(ood_scores, "OOD")


def _as_scores(scores: Scores, name: str) -> NDArray[np.float64]:
    raw: NDArray[Any]
    if isinstance(scores, Tensor):
        # bfloat16 has no numpy counterpart; complex would lose its imaginary part with a mere warning.
        raw = (scores if scores.is_complex() else scores.to(torch.float64)).detach().cpu().numpy()
    else:
        raw = np.asarray(scores)
    if raw.ndim != 1:
        raise GroodError(f"{name} scores must be 1-D, one number a sample; got shape {raw.shape}. Flatten them first.")
    if raw.size == 0:
        raise GroodError(
            f"there are no {name} scores; at least one is needed. Check the {name} data set's path or list."
        )
    if raw.dtype.kind not in "fiub":
        raise GroodError(f"{name} scores must be real numbers, got dtype {raw.dtype}; convert them to float first")
    array = raw.astype(np.float64)
    missing = np.flatnonzero(np.isnan(array))
    if missing.size:
        raise GroodError(
            f"{missing.size} of {array.size} {name} scores are NaN, the first at index {missing[0]}; NaN has no place "
            f"in an order. Mend the input or the detector, or drop these samples and report how many."
        )
    return array
