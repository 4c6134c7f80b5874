"""What every index over gradients has in common: the interface.

Gradients are π·u with log π between -1e4 and 0, so that distances are given as logarithms: no distance underflows, and
the order of the scores is kept at every feature scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors.pairs import Neighbors
from torch_grood.neighbors.store import GradientStore, StoreOptions

__all__ = [
    "GradientIndex",
    "GradientSearcher",
    "IndexQuality",
    "make_index",
]


@dataclass(frozen=True)
class IndexQuality:
    """How near an approximate index comes to exact search, on stored gradients with their own row left out.

    Attributes:
        recall_at_1: share of queries whose true nearest gradient was found.
        score_inflation: mean of distance found / true distance, 1 for exact search.
        n_queries: queries that were measured.
    """

    recall_at_1: float
    score_inflation: float
    n_queries: int


class GradientSearcher(ABC):
    """An index over stored gradients.

    Attributes:
        gradients: the stored gradients.
        quality: measured at `build`, None for exact search.
    """

    gradients: GradientStore
    quality: IndexQuality | None = None

    @abstractmethod
    def search(self, queries: PolarGradients, k: int = 1) -> Neighbors:
        """Find the k nearest stored gradients of each query.

        Args:
            queries: n gradients; directions are rounded to float32, as the stored ones are.
            k: 1 ≤ k ≤ N.

        Raises:
            GroodError: for k out of range.
        """

    @abstractmethod
    def with_added(self, gradients: PolarGradients, store: StoreOptions, *, seed: int = 0) -> GradientSearcher:
        """A searcher that has more gradients at the end; this one is unchanged."""

    @abstractmethod
    def with_only(self, rows: Tensor, store: StoreOptions, *, seed: int = 0) -> GradientSearcher:
        """A searcher over the given rows, ascending int64 (n,); this one is unchanged."""

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps of the index beside the gradients, by name; {} where there is nothing."""
        return {}

    @staticmethod
    def _check_k(k: int, n: int) -> None:
        """Check that so many of n stored gradients can be asked for."""
        if not 1 <= k <= n:
            raise GroodError(
                f"asked for k={k} neighbours among {n} stored gradients; "
                "k must be at least 1 and at most the number stored"
            )


class GradientIndex(ABC):
    """Configuration of an index; immutable, so that it can be a default argument and be stored in a file."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """The string that `make_index` takes."""

    @abstractmethod
    def build(self, gradients: PolarGradients | GradientStore, *, seed: int = 0) -> GradientSearcher:
        """Index N ≥ 1 gradients: log_magnitude float64 (N,), direction float32 (N, d), or a store of them."""


def make_index(index: str | GradientIndex) -> GradientIndex:
    """Return the index for "exact", or for a faiss factory string such as "IVF1024,Flat"."""
    from torch_grood.neighbors.exact import ExactIndex
    from torch_grood.neighbors.faiss import FaissIndex

    if isinstance(index, GradientIndex):
        return index
    if not isinstance(index, str) or not index.strip():
        raise GroodError(f"index must be 'exact', a faiss factory string or a GradientIndex, got {index!r}")
    return ExactIndex() if index == "exact" else FaissIndex(index)
