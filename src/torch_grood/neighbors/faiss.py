"""Approximate search by faiss, from any factory string: inverted lists, quantization, graphs.

faiss computes squared L2 distances in float32 by expansion, which cancels, and returns them with 3.4e38 for "nothing
found". Hence the gradients are scaled by one common constant and centred first, faiss only proposes candidates, and
their distances are computed from the gradients themselves. A query for which faiss proposes too few rows (empty
inverted lists) is searched exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_grood._optional import require
from torch_grood.errors import GroodError
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors.base import GradientIndex, GradientSearcher, IndexQuality, Neighbors, nearest_pairs
from torch_grood.neighbors.exact import ExactIndex
from torch_grood.neighbors.store import GradientStore, StoreOptions

__all__ = ["FaissIndex"]

# A query whose magnitude is e^20 times the largest stored one is equally far from all rows in float32.
_LARGEST_QUERY = 20.0


@dataclass(frozen=True)
class FaissIndex(GradientIndex):
    """An index of the faiss library, over re-scored candidates.

    Args:
        factory: faiss factory string, e.g. "IVF1024,Flat" or "OPQ64_128,IVF4096,PQ64".
        parameters: search parameters by their faiss name, e.g. {"nprobe": 16} or {"efSearch": 64}.
        candidates: rows that faiss proposes for each neighbour wanted.
        train_size: gradients, drawn by seed, that a quantizer is trained on at most.
        quality_queries: stored gradients that recall and score inflation are measured on at `build`.
    """

    factory: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    candidates: int = 8
    train_size: int = 500_000
    quality_queries: int = 256

    def __post_init__(self) -> None:
        counts = {"candidates": self.candidates, "train_size": self.train_size, "quality_queries": self.quality_queries}
        for name, value in counts.items():
            if type(value) is not int or value < (name != "quality_queries"):
                raise GroodError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(self.factory, str) or not isinstance(self.parameters, Mapping):
            raise GroodError("a faiss index takes a factory string and a mapping of parameters")
        for name, number in self.parameters.items():
            if not isinstance(name, str) or isinstance(number, bool) or not isinstance(number, (int, float)):
                raise GroodError(f"a search parameter is a name and a number, got {name!r}: {number!r}")

    @property
    def spec(self) -> str:
        """See `GradientIndex.spec`."""
        return self.factory

    def config(self) -> dict[str, Any]:
        """The other arguments, JSON-able."""
        arguments = asdict(self)
        del arguments["factory"]
        return arguments

    def build(self, gradients: PolarGradients | GradientStore, *, seed: int = 0) -> GradientSearcher:
        """See `GradientIndex.build`.

        Raises:
            GroodError: if faiss does not know the factory string or a parameter, or needs more gradients to train on.
        """
        faiss = require("faiss", extra="all")
        stored = GradientStore.of(gradients).to("cpu")
        n, d = len(stored), stored.dim
        if n == 0:
            raise GroodError("there is no gradient to search; no training sample was classified correctly")
        unit = float(stored.log_magnitude.max())
        vectors = stored.take(slice(None)).vectors(unit)
        centre = vectors.mean(0)
        vectors -= centre
        try:
            index = faiss.index_factory(d, self.factory, faiss.METRIC_L2)
            rows = np.random.default_rng(seed).permutation(n)[: self.train_size]
            index.train(vectors.numpy()[np.sort(rows)])
            index.add(vectors.numpy())
            space = faiss.ParameterSpace()
            for name, value in self.parameters.items():
                space.set_index_parameter(index, name, value)
            searcher = _FaissSearcher(self, index, stored, unit, centre)
            searcher.quality = _measure(searcher, self.quality_queries, seed)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise GroodError(
                f"faiss cannot build index {self.factory!r} over {n} gradients of dimension {d}: {reason}. "
                "Use fewer lists or another factory string, or index='exact'."
            ) from error
        return searcher


class _FaissSearcher(GradientSearcher):
    def __init__(self, config: FaissIndex, index: Any, gradients: GradientStore, unit: float, centre: Tensor) -> None:
        self._config = config
        self.gradients = gradients
        self.exact = ExactIndex().build(gradients)
        self._index = index
        self._unit = unit
        self._centre = centre
        self._candidates = config.candidates

    def with_added(self, gradients: PolarGradients, store: StoreOptions, *, seed: int = 0) -> GradientSearcher:
        return self._config.build(self.gradients.extended(gradients, store), seed=seed)

    def with_only(self, rows: Tensor, store: StoreOptions, *, seed: int = 0) -> GradientSearcher:
        return self._config.build(self.gradients.select(rows, store), seed=seed)

    @torch.no_grad()
    def search(self, queries: PolarGradients, k: int = 1) -> Neighbors:
        self._check_k(k)
        queries = PolarGradients(queries.log_magnitude.cpu(), queries.direction.cpu().float())
        clamped = queries._replace(log_magnitude=queries.log_magnitude.clamp(max=self._unit + _LARGEST_QUERY))
        vectors = clamped.vectors(self._unit) - self._centre
        wanted = min(k * self._candidates, len(self.gradients))
        found: npt.NDArray[np.int64] = self._index.search(vectors.numpy(), wanted)[1]
        rows = torch.from_numpy(found)
        enough = (rows >= 0).sum(1) >= k
        log_distance = torch.empty(len(rows), k, dtype=torch.float64)
        row = torch.empty(len(rows), k, dtype=torch.int64)
        if bool(enough.any()):
            chosen = rows[enough]
            query, column = (chosen >= 0).nonzero(as_tuple=True)
            log_distance[enough], row[enough] = nearest_pairs(
                queries.take(enough), self.gradients, query, chosen[query, column], k, 256 * 2**20
            )
        if not bool(enough.all()):
            log_distance[~enough], row[~enough] = self.exact.search(queries.take(~enough), k)
        return Neighbors(log_distance, row)


def _measure(searcher: _FaissSearcher, n_queries: int, seed: int) -> IndexQuality | None:
    """Search stored gradients for their nearest other row, by faiss and exactly."""
    n = len(searcher.gradients)
    n_queries = min(n_queries, n)
    if n < 2 or n_queries < 1:
        return None
    own = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(n)[:n_queries])
    queries = searcher.gradients.take(own)
    distances = []
    for engine in (searcher, searcher.exact):
        found = engine.search(queries, 2)
        is_own = found.row == own[:, None]
        # The query's own row may be missed or, among duplicates, not be listed: then the first is another row.
        other = torch.where(is_own[:, 0], 1, 0)
        distances.append(found.log_distance.gather(1, other[:, None]).flatten())
    approximate, exact = distances
    recall = (approximate == exact).double().mean()
    inflation = torch.where(approximate == exact, 0.0, approximate - exact).exp()
    inflation = inflation[inflation.isfinite()]
    return IndexQuality(float(recall), float(inflation.mean()) if len(inflation) else 1.0, n_queries)
