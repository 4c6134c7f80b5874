"""A closer look at some of the images: pictures of them, where their gradients lie, and which training images are near.

All images have a score; the few that a page can show are read and passed through the network once more. In a picture of
the gradients H = π·u (eq. 5) a sample has two coordinates of its own, log π and the angle between u and the nearest
direction towards a class prototype, (p_c - p_ood) / ‖p_c - p_ood‖₂; and two on the plane in which the stored training
gradients spread most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from torch_grood._progress import Progress, track
from torch_grood.data.pixels import default_threads
from torch_grood.gradients import PolarGradients
from torch_grood.report.pictures import PICTURE, small

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from torch_grood import GROOD
    from torch_grood.data.transforms import ImageTransform
    from torch_grood.report.sets import ScoredSet
    from torch_grood.state import FittedState

__all__ = ["Closer", "Picked", "Places", "look_closer", "pick_points", "place"]

# Of the training gradients that span the plane.
_PLANE_ROWS = 1000
_BACKGROUND_ROWS = 600
# A longer gradient than so many of the longest of training would leave these no room on the plane.
_LONGEST = 3.0
# Names of more classes would cover each other.
_MOST_NAMED = 20


class Picked(NamedTuple):
    """An image by its set and its position among the images there."""

    set: int
    position: int


@dataclass(frozen=True)
class Closer:
    """Images that were looked at, m of them.

    Attributes:
        pictures: of each, small.
        features: penultimate, (m, d).
    """

    pictures: list[Image]
    features: Tensor


@dataclass(frozen=True)
class Places:
    """Where gradients lie; x and y are float64 (m,), those of the training gradients and prototypes fewer.

    Attributes:
        angle: to the nearest class direction, in degrees.
        log_magnitude: log π.
        plane: coordinates on the plane, (m, 2), in units of the longest training gradient; of three at most.
        training_angle, training_log_magnitude, training_plane: of some stored training gradients.
        class_names, class_plane: names of classes and where their prototypes lie on the plane; none of many.
        variance: share of the training gradients' variance along each axis of the plane.
    """

    angle: NDArray[np.float64]
    log_magnitude: NDArray[np.float64]
    plane: NDArray[np.float64]
    training_angle: NDArray[np.float64]
    training_log_magnitude: NDArray[np.float64]
    training_plane: NDArray[np.float64]
    class_names: tuple[str, ...]
    class_plane: NDArray[np.float64]
    variance: tuple[float, float]


def pick_points(sets: Sequence[ScoredSet], most: int, seed: int) -> list[Picked]:
    """Images of all sets, as evenly as their sizes allow, drawn by seed and in order."""
    generator = np.random.default_rng(seed)
    room, shares = most, {}
    # The smallest first: what it leaves is for the others.
    by_size = sorted(range(len(sets)), key=lambda i: len(sets[i]))
    for left, i in zip(range(len(sets), 0, -1), by_size, strict=True):
        shares[i] = min(len(sets[i]), room // left)
        room -= shares[i]
    return [
        Picked(i, int(position))
        for i in range(len(sets))
        for position in np.sort(generator.choice(len(sets[i]), shares[i], replace=False))
    ]


def look_closer(
    detector: GROOD,
    transform: ImageTransform,
    sets: Sequence[ScoredSet],
    picked: Sequence[Picked],
    *,
    batch_size: int = 64,
    progress: Progress = None,
) -> Closer:
    """Read images once more, and pass them through the network.

    Raises:
        GroodError: for a file that cannot be read any more.
    """

    def read(one: Picked) -> tuple[Image, Tensor]:
        of = sets[one.set]
        image = of.source.image(of.kept[one.position])
        return small(image, PICTURE), transform(image)

    pictures: list[Image] = []

    def batches() -> Iterator[Tensor]:
        with ThreadPoolExecutor(default_threads()) as pool:
            for start in track(range(0, len(picked), batch_size), progress, "look closer"):
                read_here = list(pool.map(read, picked[start : start + batch_size]))
                pictures.extend(picture for picture, _ in read_here)
                yield from _stacks([prepared for _, prepared in read_here])

    if not picked:
        return Closer([], torch.empty(0, detector.fit_info_.n_features))
    return Closer(pictures, detector.extract(batches(), progress=False).features)


def place(state: FittedState, features: Tensor, seed: int) -> Places:
    """Where the gradients of samples lie, and some of the stored ones.

    Args:
        state: of the fitted detector.
        features: penultimate, (m, d).
        seed: of the stored gradients that are drawn.
    """
    stored = state.searcher.gradients
    rows = np.random.default_rng(seed).permutation(len(stored))[:_PLANE_ROWS]
    training = PolarGradients(*(field.cpu() for field in stored.take(torch.from_numpy(rows).to(stored.device))))
    own = state.gradient_field(features.cpu()).gradients
    # One unit for all, in which no length underflows.
    unit = float(training.log_magnitude.max())
    plane = _Plane(training.vectors(unit).double())
    few = PolarGradients(*(field[:_BACKGROUND_ROWS] for field in training))
    directions = _class_directions(state)
    classes = state.class_ids.tolist() if len(state.class_ids) <= _MOST_NAMED else []
    prototypes = state.gradient_field(state.class_prototypes[: len(classes)]).gradients
    return Places(
        angle=_angle(own.direction, directions),
        log_magnitude=own.log_magnitude.numpy(),
        plane=plane(_cut(own, unit).vectors(unit).double()),
        training_angle=_angle(few.direction, directions),
        training_log_magnitude=few.log_magnitude.numpy(),
        training_plane=plane(few.vectors(unit).double()),
        class_names=tuple(str(state.classes[position]) for position in classes),
        class_plane=plane(_cut(prototypes, unit).vectors(unit).double()),
        variance=plane.variance,
    )


def _cut(gradients: PolarGradients, unit: float) -> PolarGradients:
    most = unit + math.log(_LONGEST)
    return gradients._replace(log_magnitude=gradients.log_magnitude.clamp(max=most))


class _Plane:
    """The two principal axes of vectors (n, d); of fewer axes, the others are 0."""

    def __init__(self, vectors: Tensor) -> None:
        self._centre = vectors.mean(0)
        _, spread, axes = torch.linalg.svd(vectors - self._centre, full_matrices=False)
        two = torch.zeros(2, vectors.shape[1], dtype=vectors.dtype)
        two[: len(axes)] = axes[:2]
        # Either sign is as good; this one does not depend on the solver.
        largest = two.gather(1, two.abs().argmax(1, keepdim=True))
        self._axes = two * torch.where(largest < 0, -1.0, 1.0)
        shares = (spread.square() / spread.square().sum().clamp(min=1e-300)).tolist()
        first, second = (*shares, 0.0, 0.0)[:2]
        self.variance = (first, second)

    def __call__(self, vectors: Tensor) -> NDArray[np.float64]:
        found: NDArray[np.float64] = ((vectors - self._centre) @ self._axes.T).numpy()
        return found


def _class_directions(state: FittedState) -> Tensor:
    offset = state.class_prototypes - state.ood_prototype
    directions: Tensor = offset / offset.norm(dim=1, keepdim=True).clamp(min=1e-150)
    return directions


def _angle(direction: Tensor, class_directions: Tensor) -> NDArray[np.float64]:
    """To the nearest class direction, in degrees; 90 for a gradient without direction."""
    cosine = (direction.double() @ class_directions.T).max(1).values.clamp(-1, 1)
    found: NDArray[np.float64] = cosine.acos().rad2deg().numpy()
    return found


def _stacks(images: Sequence[Tensor]) -> Iterator[Tensor]:
    """Batches of images of one size, in order."""
    start = 0
    for end in range(1, len(images) + 1):
        if end == len(images) or images[end].shape != images[start].shape:
            yield torch.stack(list(images[start:end]))
            start = end
