"""A tiny world for the checks: a classifier, images and features, the same bits on every machine.

All weights, images and features are small multiples of a power of two, and so few that float32 holds every product and
every sum of the forward pass exactly. The order of summation then does not matter: an image has the same features
alone, in a batch, on eight threads or on a GPU, and what differs is the detector's doing.
"""

from __future__ import annotations

import functools
import random

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["CHANNELS", "CLASSES", "DIMENSION", "Classifier", "classifier", "features", "images", "seed_process"]

CLASSES = 3
CHANNELS, _SIDE = 2, 4
DIMENSION = 8


class Classifier(nn.Module):
    """Images (n, 2, 4, 4) to logits (n, 3), with what a detector can forget: BatchNorm and dropout.

    Attributes:
        runs: number of forward passes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, 16, 2, stride=2)
        # In eval mode the norm divides by sqrt(0.75 + 0.25) = 1, exactly.
        self.norm = nn.BatchNorm2d(16, eps=0.25)
        self.body = nn.Linear(64, 32)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(32, CLASSES)
        self.runs = 0

    def forward(self, images: Tensor) -> Tensor:
        self.runs += 1
        early = self.norm(self.stem(images)).relu()
        return self.head(self.dropout(self.penultimate(early)))  # type: ignore[no-any-return]

    def penultimate(self, early: Tensor) -> Tensor:
        """Features (n, 32) from early activations."""
        return self.body(early.flatten(1)).relu()  # type: ignore[no-any-return]


@torch.no_grad()
def classifier(scale: float = 1.0, seed: int = 0) -> Classifier:
    """A classifier in eval mode that names the classes of `images`; `scale`, a power of two, is that of its features.

    Its first layers are random, its head compares the features with those of each class's pattern.
    """
    with torch.random.fork_rng(devices=[]):
        model = Classifier().eval()
    generator = torch.Generator().manual_seed(seed)
    for layer, unit in ((model.stem, 1.0), (model.body, 0.125)):
        layer.weight.copy_(torch.randint(-1, 2, layer.weight.shape, generator=generator) * unit)
        layer.bias.zero_()  # type: ignore[union-attr]
    assert model.norm.running_var is not None
    model.norm.running_var.fill_(0.75)
    # argmin ‖h - m_c‖² = argmax m_c·h - ‖m_c‖²/2
    means = (model.penultimate(model.norm(model.stem(_patterns())).relu()) * 2).round() / 2
    model.head.weight.copy_(means / scale)
    model.head.bias.copy_(-means.square().sum(1) / 2)
    model.body.weight.mul_(scale)
    return model


@functools.cache
def _patterns() -> Tensor:
    """What the images of each class have in common, (3, 2, 4, 4)."""
    shape = (CLASSES, CHANNELS, _SIDE, _SIDE)
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(7)) / 2


def images(n: int, seed: int, known: bool = True) -> tuple[Tensor, Tensor]:
    """Images (n, 2, 4, 4) float32 and labels; unknown ones show noise and no pattern."""
    labels = torch.arange(n) % CLASSES
    noise = _noise((n, CHANNELS, _SIDE, _SIDE), 1.5, 4, seed) / 4
    return (_patterns()[labels] if known else 0) + noise, labels


def features(n: int, seed: int, known: bool = True) -> tuple[Tensor, Tensor]:
    """Features (n, 8) float32, exact in bfloat16 too, and labels; unknown ones lie in the midst between the classes."""
    labels = torch.arange(n) % CLASSES
    centres = torch.zeros(CLASSES, DIMENSION)
    centres[:, :CLASSES] = 6 * torch.eye(CLASSES)
    centre = centres[labels] if known else centres.mean(0)
    return centre + _noise((n, DIMENSION), 12.0, 32, seed) / 16, labels


def _noise(shape: tuple[int, ...], deviation: float, largest: int, seed: int) -> Tensor:
    """Whole numbers around 0."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (normal * deviation).round().clamp(-largest, largest)


def seed_process(seed: int) -> None:
    """Set the random states that the whole process shares."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (a detector that draws from it is to be found out)
    random.seed(seed)
