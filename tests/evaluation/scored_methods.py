"""Made-up scores of two methods on the same samples."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from torch_grood.evaluation import ScoreSets

values = st.sampled_from([-math.inf, -1.0, 0.0, 0.25, 0.5, 1.0, math.inf])


def two_methods(seed: int = 0, n: int = 60, sizes: tuple[int, ...] = (40, 75)) -> tuple[ScoreSets, ScoreSets]:
    """Two correlated methods on an ID set and OOD sets `a`, `b`, …; rounded, so that scores tie."""
    rng = np.random.default_rng(seed)

    def scores(m: int, shift: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        shared = rng.normal(shift, 1, m)
        return (shared + rng.normal(0, 0.5, m)).round(1), (shared * 0.8 + rng.normal(0, 0.9, m)).round(1)

    of_id = scores(n, 0)
    of_ood = {name: scores(m, 1 + 0.5 * i) for i, (name, m) in enumerate(zip("abc", sizes, strict=False))}
    first, second = (ScoreSets(of_id[i], {name: pair[i] for name, pair in of_ood.items()}) for i in range(2))
    return first, second
