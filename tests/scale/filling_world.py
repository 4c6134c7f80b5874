"""Features to fill a folder with, by workers that can be sent there, and the fit that takes them from it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from models import taught_cnn, write_patterns
from torch_grood import GROOD
from torch_grood.data import FeatureCache, ImageLoader, ImageTransform, image_loader, read_source
from torch_grood.features import FeatureExtractor
from torch_grood.outliers import OutlierSource
from torch_grood.scale.filling import Filler

# Gives back the patterns that the images were written from.
AS_PATTERNS = ImageTransform(None, 8, "bilinear", (128 / 255,) * 3, (40 / 255,) * 3)
N, BATCH = 150, 4


def write_photos(folder: Path) -> Path:
    """`train` with N images, `held_out` with 30."""
    write_patterns(folder / "train", N, 1)
    write_patterns(folder / "held_out", 30, 2)
    return folder


def network() -> nn.Module:
    return taught_cnn()


def loader(folder: Path) -> ImageLoader:
    return image_loader(read_source(folder), AS_PATTERNS, batch_size=BATCH, workers=0)


class MakeFiller:
    """For a worker."""

    def __init__(
        self, images: Path, cache: Path, classes: list[str] | None = None, source: OutlierSource | None = None
    ) -> None:
        self.images, self.cache, self.classes, self.source = images, cache, classes, source

    def __call__(self) -> Filler:
        torch.set_num_threads(1)
        extractor, images = FeatureExtractor(network()), loader(self.images)
        return Filler(extractor, images, FeatureCache(self.cache), self.classes, self.source)


def fitted(
    photos: Path, cache: Path | None, classes: list[str] | None = None, source: OutlierSource | None = None
) -> bytes:
    """The file of a detector."""
    kept = None if cache is None else FeatureCache(cache)
    detector = GROOD(network(), source).fit(loader(photos / "train"), classes=classes, cache=kept, progress=False)
    detector.calibrate(loader(photos / "held_out"), fpr=0.2, cache=kept, progress=False)
    path = photos / "new.grood"
    detector.save(path)
    return path.read_bytes()
