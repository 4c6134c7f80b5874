"""eq. 5: the gradient of the nearest-class-prototype loss with respect to the OOD prototype.

With scores s_k = -‖h - p_k‖₂ over the C class prototypes and the OOD prototype p_ood, and the loss
L(h, y) = -log softmax(s)_y, the gradient is, for every y ≠ ood,

    H(h) = ∂L/∂p_ood = π(h) · (h - p_ood) / ‖h - p_ood‖₂        π(h) = softmax(s)_ood

because ∂L/∂s_ood = π and ∂s_ood/∂p_ood = (h - p_ood) / ‖h - p_ood‖₂. The label cancels and ‖H‖₂ = π ∈ (0, 1).

π shrinks exponentially with the scale of the features (6e-12 at feature norm 40), so a gradient is computed and kept
in polar form, (log π, direction): no feature scale underflows. Distances are computed in float64 relative to p_ood,
in blocks of a fixed number of rows, so that a sample's bits do not depend on the batch that it came in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.geometry import placed

__all__ = [
    "GradientField",
    "PolarGradients",
    "PrototypeGeometry",
    "log_ood_probability",
    "ood_gradient",
    "polar_ood_gradient",
]

# A matrix product of another shape may take another code path and round differently; one shape has one path. So may a
# row that begins at another place within a vector register's width: all rows begin at multiples of 64 bytes.
BLOCK_ROWS = 128
_ALIGNED = 8


class PolarGradients(NamedTuple):
    """Gradients H = exp(log_magnitude) · direction of n samples, in a form that cannot underflow.

    Attributes:
        log_magnitude: log π = log ‖H‖₂, float64 (n,).
        direction: (h - p_ood) / ‖h - p_ood‖₂, (n, d); the zero vector where h = p_ood, the subgradient of least norm.
    """

    log_magnitude: Tensor
    direction: Tensor

    def take(self, rows: Tensor | slice) -> PolarGradients:
        """The gradients of the given rows."""
        return PolarGradients(self.log_magnitude[rows], self.direction[rows])

    def log_norm(self) -> Tensor:
        """Log ‖H‖₂: log π, but -inf for the zero vector at h = p_ood."""
        return self.log_magnitude.masked_fill(~self.direction.any(1), -torch.inf)

    def vectors(self, log_scale: float = 0.0) -> Tensor:
        """H · exp(-log_scale), (n, d), in the dtype of `direction`."""
        magnitude = (self.log_magnitude - log_scale).exp()
        return (self.direction * magnitude[:, None]).to(self.direction.dtype)


class PrototypeGeometry(NamedTuple):
    """What the distances to the prototypes say of n samples.

    Attributes:
        gradients: eq. 5 in polar form, float64.
        nearest: row of the nearest class prototype, int64 (n,).
    """

    gradients: PolarGradients
    nearest: Tensor


class GradientField:
    """H(h) and the nearest class prototype for fixed prototypes, which are prepared once.

    Args:
        class_prototypes: (C, d), in the geometry.
        ood_prototype: p_ood, (d,), in the geometry.
        geometry: see `torch_grood.geometry`.
        temperature: T; the scores are s_k = -‖h - p_k‖₂ / T, and H is the gradient of T · L: ‖H‖₂ = π for all T.

    Attributes:
        class_prototypes, ood_prototype, temperature: as given.

    Raises:
        GroodError: for shapes that do not fit.
    """

    def __init__(
        self, class_prototypes: Tensor, ood_prototype: Tensor, geometry: str = "raw", temperature: float = 1.0
    ) -> None:
        if (
            class_prototypes.ndim != 2
            or len(class_prototypes) == 0
            or ood_prototype.shape != class_prototypes.shape[1:]
        ):
            raise GroodError(
                "expected class prototypes (C, d) and an OOD prototype (d,), "
                f"got {tuple(class_prototypes.shape)} and {tuple(ood_prototype.shape)}"
            )
        device = _float64_device(class_prototypes.device)
        self.class_prototypes, self.ood_prototype, self.temperature = class_prototypes, ood_prototype, temperature
        self._geometry = geometry
        self._origin = ood_prototype.detach().to(device, torch.float64)
        self._classes = class_prototypes.detach().to(device, torch.float64) - self._origin
        self._class_squares = self._classes.square().sum(1)
        if not bool(self._class_squares.isfinite().all()):
            raise GroodError("a class prototype or the OOD prototype is not finite; check the features they come from")

    @torch.no_grad()
    def __call__(self, features: Tensor, first: int = 0) -> PrototypeGeometry:
        """Evaluate eq. 5 at `features` (n, d); in an error their first row is called sample `first`.

        Raises:
            GroodError: for shapes that do not fit, or a feature that is NaN or infinite (its row is named).
        """
        d = len(self._origin)
        _check_features(features, d)
        n, device = len(features), self._origin.device
        n_padded = -(-n // BLOCK_ROWS) * BLOCK_ROWS
        offset = torch.empty(n_padded, -(-d // _ALIGNED) * _ALIGNED, dtype=torch.float64, device=device)[:, :d]
        offset[n:] = 0
        torch.sub(self.placed(features).detach().to(device), self._origin, out=offset[:n])
        ood_distance = torch.empty(n_padded, 1, dtype=torch.float64, device=device)
        log_magnitude = torch.empty(n_padded, dtype=torch.float64, device=device)
        nearest = torch.empty(n_padded, dtype=torch.int64, device=device)
        for start in range(0, n, BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            squares = offset[block].square().sum(1, keepdim=True)
            class_distance2 = self._class_distance2(offset[block], squares)
            torch.sqrt(squares, out=ood_distance[block])
            scores = torch.cat([class_distance2.sqrt(), ood_distance[block]], dim=1).div_(-self.temperature)
            torch.sub(scores[:, -1], torch.logsumexp(scores, dim=1), out=log_magnitude[block])
            nearest[block] = class_distance2.argmin(1)
        _check_finite(log_magnitude[:n], features, first)
        # Where h = p_ood the direction is the zero vector: the subgradient of least norm. Nearer than 1e-150, where the
        # square underflows, counts as equal.
        apart = ood_distance > 1e-150
        direction = offset.mul_(ood_distance.reciprocal_().masked_fill_(~apart, 0.0))
        return PrototypeGeometry(PolarGradients(log_magnitude[:n], direction[:n]), nearest[:n])

    def placed(self, features: Tensor) -> Tensor:
        """Features (n, d) where their distances to the prototypes are taken."""
        return placed(features, self._geometry)

    def _class_distance2(self, offset: Tensor, squares: Tensor) -> Tensor:
        """Squared distances of one block of rows, relative to p_ood, to the class prototypes."""
        scale = squares + self._class_squares
        distance2 = torch.addmm(scale, offset, self._classes.T, alpha=-2)
        # ‖h‖² + ‖p‖² - 2h·p cancels where h is almost p; those few pairs are computed from the difference.
        close = distance2 < 1e-6 * scale
        if close.any():
            sample, row = close.nonzero(as_tuple=True)
            distance2[close] = (offset[sample] - self._classes[row]).square().sum(1)
        return distance2


def polar_ood_gradient(features: Tensor, class_prototypes: Tensor, ood_prototype: Tensor) -> PolarGradients:
    """eq. 5 in polar form, float64; shapes and errors as in `ood_gradient`."""
    return GradientField(class_prototypes, ood_prototype)(features).gradients


def log_ood_probability(features: Tensor, class_prototypes: Tensor, ood_prototype: Tensor) -> Tensor:
    """Return log π(h) = log ‖H(h)‖₂, float64 (n,); shapes and errors as in `ood_gradient`."""
    return polar_ood_gradient(features, class_prototypes, ood_prototype).log_magnitude


def ood_gradient(
    features: Tensor, class_prototypes: Tensor, ood_prototype: Tensor, *, log_scale: float = 0.0
) -> Tensor:
    """eq. 5 in closed form: the gradient H of the nearest-class-prototype loss with respect to p_ood.

    >>> h = torch.tensor([[3.0, 4.0]])
    >>> ood_gradient(h, torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.zeros(2))
    tensor([[0.0503, 0.0671]])

    Args:
        features: penultimate features h, (n, d), any float dtype and device.
        class_prototypes: (C, d).
        ood_prototype: p_ood, (d,).
        log_scale: returns H · exp(-log_scale); with the largest log π of a set, its gradients stay representable
            at any feature scale.

    Returns:
        (n, d), dtype and device of `features`; computed in float64.

    Raises:
        GroodError: for shapes that do not fit, or a feature that is NaN or infinite (its row is named).
    """
    gradients = polar_ood_gradient(features, class_prototypes, ood_prototype)
    # In place: the direction is ours, and a fresh array costs as much as the arithmetic.
    vectors = gradients.direction.mul_((gradients.log_magnitude - log_scale).exp_()[:, None])
    return vectors.to(device=features.device, dtype=features.dtype)


def _float64_device(device: torch.device) -> torch.device:
    """The device to compute on: Apple's has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _check_features(features: Tensor, d: int) -> None:
    if features.ndim != 2 or features.shape[1] != d:
        raise GroodError(f"expected features of shape (n, {d}), as the prototypes have, got {tuple(features.shape)}")
    if not features.is_floating_point():
        raise GroodError(f"features must be of a float dtype, got {features.dtype}; convert them with .float()")


def _check_finite(log_magnitude: Tensor, features: Tensor, first: int) -> None:
    """A NaN or an infinity anywhere in a row, or a prototype, makes its log π NaN."""
    bad = (~log_magnitude.isfinite()).nonzero().flatten()
    if len(bad) == 0:
        return
    row = int(bad[0])
    values = features[row]
    broken = (~values.isfinite()).nonzero().flatten()
    if len(broken):
        column = int(broken[0])
        what = f"feature {column} of sample {first + row} is {values[column].item()}"
    else:
        what = f"sample {first + row} or a prototype is too large for float64"
    raise GroodError(
        f"{what} ({len(bad)} of {len(features)} samples affected); GROOD needs finite features. "
        "Check the input images and the model (half precision may overflow), or leave these samples out."
    )
