"""A detector and its model in PyTorch as a runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from torch_grood import GROOD
from torch_grood.data.transforms import ImageTransform
from torch_grood.errors import GroodError
from torch_grood.runtime.base import Decisions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from torch_grood.neighbors.sharded import ShardFiles

__all__ = ["DetectorRuntime"]


class DetectorRuntime:
    """See `Runtime`.

    Args:
        detector: fitted, with its model.
        transform: of its images.
        fpr: another false-alarm rate than the calibration's.
        tau: the caller's own threshold instead, which promises nothing.

    Raises:
        GroodError: as `GROOD.predict`, for the rate or the threshold.
    """

    # Hooks of the model belong to one pass.
    concurrent = False

    def __init__(
        self, detector: GROOD, transform: ImageTransform, *, fpr: float | None = None, tau: float | None = None
    ) -> None:
        if detector.model is None:
            raise GroodError("the detector has no model; GROOD.load(path, model) gives it one")
        self.detector = detector
        self.transform = transform
        self.classes = tuple(map(str, detector.classes_))
        threshold = detector.threshold_
        if threshold is not None or tau is not None or fpr is not None:
            detector.predict_features(torch.empty(0, detector.fit_info_.n_features), fpr=fpr, tau=tau)
        if threshold is not None and fpr is not None:
            threshold = threshold.at(fpr)
        self._decides = threshold is not None or tau is not None
        self._rate, self._tau = fpr, tau
        self.fpr = threshold.fpr if threshold is not None and tau is None else None
        self.n_calibration = None if threshold is None else threshold.n
        self.class_sizes: Mapping[int, int] | None = None
        if threshold is not None and threshold.groups is not None:
            self.class_sizes = threshold.group_sizes
        self.log_tau: float | None = None
        if tau is not None:
            self.log_tau = float(np.log(tau)) if tau else -np.inf
        elif threshold is not None and threshold.groups is None:
            self.log_tau = threshold.log_tau
        self._device = next((weights.device for weights in detector.model.parameters()), torch.device("cpu"))

    @property
    def shards(self) -> ShardFiles | None:
        """Where the detector's gradients are, if they are in files beside its own."""
        return self.detector.shards_

    def decide(self, pixels: NDArray[np.uint8]) -> Decisions:
        """See `Runtime.decide`."""
        images = self._images(pixels)
        if not self._decides:
            assessed = self.detector.assess(images, progress=False)
            assert assessed.label is not None
            return Decisions(
                assessed.label.numpy(),
                assessed.prototype_label.numpy(),
                assessed.score.numpy(),
                None,
                None,
                assessed.neighbor.numpy(),
            )
        found = self.detector.predict(images, fpr=self._rate, tau=self._tau, progress=False)
        assert found.label is not None
        return Decisions(
            found.label.numpy(),
            found.prototype_label.numpy(),
            found.score.numpy(),
            None if found.p_value is None else found.p_value.numpy(),
            found.is_ood.numpy(),
            found.neighbor.numpy(),
        )

    def neighbors(self, pixels: NDArray[np.uint8], k: int) -> NDArray[np.int64]:
        """See `Runtime.neighbors`."""
        found: NDArray[np.int64] = self.detector.explain(self._images(pixels), k, 1, progress=False).neighbor.numpy()
        return found

    def sample_name(self, sample: int) -> str | None:
        """See `Runtime.sample_name`."""
        return self.detector.sample_names([sample])[0]

    def _images(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        as_tensor = torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device)
        return self.transform.normalise(as_tensor.permute(0, 3, 1, 2).contiguous())
