"""What a classifier says of image sets, and what a method may be fitted on: one extraction serves all methods.

`Outputs` is one image set. A `World` is a classification task with all that a post-hoc method may know of it: the
outputs of training and validation images, the last layer, and where synthetic outliers come from. `World.without`
is the same task with some classes left out, as if they had never been known: their images can then play outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from torch_grood.errors import GroodError
from torch_grood.outliers import OutlierSource

__all__ = ["Head", "ImageAccess", "Model", "OutlierFeatures", "Outputs", "World", "kept_classes"]


class ImageAccess(Protocol):
    """The images of a set, for methods that features do not suffice for."""

    def scores(self, name: str, score: Callable[[Tensor], Tensor]) -> Tensor:
        """Scores of all images, float64 (n,); kept under `name` where features are kept.

        Args:
            name: letters, digits and hyphens; another one for other settings.
            score: from images (b, ...) to (b,).
        """


class OutlierFeatures(Protocol):
    """Where synthetic outliers come from."""

    def features(self, source: OutlierSource, without: frozenset[int] = frozenset()) -> Tensor:
        """Penultimate features (m, d) of a source's outliers, made without the given classes.

        Raises:
            GroodError: if the source needs what is not there.
        """


class Head(NamedTuple):
    """The last layer: logits = features · weightᵀ + bias.

    Attributes:
        weight: (C, d).
        bias: (C,).
    """

    weight: Tensor
    bias: Tensor


class Model(NamedTuple):
    """The network, for methods that run it.

    Attributes:
        module: in eval mode while `ImageAccess.scores` runs it.
        std: of the normalisation, for each channel: a step of 1/255 in an image is 1 / (255 · std) in an input.
    """

    module: nn.Module
    std: tuple[float, ...]


def kept_classes(n_classes: int, left_out: Collection[int]) -> Tensor:
    """The classes that are left, ascending, int64."""
    return torch.tensor([c for c in range(n_classes) if c not in left_out])


@dataclass(frozen=True, eq=False)
class Outputs:
    """What a classifier says of n images.

    Attributes:
        features: (n, d), penultimate.
        logits: (n, C).
        labels: int64 (n,), −1 for OOD; None where they are not known.
        images: the images themselves, if they can be had.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor | None = None
    images: ImageAccess | None = None

    def __post_init__(self) -> None:
        n = len(self.features)
        if self.features.ndim != 2 or self.logits.ndim != 2 or len(self.logits) != n:
            raise GroodError(
                f"expected features (n, d) and logits (n, C), got {tuple(self.features.shape)} and "
                f"{tuple(self.logits.shape)}"
            )
        if self.labels is not None and self.labels.shape != (n,):
            raise GroodError(f"expected one label for each of {n} samples, got {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: Tensor) -> Outputs:
        """Some of the samples, by position or mask; without their images."""
        labels = None if self.labels is None else self.labels[rows]
        return Outputs(self.features[rows], self.logits[rows], labels)

    def of_classes(self, classes: Tensor) -> Outputs:
        """All samples, as a classifier that knows only the given classes sees them: labels become positions in them."""
        labels = None
        if self.labels is not None:
            found, position = (self.labels[:, None] == classes).max(1)
            labels = position.where(found, -1)
        return Outputs(self.features, self.logits[:, classes], labels)


@dataclass(frozen=True, eq=False)
class World:
    """A classification task, for methods to be fitted on.

    Attributes:
        train: outputs of the training images, with labels.
        val: outputs of ID validation images, with labels; None if there are none.
        head: the last layer; None if it is not one linear layer on the features.
        outliers: where synthetic outliers come from; None: nowhere.
        model: for methods that run it; None: features must do.
        val_ood: outputs of real outliers that may be used, as some methods do; None: there are none.
        left_out: the classes that are left out of the original task.
        seed: of everything random.
    """

    train: Outputs
    val: Outputs | None = None
    head: Head | None = None
    outliers: OutlierFeatures | None = None
    model: Model | None = None
    val_ood: Outputs | None = None
    left_out: frozenset[int] = frozenset()
    seed: int = 0

    @property
    def n_classes(self) -> int:
        """C."""
        return self.train.logits.shape[1]

    def without(self, classes: Collection[int]) -> World:
        """The same task without some classes: no sample, logit or weight of theirs is left, nor the network.

        Raises:
            GroodError: if fewer than two classes are left, a class does not exist, or the world is reduced already.
        """
        if self.left_out:
            raise GroodError("leave classes out of the original world, all at once")
        if not set(classes) <= set(range(self.n_classes)) or len(set(classes)) > self.n_classes - 2:
            raise GroodError(
                f"classes {sorted(classes)} cannot be left out of {self.n_classes}: two at least must be left"
            )
        kept = kept_classes(self.n_classes, classes)

        def reduced(outputs: Outputs) -> Outputs:
            outputs = outputs.of_classes(kept)
            assert outputs.labels is not None
            return outputs.take(outputs.labels >= 0)

        return replace(
            self,
            train=reduced(self.train),
            val=None if self.val is None else reduced(self.val),
            head=None if self.head is None else Head(self.head.weight[kept], self.head.bias[kept]),
            model=None,
            val_ood=None,
            left_out=frozenset(classes),
        )
