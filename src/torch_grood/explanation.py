"""Why a sample has its score: the parts of S, the nearest class prototypes and the nearest training samples.

With the gradient H = π·u of the sample and H' = π'·u' of its nearest training sample, at an angle θ, their distance,
which is the score for k = 1, parts into what the magnitudes and what the directions differ by (the law of cosines, with
1 - cos θ = 2 sin²(θ/2)):

    ‖H - H'‖₂² = (π - π')² + 4 π π' sin²(θ/2)

In units of the larger magnitude, r = e^-|log π - log π'|, this is (1 - r)² + r·c² with the chord c = ‖u - u'‖ =
2 sin(θ/2): nothing underflows at any scale of the features, and nothing cancels. θ = 2 atan(‖u - u'‖ / ‖u + u'‖) is
accurate for small and large angles alike (Kahan, How futile are mindless assessments of roundoff, 2006, section 12).
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.gradients import BLOCK_ROWS, PolarGradients
from torch_grood.neighbors import GradientSearcher, Neighbors, log_distance, log_mean
from torch_grood.neighbors.store import GradientStore
from torch_grood.state import GRADIENT_ROWS, FittedState

__all__ = ["Explanation", "explain"]

# Directions of pairs, in float64 and a few at a time.
_PAIR_BYTES = 32 * 2**20


class Explanation(NamedTuple):
    """What the scores of n samples come from; tensors on the CPU, k neighbours, c class prototypes.

    Attributes:
        log_score: log S, float64 (n,); -inf for S = 0. S is the mean distance to the detector's k nearest gradients.
        log_magnitude: log π of the sample, float64 (n,).
        direction: unit vector of its gradient, away from the OOD prototype, float32 (n, d); zero where h = p_ood, where
            the gradient is the zero vector whatever π is.
        ood_distance: ‖h - p_ood‖₂, float64 (n,); as all distances, in the detector's geometry.
        prototype: the nearest class prototypes, nearest first, as positions in `GROOD.classes_`, int64 (n, c).
        prototype_distance: ‖h - p_c‖₂, float64 (n, c).
        neighbor: the training samples with the nearest gradients, nearest first, by their positions in the training
            set, int64 (n, k). The first ones are those that the score is the mean distance to. An approximate index
            looks more widely for more, and may then find a nearer one.
        neighbor_log_distance: log of the distance of the gradients, float64 (n, k).
        neighbor_log_magnitude: log π of the neighbours, float64 (n, k).
        neighbor_angle: θ between the directions, radians, float64 (n, k); π/2 if one of the two has none (h = p_ood),
            0 if both have none.
        direction_share: which part of ‖H - H'‖² the directions make, float64 (n,) in [0, 1]: 4ππ'sin²(θ/2) of it, for
            the first neighbour; the magnitudes make the rest. 0 for H = H', where there is nothing to share.
    """

    log_score: Tensor
    log_magnitude: Tensor
    direction: Tensor
    ood_distance: Tensor
    prototype: Tensor
    prototype_distance: Tensor
    neighbor: Tensor
    neighbor_log_distance: Tensor
    neighbor_log_magnitude: Tensor
    neighbor_angle: Tensor
    direction_share: Tensor


def explain(state: FittedState, features: Tensor, k: int = 5, n_prototypes: int = 5) -> Explanation:
    """Explain the scores of samples; each has the same bits alone or among others.

    Args:
        state: of a fitted detector.
        features: penultimate features h, (n, d), any float dtype and device.
        k: neighbours wanted; of fewer stored gradients, all.
        n_prototypes: class prototypes wanted; of fewer classes, all.

    Raises:
        GroodError: for a k or n_prototypes that is no positive integer; for features of another shape, or that are NaN
            or infinite (the row is named).
    """
    k = min(_count("k", k), len(state.searcher.gradients))
    c = min(_count("n_prototypes", n_prototypes), len(state.class_prototypes))
    if features.ndim != 2:
        d = len(state.ood_prototype)
        raise GroodError(f"expected features of shape (n, {d}), as the prototypes have, got {tuple(features.shape)}")
    starts = range(0, max(1, len(features)), GRADIENT_ROWS)
    parts = [_explain_part(state, features[i : i + GRADIENT_ROWS], k, c, first=i) for i in starts]
    return parts[0] if len(parts) == 1 else Explanation(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _count(name: str, value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise GroodError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def _explain_part(state: FittedState, features: Tensor, k: int, c: int, first: int) -> Explanation:
    geometry = state.gradient_field(features.cpu(), first=first)
    # Rounded to float32 as the search does: the parts are those of the score.
    gradients = PolarGradients(geometry.gradients.log_magnitude, geometry.gradients.direction.float())
    ood_distance, prototype, prototype_distance = _prototypes(
        state, state.gradient_field.placed(features), geometry.nearest, c
    )
    scored = Neighbors(*(field.cpu() for field in state.searcher.search(gradients, state.info.k)))
    found = _neighbors(state.searcher, gradients, scored, k)
    log_magnitude, angle, share = _polar_parts(gradients, state.searcher.gradients, found.row)
    return Explanation(
        log_score=log_mean(scored.log_distance),
        log_magnitude=gradients.log_magnitude,
        direction=gradients.direction,
        ood_distance=ood_distance,
        prototype=state.class_ids[prototype],
        prototype_distance=prototype_distance,
        neighbor=state.sample_ids[found.row],
        neighbor_log_distance=found.log_distance,
        neighbor_log_magnitude=log_magnitude,
        neighbor_angle=angle,
        direction_share=share,
    )


def _prototypes(state: FittedState, features: Tensor, nearest: Tensor, c: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distance to p_ood, (n,), and the rows of the c nearest class prototypes with their distances, (n, c)."""
    points = torch.cat([state.class_prototypes, state.ood_prototype[None]])
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, max(1, len(features)), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        h = features[rows].detach().cpu().double()
        # From differences: each pair by itself, so that nothing cancels and no other sample changes a bit.
        distance = torch.cdist(h, points, compute_mode="donot_use_mm_for_euclid_dist")
        # Of two prototypes that are equally near up to rounding, the decision's own comes first.
        order = distance[:, :-1].scatter(1, nearest[rows, None], -1.0).argsort(dim=1, stable=True)[:, :c]
        parts.append((distance[:, -1], order, distance.gather(1, order)))
    ood_distance, prototype, prototype_distance = (torch.cat(field) for field in zip(*parts, strict=True))
    return ood_distance, prototype, prototype_distance


