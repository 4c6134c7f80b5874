"""The demo's images, all from inside scikit-learn: handwritten digits, photographs, and noise.

scikit-learn's digits are 32×32 bitmaps of handwriting (UCI, Alpaydin and Kaynak 1998) of which every 4×4 block was
counted, which gives 8×8 images of 0 to 16. Everything else is brought to the same form: 32×32 tiles of the two sample
photographs, in grey, are averaged over 4×4 blocks. All sets are 8-bit grey images, and one transform serves them all,
so that no detector can tell them apart by how they were scaled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_grood._optional import require
from torch_grood.data import ImageTransform

__all__ = ["DigitsData", "ImageSet", "load_digits_data"]

ID_CLASSES = range(6)
N_CALIBRATION = 300
N_TEST = 300
N_FAR = 300

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageSet:
    """Grey 8-bit images.

    Attributes:
        pixels: (n, 8, 8), 0 to 255.
        labels: int64 (n,); the digit, or −1 where there is none.
    """

    pixels: Pixels
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def tensor(self, transform: ImageTransform) -> Tensor:
        """Images as the network takes them, float32 (n, 3, 8, 8): each as its PNG file would be read."""
        image = require("PIL.Image", extra="bench")
        return torch.stack([transform(image.fromarray(pixels).convert("RGB")) for pixels in self.pixels])

    def batches(self, transform: ImageTransform, size: int = 256) -> list[tuple[Tensor, Tensor]]:
        """The set as batches of (images, labels)."""
        images = self.tensor(transform)
        return [
            (images[start : start + size], self.labels[start : start + size]) for start in range(0, len(self), size)
        ]


@dataclass(frozen=True)
class DigitsData:
    """The demo's sets; no image is in two of them.

    Attributes:
        train, calibration, test: the digits 0 to 5 (ID), split at random by the seed.
        near: the digits 6 to 9, all of them.
        photos: tiles of photographs, which do not overlap.
        noise: every pixel uniform on 0 to 255.
    """

    train: ImageSet
    calibration: ImageSet
    test: ImageSet
    near: ImageSet
    photos: ImageSet
    noise: ImageSet

    def items(self) -> Iterator[tuple[str, ImageSet]]:
        """(name, set), in the order of the attributes."""
        yield from vars(self).items()

    def transform(self) -> ImageTransform:
        """What the network is trained with: to 8×8, scaled by the mean and deviation of the training pixels."""
        values = self.train.pixels / 255
        mean, std = float(values.mean()), float(values.std())
        return ImageTransform(resize=8, crop=8, interpolation="box", mean=(mean,) * 3, std=(std,) * 3)


def load_digits_data(seed: int) -> DigitsData:
    """All sets, drawn by `seed`.

    Raises:
        MissingDependencyError: without scikit-learn.
    """
    random = np.random.default_rng(seed)
    digits = require("sklearn.datasets", extra="bench").load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    is_id = np.isin(digits.target, ID_CLASSES)

    def subset(indices: NDArray[np.int64]) -> ImageSet:
        return ImageSet(pixels[indices], labels[indices])

    order = random.permutation(np.flatnonzero(is_id))
    calibration, test, train = np.split(order, [N_CALIBRATION, N_CALIBRATION + N_TEST])
    photos = random.permutation(_photo_tiles())[:N_FAR]
    noise = random.integers(0, 256, size=(N_FAR, 8, 8), dtype=np.uint8)
    return DigitsData(
        train=subset(train),
        calibration=subset(calibration),
        test=subset(test),
        near=subset(np.flatnonzero(~is_id)),
        photos=_unlabelled(photos),
        noise=_unlabelled(noise),
    )


def _photo_tiles() -> Pixels:
    """All 32×32 tiles of scikit-learn's sample photographs, grey, averaged over 4×4 blocks: (n, 8, 8)."""
    image = require("PIL.Image", extra="bench")
    tiles = []
    for photo in require("sklearn.datasets", extra="bench").load_sample_images().images:
        grey = np.asarray(image.fromarray(photo).convert("L"), dtype=np.float64)
        rows, columns = grey.shape[0] // 32, grey.shape[1] // 32
        small = grey[: rows * 32, : columns * 32].reshape(rows * 8, 4, columns * 8, 4).mean(axis=(1, 3))
        tiles.append(small.reshape(rows, 8, columns, 8).swapaxes(1, 2).reshape(-1, 8, 8))
    return np.round(np.concatenate(tiles)).astype(np.uint8)


def _unlabelled(pixels: Pixels) -> ImageSet:
    return ImageSet(pixels, torch.full((len(pixels),), -1))
