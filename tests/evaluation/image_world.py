"""A classifier of small images in files, with outliers: what a benchmark needs, in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import nn

from models import cnn, patterns, teach, write_patterns
from torch_grood.data import ImageLoader, ImageTransform, image_loader, read_source
from torch_grood.evaluation.extraction import Sets

# Undoes what `write_patterns` does to the numbers of `patterns`.
AS_PATTERNS = ImageTransform(None, 8, "bilinear", (128 / 255,) * 3, (40 / 255,) * 3)


def write_outliers(folder: Path, n: int, seed: int) -> Path:
    """DIR/*.png of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (n, 8, 8, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    for i, image in enumerate(pixels.numpy()):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


def write_world(folder: Path) -> Path:
    """DIR/{train,val,test}/{a,b,c}/*.png and DIR/{tune,near,far}/*.png."""
    for name, n, seed in (("train", 66, 1), ("val", 30, 2), ("test", 36, 3)):
        write_patterns(folder / name, n, seed)
    for name, n, seed in (("tune", 12, 4), ("near", 24, 5), ("far", 18, 6)):
        write_outliers(folder / name, n, seed)
    return folder


def taught_cnn() -> nn.Module:
    """A network that knows the three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = cnn()
    head = network[-1]
    assert isinstance(head, nn.Linear)
    teach(network, head, *patterns(300, seed=9))
    return network


def loader_of(folder: Path, *, labels: bool = True) -> ImageLoader:
    """Batches of 16."""
    return image_loader(read_source(folder, None, "auto" if labels else "none"), AS_PATTERNS, batch_size=16, workers=0)


def sets_of(folder: Path) -> Sets:
    """All sets of `write_world`."""
    outliers = {name: loader_of(folder / name, labels=False) for name in ("near", "far")}
    own = (loader_of(folder / name) for name in ("train", "val", "test"))
    return Sets(*own, loader_of(folder / "tune", labels=False), outliers)
