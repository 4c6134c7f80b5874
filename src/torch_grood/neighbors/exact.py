"""Exact search: by bounds that lose no row where this saves work (`filter`), else by brute force (`brute`).

The filter's directions W are the principal ones of the stored gradients. They decide how fast the search is, never what
it finds. How many are used, and whether at all, is decided at `build` from what the bounds let through for some of the
stored gradients, each without itself. Queries of a scale that float32 cannot hold beside that of the stored gradients
are searched by brute force.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors.base import GradientIndex, GradientSearcher
from torch_grood.neighbors.brute import BruteForce
from torch_grood.neighbors.filter import BoundFilter, scan_cost
from torch_grood.neighbors.pairs import Neighbors
from torch_grood.neighbors.store import GradientStore, StoreOptions

__all__ = ["ExactIndex", "ExactSearcher"]

# Below this many numbers, or for more neighbours, brute force is as fast.
_SMALLEST = 2**20
_MOST_NEIGHBORS = 32
# Queries within e^±30 of the largest stored gradient: squares stay well inside float32.
_SCALES = 30.0
# Widths m that make the products' K = m + 3 a multiple of 16.
_WIDTHS = (13, 29, 61, 125, 189, 253)
# The cost of a row that remains, of a number of its, and of a further stage, in the units of `scan_cost`.
_CANDIDATE, _NUMBER, _STAGE = 60_000, 100, 2_000_000
_SAMPLE_QUERIES, _SAMPLE_ROWS, _SAMPLE_BYTES = 64, 16_384, 256 * 2**20
# Queries from elsewhere are farther from the stored gradients than these are from one another: more rows remain. This
# is for OOD queries, so that a filter that seems up to twice as costly as brute force is still worth it for others.
_SAMPLE_FACTOR, _STILL_WORTH = 6, 2
# Bytes of gradients from which on a file keeps the filter, too.
_WORTH_KEEPING = 128 * 2**20
# Up to this dimension all principal directions are computed, beyond only those that may be used.
_ALL_AXES = 1024


@dataclass(frozen=True)
class ExactIndex(GradientIndex):
    """Exact search in torch, on any device.

    Args:
        byte_budget: working memory that a search may take beyond the index.
        device: where the gradients are kept and searched; None: where they come from.
        prune: filter by the bounds where this saves work; False: always brute force.
    """

    byte_budget: int = 256 * 2**20
    device: str | None = None
    prune: bool = True

    @property
    def spec(self) -> str:
        """See `GradientIndex.spec`."""
        return "exact"

    def build(self, gradients: PolarGradients | GradientStore, *, seed: int = 0) -> ExactSearcher:
        """See `GradientIndex.build`; the result of exact search has nothing random."""
        store = GradientStore.of(gradients)
        if len(store) == 0:
            raise GroodError("there is no gradient to search; no training sample was classified correctly")
        return ExactSearcher(store if self.device is None else store.to(self.device), self)

    def restore(self, gradients: GradientStore, tensors: Mapping[str, Tensor]) -> ExactSearcher:
        """The searcher that `GradientSearcher.tensors` was asked of, over the same gradients.

        Args:
            gradients: N gradients, which are not read if there are tensors.
            tensors: of the searcher; none: it is built.

        Raises:
            FormatError: if the tensors are not its own.
        """
        if not tensors:
            return self.build(gradients)
        parts = {name.removeprefix("index."): tensor for name, tensor in tensors.items()}
        found = BoundFilter.restore(gradients, parts, self.byte_budget)
        return self.build(gradients) if found is None else ExactSearcher(gradients, self, found)


class ExactSearcher(GradientSearcher):
    """See `ExactIndex`.

    Attributes:
        widths: numbers of principal directions that the stages of the filter use; () for brute force.
    """

    def __init__(self, store: GradientStore, index: ExactIndex, bounds: BoundFilter | None = None) -> None:
        self.gradients = store
        self._index = index
        self._brute = BruteForce(store, index.byte_budget)
        if bounds is None and index.prune:
            with torch.no_grad(), torch.autocast(store.device.type, enabled=False):
                bounds = _make_filter(store, self._brute, index.byte_budget)
        self._filter = bounds
        self.widths: tuple[int, ...] = () if self._filter is None else self._filter.widths

    def tensors(self) -> dict[str, Tensor]:
        """The filter over many gradients, to be there at once; over few it is made as fast as it is read."""
        if self._filter is None or self.gradients.nbytes < _WORTH_KEEPING:
            return {}
        return {f"index.{name}": tensor for name, tensor in self._filter.tensors().items()}

    @property
    def nbytes(self) -> int:
        """Bytes that the filter takes beside the gradients."""
        return 0 if self._filter is None else self._filter.nbytes

    def with_added(self, gradients: PolarGradients, store: StoreOptions, *, seed: int = 0) -> ExactSearcher:
        return self._index.build(self.gradients.to("cpu").extended(gradients, store), seed=seed)

    def with_only(self, rows: Tensor, store: StoreOptions, *, seed: int = 0) -> ExactSearcher:
        return self._index.build(self.gradients.to("cpu").select(rows, store), seed=seed)

    @torch.no_grad()
    def search(self, queries: PolarGradients, k: int = 1) -> Neighbors:
        self._check_k(k, len(self.gradients))
        device = self.gradients.device
        # Under the caller's autocast the product would be rounded to half precision.
        with torch.autocast(device.type, enabled=False):
            queries = PolarGradients(queries.log_magnitude.to(device), queries.direction.to(device, torch.float32))
            if self._filter is None or k > _MOST_NEIGHBORS:
                return self._brute.search(queries, k)
            scale = queries.log_magnitude.clamp(min=self.gradients.smallest_log_norm(k))
            if len(scale) == 0 or all(abs(float(x) - self._filter.unit) <= _SCALES for x in scale.aminmax()):
                return self._filter.search(queries, k)
            inside = (scale - self._filter.unit).abs() <= _SCALES
            log_distance = torch.empty(len(scale), k, dtype=torch.float64, device=device)
            row = torch.empty(len(scale), k, dtype=torch.int64, device=device)
            log_distance[inside], row[inside] = self._filter.search(queries.take(inside), k)
            log_distance[~inside], row[~inside] = self._brute.search(queries.take(~inside), k)
            return Neighbors(log_distance, row)


def _make_filter(store: GradientStore, brute: BruteForce, byte_budget: int) -> BoundFilter | None:
    """The filter with the widths that cost least, or None if brute force does."""
    n, d = len(store), store.dim
    widths = [m for m in _WIDTHS if m < d and m < n]
    unit = float(store.log_norm().max())
    if n * d < _SMALLEST or not widths or math.isinf(unit):
        return None
    sample = store.take(_spread(n, min(_SAMPLE_ROWS, _SAMPLE_BYTES // (4 * d))).to(store.device)).vectors(unit)
    axes = _principal_axes(sample, widths[-1])
    if not bool(axes.isfinite().all()):
        return None
    chosen = _spread(n, _SAMPLE_QUERIES).to(store.device)
    queries = store.take(chosen)
    found = brute.search(queries, 2)
    # A stored gradient's nearest is itself.
    nearest = (torch.where(found.row[:, 0] == chosen, found.log_distance[:, 1], found.log_distance[:, 0]) - unit).exp()
    share = {m: _share(queries.vectors(unit), sample, axes[:, :m], nearest) for m in widths}
    plans = [(m,) for m in widths] + [(m, w) for m in widths for w in widths if w >= 2 * m and d >= 4 * w]
    costs = {plan: n * scan_cost(plan[0], store.device) + _cost_of_rest(plan, share, n, d) for plan in plans}
    plan = min(costs, key=lambda plan: costs[plan])
    if costs[plan] > _STILL_WORTH * n * (d + 32):
        return None
    return BoundFilter(store, axes, plan, byte_budget)


def _spread(n: int, count: int) -> Tensor:
    """At most `count` of n rows, evenly spread."""
    return torch.linspace(0, n - 1, max(1, min(n, count)), dtype=torch.float64).round().long()


def _principal_axes(vectors: Tensor, count: int) -> Tensor:
    """The first principal directions of vectors (n, d) about the origin, orthonormal float64 (d, at least `count`)."""
    d = vectors.shape[1]
    if d <= _ALL_AXES:
        every: Tensor = torch.linalg.eigh((vectors.T @ vectors).double()).eigenvectors.flip(1)
        return every
    # Subspace iteration; a few rounds do, since the axes need not be exact.
    axes = torch.randn(d, count + 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    axes = axes.to(vectors.device)
    for _ in range(4):
        axes = torch.linalg.qr(vectors.T @ (vectors @ axes)).Q
    inside = (vectors @ axes).double()
    rotation = torch.linalg.eigh(inside.T @ inside).eigenvectors.flip(1)
    principal: Tensor = torch.linalg.qr(axes.double() @ rotation).Q
    return principal


def _share(queries: Tensor, rows: Tensor, axes: Tensor, distance: Tensor) -> float:
    """Share of pairs whose bound is below the distance of the query's nearest row."""
    bounds = []
    for vectors in (queries.double(), rows.double()):
        z = vectors @ axes
        residual = (vectors.square().sum(1) - z.square().sum(1)).clamp(min=0).sqrt()
        bounds.append(torch.cat([z, residual[:, None]], dim=1))
    return float((torch.cdist(bounds[0], bounds[1]) <= distance[:, None]).double().mean())


def _cost_of_rest(plan: Sequence[int], share: dict[int, float], n: int, d: int) -> float:
    """What the rows that remain after each stage take, for one query."""
    cost = float(_STAGE * (len(plan) - 1))
    for here, numbers in zip(plan, (*plan[1:], d), strict=True):
        cost += _SAMPLE_FACTOR * share[here] * n * (_CANDIDATE + _NUMBER * numbers)
    return cost
