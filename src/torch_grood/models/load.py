"""Trained classifiers: a network, its weights and its preprocessing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from torch_grood.errors import GroodError
from torch_grood.models.from_factory import FactoryMaker
from torch_grood.models.from_run import is_run, read_run
from torch_grood.models.from_timm import TimmMaker
from torch_grood.models.from_torchvision import TorchvisionMaker
from torch_grood.models.maker import ModelMaker
from torch_grood.models.spec import split_spec
from torch_grood.models.weights import classes_in, load_exactly, read_weights

if TYPE_CHECKING:
    from torch_grood.data.transforms import ImageTransform

__all__ = ["LoadedModel", "PathLike", "load_model", "maker_of"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class LoadedModel:
    """A classifier, in eval mode on the CPU.

    Attributes:
        model: the network.
        transform: its own preprocessing; None where only the user knows it (factories).
        spec: the text it came from; of a training's folder, that of the network it trained.
        classes: names of its outputs, or None if they are not known.
    """

    model: nn.Module
    transform: ImageTransform | None
    spec: str
    classes: tuple[str, ...] | None = None


def load_model(spec: str, weights: PathLike | None = None, num_classes: int | None = None) -> LoadedModel:
    """Build a classifier and load its weights.

    Args:
        spec: one of the forms that `torch_grood.models` lists.
        weights: a .safetensors file, or a state dict saved with torch.save, bare or under "state_dict" or "model".
            Without it, torchvision's and timm's networks load their published weights, a factory's network stays as
            the factory made it, and a training's has the weights in its folder; the file takes the place of these
            only, so that preprocessing and classes are still the training's.
        num_classes: outputs of the network. By default taken from the weights where the factory has such a parameter.

    Returns:
        The network; its transform is that of torchvision's or timm's published weights even if `weights` are your own.

    Raises:
        GroodError: if the spec cannot be resolved, the factory fails, or the weights are absent, unsafe or do not fit.
    """
    if num_classes is not None and num_classes < 1:
        raise GroodError(f"num_classes must be at least 1, not {num_classes}")
    if is_run(spec):
        return _load_run(Path(spec), weights, num_classes)
    state = None if weights is None else read_weights(Path(weights))
    maker = maker_of(spec)
    if state is None:
        model, classes = maker.published(num_classes)
    else:
        model, classes = _with_weights(maker, state, num_classes, str(weights)), None
    model.eval()
    return LoadedModel(model, maker.transform_of(model), spec, classes)


def maker_of(spec: str) -> ModelMaker:
    """What makes the networks of a spec.

    Raises:
        GroodError: if the spec cannot be resolved.
    """
    kind, name = split_spec(spec)
    if kind == "torchvision":
        return TorchvisionMaker(spec, name)
    if kind == "timm":
        return TimmMaker(spec, name)
    return FactoryMaker(spec, kind, name)


def _load_run(folder: Path, weights: PathLike | None, num_classes: int | None) -> LoadedModel:
    run = read_run(folder)
    if num_classes not in (None, run.num_classes):
        raise GroodError(f"{folder} has {run.num_classes} classes, not {num_classes}; leave --num-classes out")
    file = run.weights if weights is None else Path(weights)
    if weights is None and not file.is_file():
        raise GroodError(f"{folder} has no {file.name} yet; go on with its training, which writes it after each epoch")
    state = read_weights(file)
    run.check_weights(state, str(file))
    model = _with_weights(maker_of(run.spec), state, run.num_classes, str(file))
    model.eval()
    return LoadedModel(model, run.transform, run.spec, run.classes)


def _with_weights(maker: ModelMaker, state: Mapping[str, Tensor], num_classes: int | None, origin: str) -> nn.Module:
    """The network with these weights, and as many outputs as they have."""
    state = maker.renamed(state)
    first = num_classes
    if first is None and maker.needs_classes:
        # The head is usually last; if not, the comparison below corrects it.
        first = next((len(tensor) for tensor in reversed(list(state.values())) if tensor.ndim > 1), 1)
    model = maker.make(first)
    if num_classes is None and maker.names_classes:
        inferred = classes_in(state, model)
        if inferred is not None:
            model = maker.make(inferred)
    load_exactly(model, state, maker.spec, origin)
    return model
