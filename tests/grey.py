"""A runtime without a network, and small images, for whatever asks a runtime."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from torch_grood.data import ImageTransform
from torch_grood.errors import GroodError
from torch_grood.runtime import Decisions

REFUSED = 250
"""A grey of which `Grey` says that it cannot be decided about."""


class Grey:
    """A `Runtime` whose score is the grey of an image, OOD above 100; it notes the sizes of the batches."""

    concurrent = True
    classes = ("dark", "light")
    transform = ImageTransform(None, None, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    fpr: float | None = 0.1
    log_tau: float | None = None
    n_calibration: int | None = 99
    class_sizes: dict[int, int] | None = None

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.sizes: list[int] = []
        self._before = before

    def decide(self, pixels: NDArray[np.uint8]) -> Decisions:
        self._before()
        score = pixels.mean(axis=(1, 2, 3), dtype=np.float64)
        if (score == REFUSED).any():
            raise GroodError(f"one of {len(pixels)} images has no finite score")
        self.sizes.append(len(pixels))
        label = (score > 127).astype(np.int64)
        return Decisions(label, label, score, (256 - score) / 256, score > 100, np.zeros_like(label))

    def neighbors(self, pixels: NDArray[np.uint8], k: int) -> NDArray[np.int64]:
        return np.tile(np.arange(k), (len(pixels), 1))

    def sample_name(self, sample: int) -> str | None:
        return None


def png(grey: int, size: tuple[int, int] = (4, 4)) -> bytes:
    content = BytesIO()
    Image.new("L", size, grey).save(content, "PNG")
    return content.getvalue()
