"""How a benchmark is run: checkpoints, their classifiers, methods, and what can be known to be wrong beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn

from torch_grood.data import ImageTransform
from torch_grood.data.dataset import OnBad
from torch_grood.errors import GroodError
from torch_grood.evaluation.choice import ChooseBy
from torch_grood.evaluation.image_sets import ResolvedSets
from torch_grood.evaluation.methods import Method

__all__ = ["Checkpoint", "Classifier", "Settings", "check_settings"]

_FEWEST_DRAWS = 40
_FEWEST_CLASSES = 3


class Checkpoint(NamedTuple):
    """One run.

    Attributes:
        weights: file of the network's weights; None: as the model is made.
        seed: of what is random in methods.
    """

    weights: Path | None
    seed: int


class Classifier(NamedTuple):
    """A network that is ready to run.

    Attributes:
        model: on its device.
        transform: its preprocessing.
        spec: how it was made, for the record.
    """

    model: nn.Module
    transform: ImageTransform
    spec: str


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    Attributes:
        methods: to compare; the first GROOD among them is tested against all others.
        by: how hyper-parameters are chosen; None: they are as given.
        draws: of the bootstrap; 0: intervals of the AUROC only, by DeLong.
        batch_size, workers, on_bad: see `image_loader`.
        head, early_layer: of the model; found if None.
    """

    methods: tuple[Method, ...]
    by: ChooseBy | None = None
    draws: int = 1000
    batch_size: int = 64
    workers: int | None = None
    on_bad: OnBad = "raise"
    head: str | None = None
    early_layer: str | None = None


def check_settings(sets: ResolvedSets, checkpoints: Sequence[Checkpoint], settings: Settings) -> None:
    """Find out before the network runs what cannot work.

    Raises:
        GroodError: if it cannot.
    """
    if not settings.methods or not checkpoints:
        raise GroodError("a benchmark needs a method and a checkpoint at least")
    if 0 < settings.draws < _FEWEST_DRAWS:
        raise GroodError(
            f"an interval of 95 % needs {_FEWEST_DRAWS} bootstrap draws at least, got {settings.draws}; 1000 are "
            "usual, 0 leaves the bootstrap out"
        )
    if settings.by is not None and sets.val is None:
        raise GroodError(
            f"hyper-parameters are to be chosen by {settings.by}, which needs ID validation images, and "
            f"{sets.spec.name} has none; name them in id.val, or take the methods as they are"
        )
    if settings.by is ChooseBy.validation_ood and sets.val_ood is None:
        raise GroodError(
            f"hyper-parameters are to be chosen on validation outliers, and {sets.spec.name} has none here; name them "
            "in val_ood, or choose by held-out classes"
        )
    if settings.by is ChooseBy.held_out_classes and len(set(sets.train.source.labels or ())) < _FEWEST_CLASSES:
        raise GroodError(
            f"held-out classes need {_FEWEST_CLASSES} classes at least, and the training images of {sets.spec.name} "
            "have fewer; choose on validation OOD images, or take the methods as they are"
        )
    if settings.by is ChooseBy.held_out_classes and sets.val and len(set(sets.val.source.labels or ())) < 2:
        raise GroodError(
            f"held-out classes need validation images of two classes at least, and those of {sets.spec.name} have "
            "fewer; name more in id.val, choose on validation OOD images, or take the methods as they are"
        )
