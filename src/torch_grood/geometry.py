"""Where the distances of eq. 5 are taken: between the features as they are, or between features of unit length.

"raw" is the paper's: the features without normalisation, at temperature T = 1, whatever their scale. In "unit" each
feature is divided by its length first. A class prototype is then the mean of unit vectors, whose length tells how close
the class lies together, and the scale of the network's features, which no classifier promises, has no part in the
softmax. Distances between unit vectors need a unit of their own: T is the root mean square distance of the training
features from the prototype of their class.

    Σ_x ‖h(x) - p_y(x)‖² / n = 1 - Σ_y n_y ‖p_y‖² / n        for ‖h‖ = 1

so that T follows from the prototypes and their counts, in whatever order the samples came.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.prototypes import ClassPrototypes

__all__ = ["GEOMETRIES", "checked_geometry", "own_temperature", "placed"]

GEOMETRIES = ("raw", "unit")
# A sample's bits do not depend on the others of its batch: each block is a matrix of one shape.
_BLOCK_ROWS = 128
# Classes of one point each would have T = 0.
_LEAST_TEMPERATURE = 1e-3


def checked_geometry(geometry: object) -> str:
    """The geometry, if there is one of that name.

    Raises:
        GroodError: if there is none.
    """
    if geometry not in GEOMETRIES:
        raise GroodError(f"geometry must be {' or '.join(map(repr, GEOMETRIES))}, got {geometry!r}")
    return str(geometry)


@torch.no_grad()
def placed(features: Tensor, geometry: str) -> Tensor:
    """Features (n, d) as the geometry takes them, at least in float32; a feature of length 0 stays at the origin."""
    if geometry == "raw":
        return features
    features = features.detach()
    n, d = features.shape
    made = torch.empty(n, d, dtype=torch.promote_types(features.dtype, torch.float32), device=features.device)
    # Apple's devices have no float64.
    wide = torch.float32 if features.device.type == "mps" else torch.float64
    block = torch.zeros(_BLOCK_ROWS, d, dtype=wide, device=features.device)
    for start in range(0, n if d else 0, _BLOCK_ROWS):
        count = min(_BLOCK_ROWS, n - start)
        block[:count] = features[start : start + count]
        # The largest number first, so that no square overflows or underflows.
        block /= block.abs().amax(1, keepdim=True).nan_to_num_(nan=torch.nan).clamp_(min=torch.finfo(wide).tiny)
        length = block.square().sum(1, keepdim=True).sqrt_()
        made[start : start + count] = (block / length.masked_fill_(length == 0, 1))[:count]
    return made


def own_temperature(prototypes: ClassPrototypes, geometry: str) -> float:
    """T of a geometry, for the prototypes of features in it."""
    if geometry == "raw":
        return 1.0
    counts = prototypes.counts.double()
    spread = 1.0 - float((counts * prototypes.means.cpu().square().sum(1)).sum() / counts.sum())
    return math.sqrt(max(spread, _LEAST_TEMPERATURE**2))
