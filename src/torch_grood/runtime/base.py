"""What a runtime is asked, and what it answers; numpy alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from torch_grood.data.transforms import ImageTransform

__all__ = ["Decision", "Decisions", "Runtime", "decide_each"]


class Decisions(NamedTuple):
    """About n images; every field is an array (n,), the fields those of `torch_grood.Prediction`.

    Attributes:
        label: the classifier's class, a position in `Runtime.classes`, int64.
        prototype_label: class of the nearest prototype, int64.
        score: S(x), float64, higher = more OOD.
        p_value: conformal p-value, float64; None without a calibration.
        is_ood: the decision, bool; None without a threshold.
        neighbor: position in the training set of the sample with the nearest gradient, int64.
    """

    label: NDArray[np.int64]
    prototype_label: NDArray[np.int64]
    score: NDArray[np.float64]
    p_value: NDArray[np.float64] | None
    is_ood: NDArray[np.bool_] | None
    neighbor: NDArray[np.int64]


class Decision(NamedTuple):
    """About one image: the fields of `Decisions`."""

    label: int
    prototype_label: int
    score: float
    p_value: float | None
    is_ood: bool | None
    neighbor: int


class Runtime(Protocol):
    """Decides about images that are read and prepared.

    Attributes:
        concurrent: whether several threads may call at once; else one call at a time.
        classes: names of the classifier's classes.
        transform: of its images.
        fpr: false-alarm rate that `is_ood` promises; None if it promises none.
        log_tau: log of the threshold; None if there is none, or one for each class.
        n_calibration: images that the p-values rest on; None without a calibration.
        class_sizes: of these, how many of each class; None unless each class has a threshold of its own, by the nearest
            prototype.
    """

    concurrent: bool
    classes: tuple[str, ...]
    transform: ImageTransform
    fpr: float | None
    log_tau: float | None
    n_calibration: int | None
    class_sizes: Mapping[int, int] | None

    def decide(self, pixels: NDArray[np.uint8]) -> Decisions:
        """Decide about images.

        Args:
            pixels: (n, H, W, 3), as `ImageTransform.pixels` gives them, all of one size.

        Raises:
            GroodError: for pixels of another size than the detector's, or an image without finite features.
        """
        ...

    def neighbors(self, pixels: NDArray[np.uint8], k: int) -> NDArray[np.int64]:
        """Positions of the training samples with the nearest gradients, nearest first, (n, at most k).

        Args:
            pixels: as of `decide`.
            k: wanted; what a runtime cannot find is left out.

        Raises:
            GroodError: as `decide`.
        """
        ...

    def sample_name(self, sample: int) -> str | None:
        """Name of a training sample, such as `Decisions.neighbor` names; None where none was kept."""
        ...


def decide_each(runtime: Runtime, images: Sequence[NDArray[np.uint8]]) -> list[Decision | GroodError]:
    """Decide about images (H, W, 3) of any sizes, those of one size together.

    Returns:
        Of each image the decision, or why there is none: one that cannot be decided about takes no other with it.
    """
    found: dict[int, Decision | GroodError] = {}
    by_shape: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, image in enumerate(images):
        by_shape[image.shape].append(i)
    for alike in by_shape.values():
        found |= zip(alike, _decided(runtime, [images[i] for i in alike]), strict=True)
    return [found[i] for i in range(len(images))]


def _decided(runtime: Runtime, alike: Sequence[NDArray[np.uint8]]) -> Sequence[Decision | GroodError]:
    try:
        decisions = runtime.decide(np.stack(alike))
    except GroodError as error:
        if len(alike) == 1:
            return [error]
        return [decision for image in alike for decision in _decided(runtime, [image])]
    columns = [[None] * len(alike) if field is None else field.tolist() for field in decisions]
    return [Decision(*row) for row in zip(*columns, strict=True)]
