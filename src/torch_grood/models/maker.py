"""What makes the networks of one spec; torchvision, timm and users' factories each have their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.data.transforms import ImageTransform

__all__ = ["ModelMaker", "own_classes"]


class ModelMaker(ABC):
    """Makes networks.

    Attributes:
        spec: the text that it comes from.
        names_classes: there is a parameter for the number of classes.
        takes_classes: a number of classes may be given; not so only for a factory that fixes it.
        needs_classes: it must be given.
    """

    names_classes = True
    takes_classes = True
    needs_classes = False

    def __init__(self, spec: str) -> None:
        self.spec = spec

    @abstractmethod
    def make(self, num_classes: int | None = None) -> nn.Module:
        """The network with random weights, or as its factory makes it.

        Raises:
            GroodError: if it cannot be made so.
        """

    @abstractmethod
    def published(self, num_classes: int | None = None) -> tuple[nn.Module, tuple[str, ...] | None]:
        """The network with its published weights, where there are any, and the names of its classes, if known.

        Raises:
            GroodError: if the weights cannot be had; the message says where to put which file.
        """

    @abstractmethod
    def adapted(self, num_classes: int) -> tuple[nn.Module, tuple[str, ...]]:
        """The network with its published weights, but for a head of another number of classes, and notes on it.

        Raises:
            GroodError: if there are none, or they cannot be had.
        """

    @abstractmethod
    def transform_of(self, model: nn.Module) -> ImageTransform | None:
        """The preprocessing of a network that this made, if it is known."""

    def renamed(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights under the names that the network has today."""
        return state


def own_classes(spec: str) -> GroodError:
    """The error for a number of classes where published weights bring theirs."""
    return GroodError(
        f"{spec}: the pretrained weights have their own number of classes; leave num_classes (--num-classes) "
        "out, or pass your own weights (--weights)"
    )
