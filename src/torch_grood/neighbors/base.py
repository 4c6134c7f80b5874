"""What every index over gradients has in common: the interface, and the distance itself.

Gradients are π·u with log π between -1e4 and 0, so that distances are given as logarithms: no distance underflows, and
the order of the scores is kept at every feature scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors.store import GradientStore, StoreOptions

__all__ = [
    "GradientIndex",
    "GradientSearcher",
    "IndexQuality",
    "Neighbors",
    "log_distance",
    "make_index",
    "nearest_pairs",
]


_SUM_LENGTH = 16_384


class Neighbors(NamedTuple):
    """The k nearest stored gradients of n queries, nearest first; among equal candidates the lowest row first.

    To a query 1e11 times longer than the stored gradients, float64 has them equally far or nearly so: the distance is
    right to the last bits, but which of them is named may depend on the batch.

    Attributes:
        log_distance: log ‖q - g‖₂, float64 (n, k); -inf for a gradient equal to the query.
        row: position in the stored gradients, int64 (n, k).
    """

    log_distance: Tensor
    row: Tensor


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

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= len(self.gradients):
            raise GroodError(
                f"asked for k={k} neighbours among {len(self.gradients)} stored gradients; "
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


def log_distance(queries: PolarGradients, stored: PolarGradients) -> Tensor:
    """Log ‖q - g‖₂ of m pairs of gradients, float64 (m,); -inf where they are equal.

    Computed from the difference of the vectors, in float64, in units of the larger of the two: nothing cancels but what
    the float32 directions have in common, and nothing underflows.
    """
    query_norm, stored_norm = queries.log_norm(), stored.log_norm()
    unit = torch.maximum(query_norm, stored_norm)
    unit.masked_fill_(unit == -torch.inf, 0.0)
    query_size = (query_norm - unit).exp()
    stored_size = (stored_norm - unit).exp()
    difference = queries.direction.double() * query_size[:, None] - stored.direction.double() * stored_size[:, None]
    # In parts: torch splits a lone sum of 32,768 numbers or more among threads, and its bits would depend on the batch.
    parts = torch.split(difference.square_(), _SUM_LENGTH, dim=1)
    return unit + torch.stack([part.sum(1) for part in parts]).sum(0).log_().mul_(0.5)


def nearest_pairs(
    queries: PolarGradients, stored: GradientStore, query: Tensor, row: Tensor, k: int, byte_budget: int
) -> Neighbors:
    """The k nearest of candidate pairs (query, row), at least k of each query, by their true distance.

    Args:
        queries: n gradients.
        stored: N gradients.
        query: int64 (m,), in 0 … n - 1.
        row: int64 (m,), in 0 … N - 1.
        k: neighbours wanted.
        byte_budget: bytes that the differences may take at a time.
    """
    block = max(1, byte_budget // (3 * 8 * stored.dim))
    distance = torch.cat(
        [
            log_distance(queries.take(query[start : start + block]), stored.take(row[start : start + block]))
            for start in range(0, len(query), block)
        ]
    )
    query_, row_, distance_ = query.cpu().numpy(), row.cpu().numpy(), distance.cpu().numpy()
    order = np.lexsort((row_, distance_, query_))
    start = np.searchsorted(query_[order], np.arange(len(queries.log_magnitude)))
    best = torch.from_numpy(order[start[:, None] + np.arange(k)]).to(query.device)
    return Neighbors(distance[best], row[best])
