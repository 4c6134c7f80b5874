"""Candidates for the nearest gradients, by bounds that are proven to lose none.

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
gradient's length. What underflows, K products of 2⁻¹²⁶ times 1 or 2a at most, is less than 2⁻¹¹⁰(1 + a). On a
processor that multiplies bfloat16 several times faster, wide products are made of it: both factors and the result are
rounded to u = 2⁻⁸, γ is 3u larger, and a few more rows remain.

The search of a batch (stages, each with fewer rows and sharper bounds):

1. A part of the rows, drawn once at random, is scanned for the row with the least bound. Its true distance gives T ≥ t
   of the true neighbour.
2. All rows are scanned in tiles. Where a tile has a new least bound, T is tightened; the rows with a bound ≤ T remain.
   No other row can be nearer than the one that T belongs to.
3. For long gradients the bound is sharpened with more columns of W, for the rows that remain.
4. What remains is compared by its inner product in float32 with proven error, and what that cannot decide, practically
   one row a query, by differences in float64 (see `pairs`). This alone makes the result: it does not depend on the tile
   or the batch, and a score has the same bits for a query alone or among thousands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from torch_grood.errors import FormatError
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors.pairs import Neighbors, bound_error, nearest_pairs, pair_products, product_error
from torch_grood.neighbors.store import GradientStore

__all__ = ["BoundFilter", "scan_cost"]

_RESIDUAL_MARGIN = 1e-6
# Bounds computed at a time.
_TILE = 2**20
_TILE_ROWS = 2**20
_TILE_QUERIES = 256
# Rows are looked at in blocks of this many, by the least bound of the block.
_BLOCKS = 64
# Of so many rows, one is in the part that is scanned first.
_PILOT = 16
# From this many directions on, products in bfloat16 save more than their rounding lets through.
_WIDE = 125


class _Batch(NamedTuple):
    """Queries in the filter's unit.

    Attributes:
        gradients: as given.
        norm: a, float32 (n,).
        columns: of the first product, (n, m + 3).
        more: (z, ρ) of the second stage, float32 (n, m' + 1), or None.
        more_error: γ of the second stage.
        full_error: γ of whole inner products.
    """

    gradients: PolarGradients
    norm: Tensor
    columns: Tensor
    more: Tensor | None
    more_error: float
    full_error: float

    def take(self, rows: slice) -> _Batch:
        return _Batch(
            self.gradients.take(rows),
            self.norm[rows],
            self.columns[rows],
            None if self.more is None else self.more[rows],
            self.more_error,
            self.full_error,
        )


def scan_cost(m: int, device: torch.device) -> float:
    """What the bound of one row takes with m directions, in numbers that are multiplied as float32 meanwhile."""
    return 0.3 * m + 28 if _in_bfloat16(m, device) else m + 16


class BoundFilter:
    """The bounds of all rows, in an order drawn at random.

    Args:
        store: N gradients.
        axes: W, float64 (d, at least the largest width).
        widths: columns of W that the stages use, one or two.
        byte_budget: working memory that a search may take.
    """

    def __init__(self, store: GradientStore, axes: Tensor, widths: tuple[int, ...], byte_budget: int) -> None:
        self._set_up(store, axes[:, : widths[-1]].contiguous(), widths, byte_budget)
        n, m, device = len(store), widths[0], store.device
        self._order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)
        place = torch.empty_like(self._order)
        place[self._order] = torch.arange(n, device=device)
        # Whole blocks: rows of no gradient, with an infinite bound, fill the last.
        self._dtype = torch.bfloat16 if _in_bfloat16(m, device) else torch.float32
        self._rows = torch.zeros(_padded(n), m + 3, dtype=self._dtype, device=device)
        self._rows[n:, m + 1] = torch.inf
        self._more = torch.empty(n, widths[1] + 1, dtype=torch.float32, device=device) if len(widths) > 1 else None
        for part in store.chunks():
            z, square = self._project(store.take(part))
            rows = place[part]
            others = torch.stack([_residual(z[:, :m], square), square.float(), square.sqrt().float()], dim=1)
            self._rows[rows] = torch.cat([z[:, :m].float(), others], dim=1).to(self._dtype)
            if self._more is not None:
                self._more[rows] = torch.cat([z.float(), _residual(z, square)[:, None]], dim=1)

    def _set_up(self, store: GradientStore, axes: Tensor, widths: tuple[int, ...], byte_budget: int) -> None:
        self.widths = widths
        self.unit = float(store.log_norm().max())
        self._store = store
        self._axes = axes
        self._byte_budget = byte_budget
        self._norm = (store.log_norm() - self.unit).exp().float()

    def tensors(self) -> dict[str, Tensor]:
        """What `restore` takes: axes float64 (d, m'), order int64 (N,), rows (N', m + 3), perhaps more (N, m' + 1)."""
        found = {"axes": self._axes, "order": self._order, "rows": self._rows}
        return found if self._more is None else found | {"more": self._more}

    @classmethod
    def restore(cls, store: GradientStore, tensors: Mapping[str, Tensor], byte_budget: int) -> Self | None:
        """The filter that `tensors` was asked of, over the same gradients; None if this machine needs another.

        Raises:
            FormatError: if they are no filter's.
        """
        axes, order, rows, more = (tensors.get(name) for name in ("axes", "order", "rows", "more"))
        kinds = [(axes, (torch.float64,)), (order, (torch.int64,)), (rows, (torch.float32, torch.bfloat16))]
        if set(tensors) - {"axes", "order", "rows", "more"} or any(x is None or x.dtype not in t for x, t in kinds):
            raise FormatError("the tensors of the index are not those of a filter; the file was altered")
        assert axes is not None
        assert order is not None
        assert rows is not None
        n, m = len(store), rows.shape[1] - 3 if rows.ndim == 2 else 0
        widths = (m,) if more is None else (m, more.shape[-1] - 1 if more.ndim == 2 else 0)
        shapes_fit = (
            0 < widths[0] <= widths[-1] <= store.dim
            and axes.shape == (store.dim, widths[-1])
            and order.shape == (n,)
            and rows.shape == (_padded(n), m + 3)
            and (more is None or (more.shape == (n, widths[-1] + 1) and more.dtype == torch.float32))
        )
        if shapes_fit:
            # Rows of no gradient would be named as neighbours.
            padding = torch.zeros(len(rows) - n, m + 3, dtype=rows.dtype)
            padding[:, m + 1] = torch.inf
            shapes_fit = torch.equal(rows[n:], padding)
        if not shapes_fit or not 0 <= int(order.min()) <= int(order.max()) < n:
            raise FormatError("the tensors of the index do not fit the gradients; the file was altered")
        if rows.dtype == torch.bfloat16 and not _in_bfloat16(m, store.device):
            return None
        new = cls.__new__(cls)
        new._set_up(store, axes, widths, byte_budget)
        new._dtype, new._order, new._rows, new._more = rows.dtype, order, rows, more
        return new

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors().values(), self._norm))

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
        # The precision that torch multiplies in may be another with each search.
        error = product_error(m + 3)
        if self._dtype == torch.bfloat16:
            # Rounding of both factors and of the result.
            error += 3 * 2.0**-8 + 2.0**-14
        columns = torch.empty(len(z), m + 3, dtype=torch.float32, device=z.device)
        columns[:, :m] = z[:, :m]
        columns[:, m] = residual
        columns[:, : m + 1] *= -2
        columns[:, m + 1] = 1 - error
        columns[:, m + 2] = -2 * error * norm
        more = None
        if self._more is not None:
            more = torch.cat([z.float(), _residual(z, square)[:, None]], dim=1)
        more_error = 0.0 if more is None else product_error(more.shape[1])
        return _Batch(queries, norm, columns.to(self._dtype), more, more_error, product_error(self._store.dim))

    def search(self, queries: PolarGradients, k: int) -> Neighbors:
        """The k nearest rows of queries of moderate scale, directions in float32."""
        block = max(1, min(_TILE_QUERIES, self._byte_budget // (16 * _TILE_ROWS // _TILE_QUERIES)))
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
        record = torch.full_like(upper, torch.inf, dtype=self._dtype)
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
            if n_candidates + _BLOCKS * len(query) > most and n > 1:
                # Queries that tie with everything (duplicated rows) are searched in smaller groups.
                halves = (slice(None, n // 2), slice(n // 2, None))
                parts = [self._search_block(batch.take(half), k) for half in halves]
                return Neighbors(*(torch.cat(found) for found in zip(*parts, strict=True)))
            inside = lower.view(n, _BLOCKS, -1)[query, :, block]
            pair, place = (inside <= upper[query][:, None]).nonzero(as_tuple=True)
            row = place * least.shape[1] + block[pair]
            candidates.append((query[pair], row + start, inside[pair, place]))
            n_candidates += len(pair)
        query, place, bound = (
            candidates[0] if len(candidates) == 1 else (torch.cat(parts) for parts in zip(*candidates, strict=True))
        )
        _check_enough(query, n, k)
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
        query = better.repeat_interleave(k)
        low, error = self._true_bounds(batch, query, self._order[row.flatten() + start])
        upper[better] = torch.minimum(upper[better], (low + 2 * error).view(-1, k).amax(1))
        return least

    def _true_bounds(self, batch: _Batch, query: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Lower bounds of t of pairs from their inner products, and half of what they may be too low."""
        a, b = batch.norm[query], self._norm[row]
        product = a * b * pair_products(batch.gradients.direction, self._store, query, row)
        error = bound_error(batch.full_error, a, b)
        return b.square() - 2 * product - error, error

    def _decide(self, batch: _Batch, query: Tensor, place: Tensor, bound: Tensor, upper: Tensor, k: int) -> Neighbors:
        """From the rows that a scan left over to the k nearest."""
        keep = (bound <= upper[query]).nonzero().flatten()
        query, order = torch.sort(query[keep], stable=True)
        place = place[keep[order]]
        row = self._order[place]
        if self._more is not None and batch.more is not None:
            a, b = batch.norm[query], self._norm[row]
            product = pair_products(batch.more, self._more, query, place)
            keep = b.square() - 2 * product - bound_error(batch.more_error, a, b) <= upper[query]
            query, row = query[keep], row[keep]
            _check_enough(query, len(batch.norm), k)
        return nearest_pairs(batch.gradients, self._store, query, row, k, self._byte_budget)


def _check_enough(query: Tensor, n: int, k: int) -> None:
    """The bounds of a proper filter leave each query at least the rows that T belongs to."""
    if int(torch.bincount(query, minlength=n).min()) < k:
        raise FormatError("the index does not fit its gradients: the detector's file was altered; fit again")


def _padded(n: int) -> int:
    return -(-n // _BLOCKS) * _BLOCKS


def _in_bfloat16(m: int, device: torch.device) -> bool:
    """Whether to multiply in bfloat16: some processors do this in tiles, with sums in float32, several times faster."""
    return m >= _WIDE and device.type == "cpu" and bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _residual(z: Tensor, square: Tensor) -> Tensor:
    """ρ = √(‖g‖² - ‖z‖²), not less than it is, float32."""
    return ((square - z.square().sum(1)).clamp_(min=0).sqrt_() + _RESIDUAL_MARGIN * square.sqrt()).float()
