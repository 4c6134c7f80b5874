"""Exact search over gradients in parts: the k nearest of all are among the k nearest of each part.

A distance is made from one query and one stored gradient alone, by differences in float64 (see `pairs`): it has the
same bits whatever lies beside it. So the k nearest of all are the k nearest among the k nearest of each part, and of
equal ones the lowest row comes first, since the parts follow one another as the rows do: no number of parts changes a
bit of a score.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torch_grood.gradients import PolarGradients
from torch_grood.neighbors.base import GradientIndex, GradientSearcher
from torch_grood.neighbors.pairs import Neighbors
from torch_grood.neighbors.store import GradientStore, JoinedStore, StoreOptions

__all__ = ["MergedSearcher", "ShardFile", "ShardFiles", "ShardedSearcher", "merged"]


class ShardFile(NamedTuple):
    """One part of the stored gradients.

    Attributes:
        name: of the file, without a folder.
        n: gradients in it.
        digest: of the file, in hexadecimal: see `torch_grood.container`.
    """

    name: str
    n: int
    digest: str


@dataclass(frozen=True)
class ShardFiles:
    """Where the parts of the stored gradients are.

    Attributes:
        folder: of all of them.
        dim: dimension d of the gradients.
        dtype: of their codes, as `StoreOptions` names it.
        files: in the order of the rows.
    """

    folder: Path
    dim: int
    dtype: str
    files: tuple[ShardFile, ...]


class MergedSearcher(GradientSearcher):
    """Asks a searcher for each part.

    Args:
        shards: the parts.
    """

    def __init__(self, shards: ShardFiles) -> None:
        self.shards = shards

    @abstractmethod
    def _ask(self, queries: PolarGradients, ks: Sequence[int]) -> Sequence[Neighbors]:
        """What each part finds, asked for so many neighbours."""

    def search(self, queries: PolarGradients, k: int = 1) -> Neighbors:
        sizes = [file.n for file in self.shards.files]
        self._check_k(k, sum(sizes))
        queries = PolarGradients(queries.log_magnitude, queries.direction.float())
        return merged(self._ask(queries, [min(k, size) for size in sizes]), sizes, k)


def merged(found: Sequence[Neighbors], sizes: Sequence[int], k: int) -> Neighbors:
    """The k nearest of all parts.

    Args:
        found: of each part the nearest, rows counted from its first, nearest first, of equal ones the lowest row first.
        sizes: gradients in each part.
        k: wanted, no more than there are in all.
    """
    first = torch.tensor([0, *sizes]).cumsum(0)
    distance = torch.cat([part.log_distance.cpu() for part in found], dim=1)
    row = torch.cat([part.row.cpu() + start for part, start in zip(found, first, strict=False)], dim=1)
    order = distance.argsort(dim=1, stable=True)[:, :k]
    return Neighbors(distance.gather(1, order), row.gather(1, order))


class ShardedSearcher(MergedSearcher):
    """Searches all parts in this process; each is opened, memory-mapped, when it is first needed.

    Args:
        shards: the parts.
        index: of each; it makes one of all when gradients are added or removed.
        open_part: the searcher of a part.
    """

    def __init__(
        self,
        shards: ShardFiles,
        index: GradientIndex,
        open_part: Callable[[ShardFile], GradientSearcher],
    ) -> None:
        super().__init__(shards)
        self._index, self._open_part = index, open_part
        self._lock = threading.Lock()
        self._opened: list[GradientSearcher] = []

    @cached_property
    def gradients(self) -> GradientStore:  # type: ignore[override]
        """All of them, as if they were in one place."""
        return JoinedStore([part.gradients for part in self._parts()])

    def _parts(self) -> list[GradientSearcher]:
        with self._lock:
            if not self._opened:
                self._opened = [self._open_part(file) for file in self.shards.files]
            return self._opened

    def _ask(self, queries: PolarGradients, ks: Sequence[int]) -> Sequence[Neighbors]:
        return [part.search(queries, k) for part, k in zip(self._parts(), ks, strict=True)]

    def with_added(self, gradients: PolarGradients, store: StoreOptions, *, seed: int = 0) -> GradientSearcher:
        return self._index.build(self.gradients.extended(gradients, store), seed=seed)

    def with_only(self, rows: Tensor, store: StoreOptions, *, seed: int = 0) -> GradientSearcher:
        return self._index.build(self.gradients.select(rows, store), seed=seed)
