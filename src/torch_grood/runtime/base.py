"""What a runtime is asked, and what it answers; numpy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from torch_grood.data.transforms import ImageTransform

__all__ = ["Decisions", "Runtime"]


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


class Runtime(Protocol):
    """Decides about images that are read and prepared.

    One call at a time: what it holds is not made for several threads at once.

    Attributes:
        classes: names of the classifier's classes.
        transform: of its images.
        fpr: false-alarm rate that `is_ood` promises; None if it promises none.
        log_tau: log of the threshold; None if there is none, or one for each class.
        n_calibration: images that the p-values rest on; None without a calibration.
    """

    classes: tuple[str, ...]
    transform: ImageTransform
    fpr: float | None
    log_tau: float | None
    n_calibration: int | None

    def decide(self, pixels: NDArray[np.uint8]) -> Decisions:
        """Decide about images.

        Args:
            pixels: (n, H, W, 3), as `ImageTransform.pixels` gives them, all of one size.

        Raises:
            GroodError: for pixels of another size than the detector's, or an image without finite features.
        """
        ...

    def sample_name(self, sample: int) -> str | None:
        """Name of a training sample, such as `Decisions.neighbor` names; None where none was kept."""
        ...
