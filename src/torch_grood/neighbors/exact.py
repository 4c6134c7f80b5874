"""The true nearest gradients, by a filter that is proven to lose none.

Gradients crowd into few directions. Let W (d, m) have orthonormal columns, z(g) = Wᵀg, and ρ(g) = ‖g - WWᵀg‖₂, so that
‖g‖² = ‖z(g)‖² + ρ(g)². By Pythagoras and the reverse triangle inequality,

    ‖q - g‖² = ‖z(q) - z(g)‖² + ‖(q - WWᵀq) - (g - WWᵀg)‖² ≥ ‖z(q) - z(g)‖² + (ρ(q) - ρ(g))²,

a lower bound from m + 1 numbers of each. With a = ‖q‖ and b = ‖g‖, t(q, g) = ‖q - g‖² - a² = b² - 2⟨q, g⟩ orders the
rows for one query, and the bound reads (Cauchy-Schwarz on the residuals)

    t(q, g) ≥ b² - 2⟨z(q), z(g)⟩ - 2ρ(q)ρ(g).

It is one matrix product of the rows (z, ρ, b², b) with the columns (-2z, -2ρ, 1 - γ, -2γa), in which the last terms
make up for rounding: z, ρ and b² are computed in float64 and rounded to float32 once (relative error u = 2⁻²⁴), and a
product of K terms errs by at most (K + 2)u·Σ|xᵢyᵢ| ≤ (K + 2)u·(2ab + b²), again by Cauchy-Schwarz; so γ ≥ (K + 16)u,
the rest of it for float64's own errors, of which ρ, a difference of squares, is also increased by 1e-6 of its
gradient's length. Products that underflow are made up for by one constant.

The search of a batch (stages, each with fewer rows and sharper bounds):

1. A part of the rows, drawn once at random, is scanned for the row with the least bound. Its true distance gives T ≥ t
   of the true neighbour.
2. All rows are scanned in tiles. Where a tile has a new least bound, T is tightened; the rows with a bound ≤ T remain.
   No other row can be nearer than the one that T belongs to.
3. For long gradients the bound is sharpened with more columns of W, for the rows that remain.
4. What remains is compared by its inner product in float32 with proven error (as in `brute`), and what that cannot
   decide, practically one row a query, by `log_distance` in float64. This alone makes the result: it does not depend on
   the tile or the batch, and a score has the same bits for a query alone or among thousands.

The columns of W are the principal directions of the stored gradients; W decides how fast the search is, never what it
finds. How many are used, and whether at all, is decided at `build` from what the bounds let through for some of the
stored gradients. Queries of a scale that float32 cannot hold beside the stored gradients' are searched by brute force.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors.base import GradientIndex, GradientSearcher, Neighbors, nearest_pairs
from torch_grood.neighbors.brute import BruteForce, product_error
from torch_grood.neighbors.store import GradientStore, StoreOptions

__all__ = ["ExactIndex"]

# Below this many numbers, or for more neighbours, brute force is as fast.
_SMALLEST = 2**20
_MOST_NEIGHBORS = 32
# Queries within e^±30 of the largest stored gradient: squares stay well inside float32.
_SCALES = 30.0
_UNDERFLOW = 2.0**-110
_RESIDUAL_MARGIN = 1e-6
_TILE = 2**20
_TILE_ROWS = 2**20
_BLOCKS = 64
_PILOT = 16
_PAIR_BLOCK = 2048
# Widths that make the product's K = m + 3 a multiple of 16.
_WIDTHS = (13, 29, 61, 125, 253)
# The cost of a scanned row beside its products, of a row that remains, and of a number of its, in numbers multiplied.
_ROW, _CANDIDATE, _NUMBER = 16, 4000, 60
_SAMPLE_QUERIES, _SAMPLE_ROWS = 64, 16_384
# Queries from elsewhere are farther from the stored gradients than these are from one another: more rows remain.
_SAMPLE_FACTOR = 2


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


class ExactSearcher(GradientSearcher):
    """See `ExactIndex`.

    Attributes:
        widths: numbers of principal directions that the stages of the filter use; () for brute force.
    """

    def __init__(self, store: GradientStore, index: ExactIndex) -> None:
        self.gradients = store
        self._index = index
        self._brute = BruteForce(store, index.byte_budget)
        self._smallest = functools.cache(lambda k: float(store.log_norm().kthvalue(k).values))
        with torch.no_grad(), torch.autocast(store.device.type, enabled=False):
            self._filter = _make_filter(store, self._brute, index.byte_budget) if index.prune else None
        self.widths: tuple[int, ...] = () if self._filter is None else self._filter.widths

    @property
    def nbytes(self) -> int:
        """Bytes that the filter takes beside the gradients."""
        return 0 if self._filter is None else self._filter.nbytes

    def with_added(self, gradients: PolarGradients, store: StoreOptions, *, seed: int = 0) -> ExactSearcher:
        return ExactSearcher(self.gradients.extended(gradients, store), self._index)

    def with_only(self, rows: Tensor, store: StoreOptions, *, seed: int = 0) -> ExactSearcher:
        return ExactSearcher(self.gradients.select(rows, store), self._index)

    @torch.no_grad()
    def search(self, queries: PolarGradients, k: int = 1) -> Neighbors:
        self._check_k(k)
        device = self.gradients.device
        # Under the caller's autocast the product would be rounded to half precision.
        with torch.autocast(device.type, enabled=False):
            queries = PolarGradients(queries.log_magnitude.to(device), queries.direction.to(device, torch.float32))
            if self._filter is None or k > _MOST_NEIGHBORS:
                return self._brute.search(queries, k)
            scale = queries.log_magnitude.clamp(min=self._smallest(k))
            inside = (scale - self._filter.unit).abs() <= _SCALES
            if bool(inside.all()):
                return self._filter.search(queries, k)
            parts = (self._filter.search(queries.take(inside), k), self._brute.search(queries.take(~inside), k))
            # Where each query's result lies in the two parts together.
            place = torch.empty(len(scale), dtype=torch.int64, device=device)
            place[torch.cat([inside.nonzero().flatten(), (~inside).nonzero().flatten()])] = torch.arange(
                len(scale), device=device
            )
            return Neighbors(*(torch.cat(pair)[place] for pair in zip(*parts, strict=True)))


class _Batch(NamedTuple):
    """Queries in the filter's unit.

    Attributes:
        gradients: as given.
        norm: a, float32 (n,).
        columns: of the first product, float32 (n, m + 3).
        more: of the second stage, float32 (n, m' - m + 2), or None.
    """

    gradients: PolarGradients
    norm: Tensor
    columns: Tensor
    more: Tensor | None

    def take(self, rows: slice) -> _Batch:
        return _Batch(
            self.gradients.take(rows),
            self.norm[rows],
            self.columns[rows],
            None if self.more is None else self.more[rows],
        )


class _Filter:
    """The bounds of all rows, in an order drawn at random.

    Args:
        store: N gradients.
        axes: W, float64 (d, at least the largest width).
        widths: columns of W that the stages use, one or two.
        byte_budget: working memory that a search may take.
    """

    def __init__(self, store: GradientStore, axes: Tensor, widths: tuple[int, ...], byte_budget: int) -> None:
        self.widths = widths
        self.unit = float(store.log_norm().max())
        self._store = store
        self._axes = axes[:, : widths[-1]].contiguous()
        self._byte_budget = byte_budget
        n, m, device = len(store), widths[0], store.device
        self._order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)
        place = torch.empty_like(self._order)
        place[self._order] = torch.arange(n, device=device)
        # Whole blocks: rows of no gradient, with an infinite bound, fill the last.
        self._rows = torch.zeros(-(-n // _BLOCKS) * _BLOCKS, m + 3, device=device)
        self._rows[n:, m + 1] = torch.inf
        self._more = torch.empty(n, widths[1] - m + 2, device=device) if len(widths) > 1 else None
        self._norm = (store.log_norm() - self.unit).exp().float()
        for part in store.chunks():
            z, square = self._project(store.take(part))
            rows = place[part]
            self._rows[rows, :m] = z[:, :m].float()
            self._rows[rows, m] = _residual(z[:, :m], square)
            self._rows[rows, m + 1] = square.float()
            self._rows[rows, m + 2] = square.sqrt().float()
            if self._more is not None:
                self._more[rows, :-2] = z[:, m:].float()
                self._more[rows, -2] = _residual(z, square)
                self._more[rows, -1] = -self._rows[rows, m]
        self._error = _product_error(m + 3)
        self._more_error = 0.0 if self._more is None else _product_error(self._more.shape[1])
        self._full_error = product_error(store.dim)

    @property
    def nbytes(self) -> int:
        tensors = (self._axes, self._order, self._rows, self._more, self._norm)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def _project(self, gradients: PolarGradients) -> tuple[Tensor, Tensor]:
        """Wᵀg and ‖g‖² in float64."""
        direction = gradients.direction.double()
        size = (gradients.log_magnitude - self.unit).exp()
        square = torch.linalg.vector_norm(direction, dim=1).mul_(size).square_()
        return (direction @ self._axes).mul_(size[:, None]), square

    def _batch(self, queries: PolarGradients) -> _Batch:
        m = self.widths[0]
        z, square = self._project(queries)
        norm = square.sqrt().float()
        residual = _residual(z[:, :m], square)
        columns = torch.empty(len(z), m + 3, device=z.device)
        columns[:, :m] = z[:, :m]
        columns[:, m] = residual
        columns[:, : m + 1] *= -2
        columns[:, m + 1] = 1 - self._error
        columns[:, m + 2] = -2 * self._error * norm
        more = None
        if self._more is not None:
            more = torch.cat([z[:, m:].float(), _residual(z, square)[:, None], residual[:, None]], dim=1)
        return _Batch(queries, norm, columns, more)

    def search(self, queries: PolarGradients, k: int) -> Neighbors:
        """The k nearest rows of queries of moderate scale, directions in float32."""
        block = max(1, min(256, self._byte_budget // (16 * 4096)))
        batch = self._batch(queries)
        found = [
            self._search_block(batch.take(slice(start, start + block)), k) for start in range(0, len(batch.norm), block)
        ]
        if len(found) == 1:
            return found[0]
        if not found:
            return self._search_nothing(k)
        return Neighbors(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _search_nothing(self, k: int) -> Neighbors:
        empty = torch.empty(0, k, device=self._store.device)
        return Neighbors(empty.double(), empty.long())

    def _search_block(self, batch: _Batch, k: int) -> Neighbors:
        n_rows, n = len(self._rows), len(batch.norm)
        tile_rows = min(_TILE_ROWS, max(_BLOCKS * k, _TILE // n // _BLOCKS * _BLOCKS))
        # T, and the least bound (of the k-th row) that it was tightened at.
        upper = torch.full_like(batch.norm, torch.finfo(torch.float32).max)
        record = torch.full_like(upper, torch.inf)
        if n_rows > _PILOT * tile_rows:
            for start in range(0, n_rows // _PILOT, tile_rows):
                self._tighten(batch, self._scan(batch, start, tile_rows), start, k, upper, record)
        candidates: list[tuple[Tensor, Tensor, Tensor]] = []
        n_candidates = 0
        most = max(n_rows, self._byte_budget // 64)
        for start in range(0, n_rows, tile_rows):
            lower = self._scan(batch, start, tile_rows)
            least = self._tighten(batch, lower, start, k, upper, record)
            # Few blocks have a row that remains; only these are looked into.
            query, block = (least <= upper[:, None]).nonzero(as_tuple=True)
            inside = lower.view(n, _BLOCKS, -1)[query, :, block]
            pair, place = (inside <= upper[query][:, None]).nonzero(as_tuple=True)
            row = place * least.shape[1] + block[pair]
            candidates.append((query[pair], row + start, inside[pair, place]))
            n_candidates += len(query)
            if n_candidates > most and n > 1:
                # Queries that tie with everything (duplicated rows) are searched in smaller groups.
                halves = (slice(None, n // 2), slice(n // 2, None))
                parts = [self._search_block(batch.take(half), k) for half in halves]
                return Neighbors(*(torch.cat(pair) for pair in zip(*parts, strict=True)))
        query, place, bound = (torch.cat(parts) for parts in zip(*candidates, strict=True))
        return self._decide(batch, query, place, bound, upper, k)

    def _scan(self, batch: _Batch, start: int, tile_rows: int) -> Tensor:
        """Lower bounds of t for one tile, (n, rows of the tile)."""
        rows = self._rows[start : start + tile_rows]
        if len(batch.norm) == 1:
            return torch.mv(rows, batch.columns[0])[None]
        return torch.mm(batch.columns, rows.T)

    def _tighten(self, batch: _Batch, lower: Tensor, start: int, k: int, upper: Tensor, record: Tensor) -> Tensor:
        """Lower T in place by the true distances of a tile's k rows of least bound.

        Returns:
            The least bound of each block.
        """
        blocks = lower.view(len(lower), _BLOCKS, -1)
        least = blocks.amin(1)
        if least.shape[1] < k:
            return least
        near, block = (part[:, None] for part in least.min(1)) if k == 1 else least.topk(k, dim=1, largest=False)
        better = (near[:, -1] < record).nonzero().flatten()
        if len(better) == 0:
            return least
        record[better] = near[better, -1]
        row = block[better]
        # Where in its block each of the rows is.
        row = blocks[better[:, None], :, row].argmin(2) * least.shape[1] + row
        query = better[:, None].expand(-1, k).flatten()
        low, error = self._true_bounds(batch, query, self._order[row.flatten() + start])
        upper[better] = torch.minimum(upper[better], (low + 2 * error).view(-1, k).amax(1))
        return least

    def _true_bounds(self, batch: _Batch, query: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Lower bounds of t of pairs from their inner products, and half of what they may be too low."""
        cos = _pair_products(batch.gradients.direction, self._store, query, row)
        a, b = batch.norm[query], self._norm[row]
        error = (2 * self._full_error) * a * b + 2.0**-20 * b.square() + _UNDERFLOW
        return b.square() - 2 * a * b * cos - error, error

    def _decide(self, batch: _Batch, query: Tensor, place: Tensor, bound: Tensor, upper: Tensor, k: int) -> Neighbors:
        """From the rows that a scan left over to the k nearest."""
        keep = bound <= upper[query]
        query, place, bound = query[keep], place[keep], bound[keep]
        query, order = torch.sort(query, stable=True)
        place, bound = place[order], bound[order]
        if self._more is not None and batch.more is not None:
            dots = _pair_products(batch.more, self._more, query, place)
            length = batch.norm[query] * self._rows[place, -1]
            bound = bound - 2 * dots - (4 * self._more_error) * length - _UNDERFLOW
            keep = bound <= upper[query]
            query, place = query[keep], place[keep]
        row = self._order[place]
        low, error = self._true_bounds(batch, query, row)
        if k == 1:
            upper = upper.scatter_reduce(0, query, low + 2 * error, "amin")
        keep = low <= upper[query]
        return nearest_pairs(batch.gradients, self._store, query[keep], row[keep], k, self._byte_budget)


def _residual(z: Tensor, square: Tensor) -> Tensor:
    """ρ = √(‖g‖² - ‖z‖²), not less than it is, float32."""
    return ((square - z.square().sum(1)).clamp_(min=0).sqrt_() + _RESIDUAL_MARGIN * square.sqrt()).float()


def _product_error(terms: int) -> float:
    """γ of the module's docstring, for the precision that torch multiplies in."""
    return product_error(terms)


def _pair_products(queries: Tensor, rows: Tensor | GradientStore, query: Tensor, row: Tensor) -> Tensor:
    """Inner products of pairs, float32 (p,); `query` is ascending."""
    matrix = rows if isinstance(rows, Tensor) else rows.codes
    if matrix.dtype == torch.float32 and matrix.device.type == "cpu":
        # The product of two matrices at given places only: nothing is gathered, and each row is read once.
        _hush_sparse_warning()
        start = torch.searchsorted(query, torch.arange(len(queries) + 1))
        where = torch.sparse_csr_tensor(
            start, row, matrix.new_zeros(len(row)), (len(queries), len(matrix)), check_invariants=False
        )
        found: Tensor = torch.sparse.sampled_addmm(where, queries, matrix.T, beta=0.0).values()
        return found
    products = [
        (queries[query[part]] * (matrix[row[part]] if isinstance(rows, Tensor) else rows.directions(row[part]))).sum(1)
        for part in (slice(start, start + _PAIR_BLOCK) for start in range(0, len(row), _PAIR_BLOCK))
    ]
    return torch.cat(products) if products else queries.new_zeros(0)


@functools.cache
def _hush_sparse_warning() -> None:
    """torch warns once in a process that its sparse matrices are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))


def _make_filter(store: GradientStore, brute: BruteForce, byte_budget: int) -> _Filter | None:
    """The filter with the widths that cost least, or None if brute force does."""
    n, d = len(store), store.dim
    widths = [m for m in _WIDTHS if m < d]
    if n * d < _SMALLEST or not widths or math.isinf(float(store.log_norm().max())):
        return None
    sample = store.take(_spread(n, max(_SAMPLE_ROWS, 4 * d)).to(store.device))
    unit = float(store.log_norm().max())
    vectors = sample.vectors(unit)
    moments = (vectors.T @ vectors).double()
    if not bool(moments.isfinite().all()):
        return None
    axes = torch.linalg.eigh(moments).eigenvectors.flip(1)
    chosen = _spread(n, _SAMPLE_QUERIES).to(store.device)
    queries = store.take(chosen)
    found = brute.search(queries, 2)
    # A stored gradient's nearest is itself.
    nearest = (torch.where(found.row[:, 0] == chosen, found.log_distance[:, 1], found.log_distance[:, 0]) - unit).exp()
    rows, columns = vectors[:_SAMPLE_ROWS].double() @ axes, queries.vectors(unit).double() @ axes
    share = {m: _share(columns, rows, m, nearest) for m in widths}
    plans = [(m,) for m in widths] + [(m, w) for m in widths for w in widths if w >= 2 * m and d >= 2 * w]
    plan = min(plans, key=lambda plan: _cost(plan, share, n, d))
    if _cost(plan, share, n, d) > n * (d + 2 * _ROW):
        return None
    return _Filter(store, axes, plan, byte_budget)


def _spread(n: int, count: int) -> Tensor:
    """At most `count` of n rows, evenly spread."""
    return torch.linspace(0, n - 1, min(n, count), dtype=torch.float64).round().long()


def _share(queries: Tensor, rows: Tensor, m: int, distance: Tensor) -> float:
    """Share of pairs whose bound with m columns is below the distance of the query's nearest row."""
    of_queries, of_rows = (
        torch.cat([x[:, :m], torch.linalg.vector_norm(x[:, m:], dim=1, keepdim=True)], 1) for x in (queries, rows)
    )
    return float((torch.cdist(of_queries, of_rows) <= distance[:, None]).double().mean())


def _cost(plan: Sequence[int], share: dict[int, float], n: int, d: int) -> float:
    """Numbers multiplied, or what takes as long, for one query."""
    cost = float(n * (plan[0] + _ROW))
    for here, following in zip(plan, (*plan[1:], d), strict=True):
        numbers = following - here if following in plan else d
        cost += _SAMPLE_FACTOR * share[here] * n * (_CANDIDATE + _NUMBER * numbers)
    return cost