def _neighbors(searcher: GradientSearcher, gradients: PolarGradients, scored: Neighbors, k: int) -> Neighbors:
    """The nearest gradients: the first as the score has it, and k - 1 others, for which it may take another search."""
    if k <= scored.row.shape[1]:
        return Neighbors(scored.log_distance[:, :k], scored.row[:, :k])
    best = Neighbors(scored.log_distance[:, :1], scored.row[:, :1])
    more = Neighbors(*(field.cpu() for field in searcher.search(gradients, k)))
    row = torch.cat([best.row, more.row], dim=1)
    again = row == best.row
    again[:, 0] = False
    # The one that was found twice goes to the end, where it is cut off; an approximate index may have missed it.
    order = again.int().argsort(dim=1, stable=True)[:, :k]
    distance = torch.cat([best.log_distance, more.log_distance], dim=1)
    return Neighbors(distance.gather(1, order), row.gather(1, order))


def _polar_parts(gradients: PolarGradients, stored: GradientStore, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log π and angle of neighbours, (n, k), and the share of the direction in the distance to the first, (n,)."""
    n, k = row.shape
    block = max(1, _PAIR_BYTES // (8 * stored.dim))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, max(1, n * k), block):
        pair = torch.arange(start, min(start + block, n * k))
        found = stored.take(row.flatten()[pair].to(stored.device))
        neighbors = PolarGradients(*(field.cpu() for field in found))
        parts.append((neighbors.log_magnitude, *_angle_and_share(gradients.take(pair // k), neighbors)))
    log_magnitude, angle, share = (torch.cat(field).view(n, k) for field in zip(*parts, strict=True))
    return log_magnitude, angle, share[:, 0].clone()


def _angle_and_share(first: PolarGradients, second: PolarGradients) -> tuple[Tensor, Tensor]:
    """Angle between m pairs of gradients, and the share of the directions in their squared distance; float64 (m,)."""
    log_length, units = [], []
    for gradients in (first, second):
        direction = gradients.direction.double()
        # float32 directions are of unit length up to rounding only; the rest belongs to the magnitude.
        log_norm = _log_chord(direction, torch.zeros_like(direction))
        log_length.append(gradients.log_magnitude + log_norm)
        units.append(direction * (-log_norm.clamp(min=-1.0)).exp()[:, None])
    log_chord = _log_chord(*units)
    # Not atan2, whose last bit here depends on the other samples of the batch.
    half_angle = (log_chord - _log_chord(units[0], -units[1])).exp_().atan_()
    ratio = -(log_length[0] - log_length[1]).abs()
    of_direction = (ratio + 2 * log_chord).exp()
    share = of_direction / (torch.expm1(ratio).square() + of_direction)
    # Two zero vectors have no angle, and S = 0 has no parts.
    return 2 * half_angle.nan_to_num(nan=0.0), share.nan_to_num(nan=0.0)


def _log_chord(first: Tensor, second: Tensor) -> Tensor:
    """Log ‖u - v‖₂ of m pairs of vectors (m, d) of length 1 or 0, float64 (m,)."""
    zero = torch.zeros(len(first), dtype=torch.float64)
    return log_distance(PolarGradients(zero, first), PolarGradients(zero, second))
