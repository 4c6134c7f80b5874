"""Less is enough: which of the training gradients are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from torch_grood.neighbors.store import GradientStore

__all__ = ["Coverage", "Subset"]


class Coverage(NamedTuple):
    """A choice of stored gradients that stands for all.

    Attributes:
        rows: those that stay, ascending, int64 (n,).
        log_radius: log ε, with ε the largest distance of a gradient that goes to the nearest that stays; -inf if none
            goes but duplicates.
    """

    rows: Tensor
    log_radius: float


class Subset(ABC):
    """Which of the correctly classified training gradients are stored."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Name and arguments, JSON-able."""

    def sample(self, labels: Tensor, keys: Tensor) -> Tensor | None:
        """Rows to store, ascending, chosen before their gradients are known; None: all.

        Args:
            labels: rows of the prototypes, int64 (n,).
            keys: pseudo-random numbers that depend on each sample's content and the seed alone, int64 (n,).
        """
        return None

    def cover(self, store: GradientStore) -> Coverage | None:
        """Choose among gradients; None: all."""
        return None


def make_subset(config: dict[str, Any] | None) -> Subset | None:
    """The subset that `config` describes."""
    if config is None:
        return None
    raise NotImplementedError
