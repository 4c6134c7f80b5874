"""The true nearest gradients: a float32 matrix product proposes, float64 differences decide.

With a = ‖q‖, b = ‖g‖ and unit directions, ‖q - g‖² = a² + t with t = b² - 2ab·cos, and t alone orders the rows. The
matrix product gives cos with a rounding error of at most γ (standard error analysis of an inner product of d terms),
hence t with an error of at most e = 2ab·γ + b²·ε, which stays small where b ≪ a, as it is for an outlier among the
training gradients. A row is a candidate if its lower bound t - e is not above t + e of the k best rows found so far;
no other row can be among the k nearest. The few candidates are decided by their true distances (`log_distance`), which
do not depend on the tile or the batch: the result is exact, and a score has the same bits for a query alone or among
thousands.

Magnitudes may differ by hundreds of orders. All arithmetic is in units of e^s for groups of queries that have one
scale: a query's k-th nearest distance is at most ‖q‖ + b_(k), with b_(k) the k-th smallest norm stored, so that rows
beyond 3·max(‖q‖, b_(k)) are too far and, in these units, all others are of moderate size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_grood.gradients import PolarGradients
from torch_grood.neighbors.pairs import Neighbors, nearest_pairs, product_error
from torch_grood.neighbors.store import GradientStore

__all__ = ["BruteForce"]

# Queries within a factor e^30 share one scale: the squares of magnitudes stay well inside float32.
_GROUP_SPAN = 30.0
# Rows larger than e^3 > 3 times a group's scale cannot be among the nearest.
_FAR = 3.0
# Relative error of squaring b and of the sum with it, rounded up.
_EPSILON = 2.0**-20
# Log of a scale at which everything is zero.
_LEAST = -1e9
_TILE_QUERIES = 256
_TILE_ROWS = 4096


class _Rows(NamedTuple):
    """Stored norms b in some unit, float32 (N,): b, b², and (1 - ε) b², infinite for rows that are too far."""

    norm: Tensor
    square: Tensor
    least_square: Tensor


class BruteForce:
    """Search through all stored gradients.

    Args:
        store: N gradients.
        byte_budget: working memory that a search may take beyond them.
    """

    def __init__(self, store: GradientStore, byte_budget: int) -> None:
        self._store = store
        self._log_norm = store.log_norm()
        self._byte_budget = byte_budget
        # Lower and upper bounds, and the product itself, live at once. Rounded rows are converted tile by tile, slowly
        # in large pieces.
        most = _TILE_ROWS if store.scale is None else min(_TILE_ROWS, 2**20 // store.dim)
        self._tile_rows = max(64, min(most, byte_budget // (4 * 4 * _TILE_QUERIES)))

    def search(self, queries: PolarGradients, k: int) -> Neighbors:
        """The k nearest stored gradients of queries on the store's device, directions in float32."""
        n, device = len(queries.log_magnitude), self._store.device
        log_distance = torch.empty(n, k, dtype=torch.float64, device=device)
        row = torch.empty(n, k, dtype=torch.int64, device=device)
        scale = queries.log_magnitude.clamp(min=max(self._store.smallest_log_norm(k), _LEAST))
        pending = torch.arange(n, device=device)
        while len(pending):
            unit = float(scale[pending].max())
            in_group = scale[pending] > unit - _GROUP_SPAN
            rows = self._rows_in_units(unit)
            for group in torch.split(pending[in_group], _TILE_QUERIES):
                log_distance[group], row[group] = self._search_group(queries.take(group), k, unit, rows)
            pending = pending[~in_group]
        return Neighbors(log_distance, row)

    def _rows_in_units(self, unit: float) -> _Rows:
        far = self._log_norm > unit + _FAR
        norm = (self._log_norm - unit).exp().float().masked_fill_(far, 0.0)
        square = norm.square()
        return _Rows(norm, square, (square * (1 - _EPSILON)).masked_fill_(far, torch.inf))

    def _search_group(self, queries: PolarGradients, k: int, unit: float, rows: _Rows) -> Neighbors:
        n_rows = len(self._store)
        gamma = product_error(self._store.dim)
        a = (queries.log_magnitude - unit).exp().float() * queries.direction.any(1)
        scaled = queries.direction * (-2 * a)[:, None]
        slack = 2 * gamma * a[:, None]
        # Finite, so that rows that are too far, whose bound is infinite, are never candidates.
        upper = torch.full_like(a, torch.finfo(torch.float32).max)
        candidates: list[tuple[Tensor, Tensor, Tensor]] = []
        n_candidates = 0
        # A candidate takes two int64 and a float here and its two rows later; queries that tie with everything
        # (duplicated rows) are searched in smaller groups.
        most = max(n_rows, self._byte_budget // 64)
        for start in range(0, n_rows, self._tile_rows):
            tile = slice(start, start + self._tile_rows)
            # t - e = b·(-2a·cos - 2aγ) + b²(1 - ε), in place over one tile.
            lower = torch.addmm(-slack, scaled, self._store.directions(tile).T)
            torch.addcmul(rows.least_square[tile], lower, rows.norm[tile], out=lower)
            # Most queries have nothing to find in most tiles; the minimum tells, and the rest is done for the others.
            live = (lower.amin(1) <= upper).nonzero().flatten()
            if len(live) == 0:
                continue
            lower = lower[live]
            near, nearest = torch.topk(lower, min(k, lower.shape[1]), dim=1, largest=False)
            if near.shape[1] == k:
                error = slack[live] * rows.norm[tile][nearest] + _EPSILON * rows.square[tile][nearest]
                upper[live] = torch.minimum(upper[live], (near + 2 * error).amax(1))
            query, tile_row = (lower <= upper[live][:, None]).nonzero(as_tuple=True)
            candidates.append((live[query], tile_row + start, lower[query, tile_row]))
            n_candidates += len(query)
            if n_candidates > most and len(a) > 1:
                half = len(a) // 2
                halves = (slice(None, half), slice(half, None))
                parts = [self._search_group(queries.take(s), k, unit, rows) for s in halves]
                return Neighbors(*(torch.cat(pair) for pair in zip(*parts, strict=True)))
        query, row, bound = (torch.cat(parts) for parts in zip(*candidates, strict=True))
        keep = bound <= upper[query]
        return nearest_pairs(queries, self._store, query[keep], row[keep], k, self._byte_budget)
