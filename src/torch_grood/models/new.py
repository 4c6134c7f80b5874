"""Classifiers to be trained: from random weights, or from others', with a head for the classes at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from torch_grood.errors import GroodError
from torch_grood.models.load import PathLike, maker_of
from torch_grood.models.maker import ModelMaker
from torch_grood.models.weights import read_weights, start_from

if TYPE_CHECKING:
    from torch_grood.data.transforms import ImageTransform

__all__ = ["NewModel", "new_model"]


@dataclass(frozen=True)
class NewModel:
    """A classifier to be trained, in train mode on the CPU.

    Attributes:
        model: the network.
        transform: its own preprocessing; None where only the user knows it.
        spec: the text it came from.
        notes: what the user should hear of, such as a head that starts anew.
    """

    model: nn.Module
    transform: ImageTransform | None
    spec: str
    notes: tuple[str, ...] = ()


def new_model(spec: str, num_classes: int, *, pretrained: bool = False, weights: PathLike | None = None) -> NewModel:
    """Build a classifier to train.

    Random weights are drawn from torch's global generator; who seeds it gets the same weights again.

    Args:
        spec: torchvision:NAME, timm:NAME or a factory, as `torch_grood.models` lists them.
        num_classes: outputs.
        pretrained: start from torchvision's or timm's published weights.
        weights: start from this file instead, in the forms of `load_model`. A head of another number of classes starts
            anew in either case; one of the same number is kept.

    Raises:
        GroodError: if the spec cannot be resolved, the factory fails, or the weights are absent, unsafe or do not fit.
    """
    if num_classes < 1:
        raise GroodError(f"num_classes must be at least 1, not {num_classes}")
    state = None if weights is None else read_weights(Path(weights))
    maker = maker_of(spec)
    notes: tuple[str, ...] = ()
    if state is not None:
        model = _made(maker, num_classes)
        notes = start_from(model, maker.renamed(state), num_classes, spec, str(weights))
    elif pretrained:
        model, notes = maker.adapted(num_classes)
    else:
        model = _made(maker, num_classes)
    model.train()
    return NewModel(model, maker.transform_of(model), spec, notes)


def _made(maker: ModelMaker, num_classes: int) -> nn.Module:
    if maker.takes_classes:
        return maker.make(num_classes)
    model = maker.make()
    # A head's weights and bias have one row a class.
    if not any(tensor.ndim and len(tensor) == num_classes for tensor in model.state_dict().values()):
        raise GroodError(
            f"{maker.spec}: the factory has no parameter num_classes, and its network no tensor of {num_classes} rows, "
            f"as a head for these {num_classes} classes has; give the factory the parameter num_classes"
        )
    return model
