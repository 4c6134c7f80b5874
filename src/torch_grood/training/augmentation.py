"""What of a training image the network sees: windows and mirror images, each drawn by (seed, epoch, position).

A draw is a function of these three numbers and of nothing else. So the order of the batches, the number of worker
processes and of training processes, and a kill in between change no pixel, and nothing random has to be stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from torch_grood._optional import require
from torch_grood.data.transforms import ImageTransform
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["Augmentation", "uniforms"]

# torchvision's RandomResizedCrop: ratios of width to height, and how often it tries to find a window.
_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10
_DRAWS_A_TRY = 4
# Of each image: one for the mirror, then those of the window.
_DRAWS = 1 + _TRIES * _DRAWS_A_TRY


def uniforms(seed: int, epoch: int, positions: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), (n, 41), the same for a position whatever the others are.

    SplitMix64 (Steele, Lea, Flood 2014), whose k-th number is a hash of k and needs none before it.
    """
    key = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    counters = np.asarray(positions, dtype=np.uint64)[:, None] * np.uint64(_DRAWS) + np.arange(
        1, _DRAWS + 1, dtype=np.uint64
    )
    x = key + counters * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    uniform: NDArray[np.float64] = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


@dataclass(frozen=True)
class Augmentation:
    """From an image to the pixels of one epoch.

    Attributes:
        transform: the evaluation's preprocessing, which gives the size.
        crop: "none", "padded" or "resized", as in `Recipe`.
        padding: of "padded".
        min_area: of "resized".
        flip: mirror half of the images.
        seed: of the draws.

    Raises:
        GroodError: if the transform has no fixed size, which a batch needs.
    """

    transform: ImageTransform
    crop: str = "none"
    padding: int = 0
    min_area: float = 0.08
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.transform.output_size is None:
            raise GroodError(
                f"training needs images of one size, and the preprocessing leaves it open ({self.transform}); give it "
                "a crop"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every result."""
        assert self.transform.output_size is not None
        return self.transform.output_size

    @property
    def acts_on_pixels(self) -> bool:
        """Whether it needs of an image no more than its pixels in evaluation, so that these can be kept."""
        return self.crop != "resized"

    @property
    def margin(self) -> int:
        """Pixels of black on each side of what `windows` cuts from."""
        return self.padding if self.crop == "padded" else 0

    def windows(
        self, epoch: int, positions: Sequence[int] | NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """For images with a margin: the windows' top and left, in 0 … 2 · margin, and whether to mirror; (n,) each."""
        draws = uniforms(self.seed, epoch, positions)
        top, left = (np.floor(draws[:, k] * (2 * self.margin + 1)).astype(np.int64) for k in (1, 2))
        return top, left, (draws[:, 0] < 0.5) & self.flip

    def __call__(self, image: Image, epoch: int, position: int) -> NDArray[np.uint8]:
        """The pixels (H, W, 3) of one image in one epoch.

        Raises:
            GroodError: if the image cannot be transformed.
        """
        if self.acts_on_pixels:
            (top,), (left,), (mirrored,) = self.windows(epoch, [position])
            margins = ((self.margin, self.margin), (self.margin, self.margin), (0, 0))
            height, width = self.size
            pixels = np.pad(self.transform.pixels(image), margins)[top : top + height, left : left + width]
        else:
            draws = uniforms(self.seed, epoch, [position])[0]
            box = _window(image.width, image.height, self.min_area, draws[1:])
            resampling = require("PIL.Image", extra="vision").Resampling[self.transform.interpolation.upper()]
            # Not resize(box=…), whose filter also reads the pixels around the window.
            pixels = np.array(image.crop(box).resize(self.size[::-1], resampling))
            mirrored = self.flip and draws[0] < 0.5
        return np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)


def _window(width: int, height: int, min_area: float, draws: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a window of `min_area` to all of the area, as torchvision's RandomResizedCrop.

    The share of the area is uniform, the ratio of the sides log-uniform; the first of ten tries that fits is taken.
    """
    low, high = (math.log(ratio) for ratio in _RATIOS)
    for area_draw, ratio_draw, top_draw, left_draw in draws.reshape(_TRIES, _DRAWS_A_TRY):
        area = width * height * (min_area + area_draw * (1 - min_area))
        ratio = math.exp(low + ratio_draw * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = math.floor(left_draw * (width - w + 1)), math.floor(top_draw * (height - h + 1))
            return left, top, left + w, top + h
    # A very long image: the largest window in the middle whose ratio is allowed.
    ratio = min(max(width / height, _RATIOS[0]), _RATIOS[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + max(w, 1), top + max(h, 1)
