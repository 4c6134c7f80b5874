"""Where the distances of eq. 5 are taken: h / ‖h‖^b, with b = 0, a half or 1.

"raw" (b = 0) is the paper's: the features as they are. In "unit" (b = 1) a feature is its direction alone; "half" keeps
the square root of its length, so that both the direction, which tells far outliers, and the length, which tells near
ones, have a part. A class prototype is the mean of what is so placed.

Distances need a unit: at T = 1, the paper's, π depends on the scale of the network's features, which no classifier
promises. A T of its own is the root mean square distance of the training features from the prototype of their class,

    T² = Σ_x ‖h(x) - p_y(x)‖² / n = Σ_x ‖h(x)‖² / n - Σ_y n_y ‖p_y‖² / n

so that it follows from a sum beside those of the prototypes, and no scale of the features changes a score.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.prototypes import ClassPrototypes

__all__ = ["GEOMETRIES", "SquareSum", "checked_geometry", "placed"]

# The power of its length that a feature is divided by.
GEOMETRIES = {"raw": 0.0, "half": 0.5, "unit": 1.0}
# A sample's bits do not depend on the others of its batch: each block is a matrix of one shape.
_BLOCK_ROWS = 128
# Classes of one point each would have T = 0; in units of the features' own length.
_LEAST_TEMPERATURE = 1e-3


def checked_geometry(geometry: object) -> str:
    """The geometry, if there is one of that name.

    Raises:
        GroodError: if there is none.
    """
    if not isinstance(geometry, str) or geometry not in GEOMETRIES:
        raise GroodError(f"geometry must be one of {', '.join(map(repr, GEOMETRIES))}, got {geometry!r}")
    return geometry


@torch.no_grad()
def placed(features: Tensor, geometry: str) -> Tensor:
    """Features (n, d) as the geometry takes them, at least in float32; a feature of length 0 stays at the origin."""
    power = GEOMETRIES[geometry]
    if power == 0:
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
        largest = block.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(wide).tiny)
        block /= largest
        length = block.square().sum(1, keepdim=True).sqrt_()
        block /= length.masked_fill_(length == 0, 1)
        if power < 1:
            block *= (length * largest) ** (1 - power)
        made[start : start + count] = block[:count]
    return made


class SquareSum:
    """The sum of ‖h‖² over training features, from which T follows."""

    def __init__(self) -> None:
        self._sum = 0.0

    def update(self, features: Tensor) -> None:
        """Add features (n, d), placed."""
        # Device by device and batch by batch: float64 sums differ by rounding only.
        self._sum += float(features.detach().cpu().double().square().sum())

    def temperature(self, prototypes: ClassPrototypes) -> float:
        """The root mean square distance of the same features from the prototype of their class."""
        counts = prototypes.counts.double()
        n = float(counts.sum())
        explained = float((counts * prototypes.means.cpu().square().sum(1)).sum())
        least = _LEAST_TEMPERATURE**2 * self._sum
        return math.sqrt(max(self._sum - explained, least) / n) or 1.0
