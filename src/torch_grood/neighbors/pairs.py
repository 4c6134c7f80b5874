"""The nearest among candidates: pairs of a query and a stored gradient.

Inner products in float32 with proven error leave few of them, practically one a query, and float64 differences decide
these: what is found does not depend on how the candidates came about, and has the same bits alone or in a batch.
"""

from __future__ import annotations

import functools
import math
import threading
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_grood.gradients import PolarGradients
from torch_grood.neighbors.store import GradientStore

__all__ = [
    "UNDERFLOW",
    "Neighbors",
    "bound_error",
    "log_distance",
    "log_mean",
    "nearest_pairs",
    "pair_products",
    "product_error",
]

_SUM_LENGTH = 16_384
_PAIR_BLOCK = 2048
# In units of the query: rows longer than e^40 are equally far in float32, and squares do not overflow.
_LONGEST = 40.0
# K products of 2^-126 times 1 or 2a at most are less than this times 1 + a.
UNDERFLOW = 2.0**-110


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


def log_mean(log_distance: Tensor) -> Tensor:
    """Log of the mean of k distances whose logs are given in ascending order, (n, k) to (n,)."""
    k = log_distance.shape[1]
    largest = log_distance[:, -1]
    if k == 1:
        return largest.clone()
    unit = largest.masked_fill(largest == -torch.inf, 0.0)
    # Column after column: the bits of a row do not depend on how many rows there are.
    total = torch.zeros_like(largest)
    for column in log_distance.unbind(1):
        total += (column - unit).exp()
    return total.log() + (unit - math.log(k))


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
        queries: n gradients, directions in float32.
        stored: N gradients.
        query: int64 (m,), in 0 … n - 1.
        row: int64 (m,), in 0 … N - 1.
        k: neighbours wanted.
        byte_budget: bytes that the differences may take at a time.
    """
    n = len(queries.log_magnitude)
    if len(query) > k * n:
        query, row = _shortlist(queries, stored, query, row, k)
    block = max(1, byte_budget // (3 * 8 * stored.dim))
    parts = [
        log_distance(queries.take(query[start : start + block]), stored.take(row[start : start + block]))
        for start in range(0, max(1, len(query)), block)
    ]
    distance = parts[0] if len(parts) == 1 else torch.cat(parts)
    if k == 1 and len(query) == n:
        # One candidate each, as nearly always.
        place = torch.empty_like(row)
        place[query] = torch.arange(len(row), device=row.device)
        return Neighbors(distance[place, None], row[place, None])
    query_, row_, distance_ = query.cpu().numpy(), row.cpu().numpy(), distance.cpu().numpy()
    order = np.lexsort((row_, distance_, query_))
    start = np.searchsorted(query_[order], np.arange(n))
    best = torch.from_numpy(order[start[:, None] + np.arange(k)]).to(query.device)
    return Neighbors(distance[best], row[best])


def _shortlist(
    queries: PolarGradients, stored: GradientStore, query: Tensor, row: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The pairs that may be among the k nearest, by t = b² - 2b·cos in units of the query's length."""
    query, order = torch.sort(query, stable=True)
    row = row[order]
    cos = pair_products(queries.direction, stored, query, row)
    b = (stored.log_norm()[row] - queries.log_magnitude[query]).clamp_(max=_LONGEST).exp_().float()
    # A query without direction has length 0, not 1: what is right for both needs no cos.
    error = bound_error(product_error(stored.dim), torch.ones_like(b), b)
    lower = b.square() - 2 * b * cos - error
    upper = lower + 2 * error
    if k == 1:
        best = torch.full_like(queries.log_magnitude, torch.inf, dtype=torch.float32)
        best = best.scatter_reduce(0, query, upper, "amin")
    else:
        order = torch.from_numpy(np.lexsort((upper.cpu().numpy(), query.cpu().numpy()))).to(query.device)
        place = torch.searchsorted(query, torch.arange(len(queries.log_magnitude), device=query.device))
        best = upper[order[place + k - 1]]
    keep = (lower <= best[query]).nonzero().flatten()
    return query[keep], row[keep]


def pair_products(queries: Tensor, rows: Tensor | GradientStore, query: Tensor, row: Tensor) -> Tensor:
    """Inner products of pairs, float32 (p,); `query` is ascending."""
    matrix = rows if isinstance(rows, Tensor) else rows.codes_with(row)
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


def bound_error(gamma: float, a: Tensor, b: Tensor) -> Tensor:
    """What b² - 2·product may be off, for lengths a and b and an error of the product of γab; with what underflows."""
    return (2 * gamma) * a * b + 2.0**-20 * b.square() + UNDERFLOW * (1 + a)


def product_error(d: int) -> float:
    """γ: error bound of cos and of the few roundings after it, for the precision that torch multiplies in."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        # torch refuses to tell where the precision was set by its newer interface: the coarsest is safe.
        precision = "medium"
    roundoff = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}[precision]
    accumulation = (d + 16) * 2.0**-24
    # Directions are of unit length only up to the rounding of their d components to float32.
    return 2 * roundoff + 2 * accumulation + 2.0**-20 + math.sqrt(d) * 2.0**-23


_hushing = threading.Lock()


@functools.cache
def _hush_sparse_warning() -> None:
    """torch warns once in a process that its sparse matrices are in beta."""
    # Filters of warnings are the process's, not the thread's.
    with _hushing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))
