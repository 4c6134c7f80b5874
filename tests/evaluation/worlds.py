"""Small classification tasks for tests of methods: clusters that a linear layer tells apart, and what lies off."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_grood.evaluation.outputs import Head, Model, Outputs, World
from torch_grood.outliers import OutlierSource

D, C = 24, 5


class Task:
    """C classes around random centres of non-negative features (n, D), with a linear head.

    Attributes:
        head: the last layer.
    """

    def __init__(self, seed: int = 0, spread: float = 0.7) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.spread = spread
        self.centres = 2.0 * torch.rand(C, D, generator=self.generator)
        # Features that no class uses.
        self.centres[:, -6:] = 0
        weight = self.centres - self.centres.mean(0)
        self.head = Head(weight, -0.5 * self.centres.square().sum(1) + 0.5 * self.centres.square().sum(1).mean())

    def outputs(self, features: Tensor, labels: Tensor | None = None) -> Outputs:
        """What the classifier says of some features."""
        return Outputs(features, features @ self.head.weight.T + self.head.bias, labels)

    def known(self, n: int) -> Outputs:
        """n samples of the classes in turn."""
        labels = torch.arange(n) % C
        noise = self.spread * torch.randn(n, D, generator=self.generator)
        return self.outputs((self.centres[labels] + noise).relu(), labels)

    def unknown(self, n: int) -> Outputs:
        """n samples between the classes, of which the classifier is not sure, with features that no class uses."""
        middle = 0.2 * self.centres.mean(0)
        middle[-6:] = 1
        noise = 0.3 * torch.randn(n, D, generator=self.generator)
        return self.outputs((middle + noise).relu(), torch.full((n,), -1))

    def world(self, n: int = 400) -> World:
        """The task with all that a method may ask for, but the network."""
        return World(
            train=self.known(n), val=self.known(150), head=self.head, outliers=Mixed(self), val_ood=self.unknown(60)
        )


class Mixed:
    """Outliers that are made from features; remembers what was asked for."""

    def __init__(self, task: Task) -> None:
        self.made = task.unknown(40).features
        self.asked: list[tuple[OutlierSource, frozenset[int]]] = []

    def features(self, source: OutlierSource, without: frozenset[int] = frozenset()) -> Tensor:
        """See `OutlierFeatures`."""
        self.asked.append((source, without))
        return self.made


class Images:
    """Images that a score is computed of in batches; remembers under which names."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.names: list[str] = []

    def scores(self, name: str, score: Callable[[Tensor], Tensor]) -> Tensor:
        """See `ImageAccess`."""
        self.names.append(name)
        return torch.cat([score(batch).detach() for batch in self.images.split(7)]).double()


class Cnn(nn.Module):
    """For images (n, 3, 8, 8), with BatchNorm; `features` gives what enters the last layer."""

    def __init__(self, seed: int = 0, width: int = D, classes: int = C) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(3, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            self.head = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        """(n, width)."""
        features: Tensor = self.body(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def image_world(model: Cnn, std: tuple[float, ...] = (0.25, 0.24, 0.26)) -> World:
    """A world of random images, with the network."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(60, 3, 8, 8, generator=generator)
    return World(
        train=image_outputs(model, images, torch.arange(60) % C),
        head=Head(model.head.weight.detach(), model.head.bias.detach()),
        model=Model(model, std),
    )


def image_outputs(model: Cnn, images: Tensor, labels: Tensor | None = None) -> Outputs:
    """What a network says of images, with the images."""
    with torch.no_grad():
        return Outputs(model.features(images), model(images), labels, Images(images))
