"""Less is enough: which of the training gradients are stored, and what leaving out the others can change.

Let T be the gradients of the correctly classified training samples, C ⊆ T those that stay, and

    ε = max over g ∈ T of min over c ∈ C of ‖g - c‖₂

the covering radius of C. A score is S_T(x) = min over g ∈ T of ‖∇(x) - g‖₂. Fewer gradients are never nearer, so that
S_T ≤ S_C; and with g the nearest in T of ∇(x), and c the nearest in C of g, the triangle inequality gives

    S_C(x) ≤ ‖∇(x) - c‖₂ ≤ ‖∇(x) - g‖₂ + ‖g - c‖₂ ≤ S_T(x) + ε        for every x, in or out of distribution.

`KCenterCoreset` makes ε small by farthest-first traversal (Gonzalez 1985): it begins at the longest gradient, and the
next centre is always the gradient that is farthest from its nearest centre. When the farthest is at distance r, it and
the n centres are n + 1 gradients that are r or more apart. Two of them have the same nearest centre in the best choice
of n centres, wherever these lie, so that its radius is at least r / 2: greedy is within a factor of 2 of the best.
`ClassSample` draws within each class, before any gradient is computed, and bounds nothing.

How the farthest is found. The distance to the nearest centre only shrinks as centres come, so that an old distance is
an upper bound of it, and a gradient can wait for as long as its old distance is below the true distance of another.
Hence a pool of those with the largest distances is brought up to date with all centres that each has missed, by one
matrix product; and the traversal goes on within the pool, until the largest distance in it is below the largest
outside. A gradient that comes close to a centre early is not looked at again. This takes about N·n·d multiplications
at most, in matrix products, and reads each gradient some ten times instead of n times; only where every centre comes
nearer to all gradients than those before it (magnitudes over thousands of orders) are all read for each centre.
In memory are the pool and a few numbers a gradient.

In the products ‖g‖² + ‖c‖² - 2⟨g, c⟩ cancels. With a margin for its rounding it is a lower bound; where this is below
the distance so far, `log_distance` decides. The result does not depend on the pool or on the products but for which of
equally far gradients comes first, and it is right for gradients of any magnitude.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_grood._progress import Progress, track
from torch_grood.errors import GroodError
from torch_grood.neighbors.pairs import log_distance
from torch_grood.neighbors.store import GradientStore

__all__ = ["ClassSample", "Coverage", "KCenterCoreset", "Subset", "make_subset"]

_POOL, _POOL_NUMBERS = 4096, 2**24
_BLOCK_ROWS, _BLOCK_CENTRES = 512, 1024
_PAIR_NUMBERS = 2**21
# e^300 times as long as all in the pool: the squares of both are well inside float64.
_FAR = 300.0
# `log_distance` may be this part of the longer gradient off; what else it rounds is relative to the distance.
_LOG_ERROR = -49 * math.log(2)


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

    def cover(self, store: GradientStore, *, progress: Progress = None) -> Coverage | None:
        """Choose among gradients; None: all.

        Args:
            store: N gradients.
            progress: a bar on a terminal (None), always, never, or a function that wraps the iterable itself.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class _Part(Subset):
    """A subset whose size is given by one of its arguments."""

    ratio: float | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            names = ", ".join(item.name for item in fields(self))
            what = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
            raise GroodError(f"{type(self).__name__} takes exactly one of {names}; got {what}")
        ((name, value),) = given.items()
        if name == "n":
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise GroodError(f"n is a number of gradients, at least 1; got {value!r}")
            object.__setattr__(self, name, int(value))
            return
        number = _as_float(value)
        if name == "ratio" and not 0 < number <= 1:
            raise GroodError(
                f"ratio is the share of the gradients that stay, above 0 and at most 1; got {value!r}. A number of "
                "gradients is n=…"
            )
        if not 0 < number < math.inf:
            raise GroodError(f"radius is what a score may grow by, above 0 and finite; got {value!r}")
        object.__setattr__(self, name, number)

    def _given(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def config(self) -> dict[str, Any]:
        """See `Subset.config`; `make_subset` makes the subset again."""
        return {"name": type(self).__name__, **self._given()}

    def _size(self, total: int) -> int:
        """How many of `total` stay."""
        if self.ratio is not None:
            # As it is written: in binary, 0.07 of 100 is a little more than 7.
            return math.ceil(Fraction(repr(self.ratio)) * total)
        return total if self.n is None else min(self.n, total)


@dataclass(frozen=True, kw_only=True)
class ClassSample(_Part):
    """A part of each class's correctly classified samples, drawn by seed, in whatever order they come.

    >>> ClassSample(ratio=0.1).config()
    {'name': 'ClassSample', 'ratio': 0.1}

    Args:
        ratio: share of each class, rounded up: a class that has a sample keeps one. The paper's sampling ratio.
        n: samples of each class at most.

    Raises:
        GroodError: unless exactly one argument is given and in range.
    """

    def sample(self, labels: Tensor, keys: Tensor) -> Tensor:
        """See `Subset.sample`: the samples of least key of each class."""
        order = np.lexsort((keys.cpu().numpy(), labels.cpu().numpy()))
        _, first, own, count = np.unique(
            labels.cpu().numpy()[order], return_index=True, return_inverse=True, return_counts=True
        )
        size = np.array([self._size(int(number)) for number in count], dtype=np.int64)
        kept = np.arange(len(order)) - first[own] < size[own]
        return torch.from_numpy(np.sort(order[kept]))


@dataclass(frozen=True, kw_only=True)
class KCenterCoreset(_Part):
    """Gradients such that every other is near one of them: no score grows by more than their covering radius.

    The bound is for the worst case, and the centres are spent on it: most lie where gradients are long and sparse. With
    few of them the scores of ID samples, which lie where gradients are dense, grow by a good part of ε, and those of
    outliers by less; a `ClassSample` of the same size, which has no bound, keeps the two farther apart.

    Args:
        ratio: share of all gradients, rounded up.
        n: gradients at most; fewer stay if the others are duplicates of them.
        radius: as many gradients as it takes for a covering radius of at most this, in the units of the score.

    Raises:
        GroodError: unless exactly one argument is given and in range.
    """

    radius: float | None = None

    def cover(self, store: GradientStore, *, progress: Progress = None) -> Coverage:
        """See `Subset.cover`; `log_radius` is an upper bound, rounding included.

        Raises:
            GroodError: if there is no gradient.
        """
        if len(store) == 0:
            raise GroodError("there is no gradient to choose from; no training sample was classified correctly")
        n, wanted = self._size(len(store)), -math.inf if self.radius is None else math.log(self.radius)
        if self.radius is None and n == len(store):
            return Coverage(torch.arange(n), -math.inf)
        traversal = _Traversal(store.to("cpu"))
        for _ in track(range(1, n), progress, "coreset"):
            row, distance = traversal.farthest()
            if distance == -math.inf or traversal.upper_bound(distance) <= wanted:
                break
            traversal.add(row)
        return Coverage(traversal.rows(), traversal.log_radius())


@dataclass(frozen=True)
class ForeignSubset(Subset):
    """A subset of the user's own that a stored detector was fitted with: its description, without its code."""

    description: dict[str, Any]

    def config(self) -> dict[str, Any]:
        """See `Subset.config`."""
        return self.description

    def sample(self, labels: Tensor, keys: Tensor) -> Tensor | None:
        """Not possible."""
        raise GroodError(
            f"the subset {self.description['name']!r} is not part of torch-grood; pass subset=… to fit again"
        )


def make_subset(config: dict[str, Any] | None) -> Subset | None:
    """The subset that `config` describes (see `Subset.config`), which may come from anywhere.

    Raises:
        GroodError: for a missing name or wrong arguments.
    """
    if config is None:
        return None
    known: dict[str, type[_Part]] = {subset.__name__: subset for subset in (ClassSample, KCenterCoreset)}
    name = config.get("name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise GroodError(f"a subset is described by its name and arguments; got {config!r}")
    if name not in known:
        return ForeignSubset(config)
    try:
        return known[name](**{key: value for key, value in config.items() if key != "name"})
    except TypeError as error:
        raise GroodError(f"bad arguments of subset {name}: {error}") from None


def _as_float(value: Any) -> float:
    """A real number, as it may stand in a file; NaN for what is none."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


class _Traversal:
    """Farthest-first traversal of N ≥ 1 gradients on the CPU, which begins at the longest; see the module's docstring.

    All distances are logarithms.
    """

    def __init__(self, store: GradientStore) -> None:
        self._store = store
        self._log_norm = store.log_norm()
        n, longest = len(store), self._log_norm.argmax()
        self._longest = float(self._log_norm[longest])
        # Of ‖g‖² + ‖c‖²: for the d roundings of a product, and those of lengths and distances that are logarithms.
        self._margin = 2.0**-35 + store.dim * 2.0**-51
        self._pool_size = min(n, _POOL, 1 + _POOL_NUMBERS // store.dim)
        self._centres = torch.empty(n, dtype=torch.int64)
        self._centres[0] = longest
        self._n_centres = 1
        # To the nearest of the first `_seen` centres; where it is 0, `_twin` is that centre.
        self._distance = self._pair_distances(torch.arange(n), longest.expand(n))
        self._seen = torch.ones(n, dtype=torch.int64)
        self._twin = longest.repeat(n)
        # Rows whose distance is up to date, and what no row outside is farther than.
        self._pool, self._outside = torch.empty(0, dtype=torch.int64), math.inf
        self._pool_vectors, self._unit = torch.empty(0, store.dim, dtype=torch.float64), 0.0

    def farthest(self) -> tuple[int, float]:
        """The row that is farthest from its nearest centre, and this distance, -inf for equals."""
        while True:
            if len(self._pool):
                distance, place = self._distance[self._pool].max(0)
                if distance >= self._outside:
                    return int(self._pool[place]), float(distance)
            self._refill()

    def add(self, row: int) -> None:
        """Make a row of the pool a centre."""
        self._centres[self._n_centres] = row
        self._n_centres += 1
        self._update(self._pool, self._pool_vectors, self._n_centres - 1)

    def rows(self) -> Tensor:
        """The centres, ascending."""
        return self._centres[: self._n_centres].sort().values

    def upper_bound(self, distance: float) -> float:
        """Upper bound of a true distance, from the one that was computed."""
        return self._rounded_up(float(np.logaddexp(distance, self._longest + _LOG_ERROR)))

    def log_radius(self) -> float:
        """Upper bound of the covering radius."""
        # Then no old distance is above the true largest.
        self.farthest()
        error = self._log_norm + _LOG_ERROR
        # Of gradients of one length the difference is exact, and 0 for duplicates only.
        duplicate = (self._distance == -torch.inf) & (self._log_norm == self._log_norm[self._twin])
        error[duplicate] = -torch.inf
        return self._rounded_up(float(torch.logaddexp(self._distance, error).max()))

    def _rounded_up(self, distance: float) -> float:
        relative = (self._store.dim + 16 + 4 * abs(distance)) * 2.0**-52
        return distance + relative if math.isfinite(distance) else distance

    def _refill(self) -> None:
        """A new pool: the rows that may be farthest, up to date."""
        far, pool = self._distance.topk(self._pool_size)
        self._outside = float(far[-1]) if len(pool) < len(self._distance) else -math.inf
        unit = max(float(far[0]), float(self._log_norm[pool].max()))
        self._unit = unit if math.isfinite(unit) else 0.0
        # Rows that have missed about as many centres are brought up to date together.
        for rows in torch.split(pool[self._seen[pool].argsort()], _BLOCK_ROWS):
            first = int(self._seen[rows].min())
            if first < self._n_centres:
                self._update(rows, self._vectors(rows), first)
        self._pool = pool[self._distance[pool] >= self._outside].sort().values
        self._pool_vectors = self._vectors(self._pool)

    def _update(self, rows: Tensor, vectors: Tensor, first: int) -> None:
        """Bring rows up to date with the centres from the `first` on."""
        square = vectors.square().sum(1)
        for centres in torch.split(self._centres[first : self._n_centres], min(_BLOCK_CENTRES, self._pool_size)):
            others = self._vectors(centres)
            squares = (square[:, None] + others.square().sum(1)).mul_(1 - self._margin)
            lower = torch.addmm(squares, vectors, others.T, alpha=-2)
            # The row's nearest by its bound makes its distance short, and few others remain.
            least, place = lower.min(1)
            chosen = (least <= self._reach(rows)).nonzero().flatten()
            place = place[chosen]
            self._try(rows[chosen], centres[place])
            lower[chosen, place] = torch.inf
            chosen, place = (lower <= self._reach(rows)[:, None]).nonzero(as_tuple=True)
            self._try(rows[chosen], centres[place])
        self._seen[rows] = self._n_centres

    def _reach(self, rows: Tensor) -> Tensor:
        """Squared distances, with what underflows in the products."""
        return (2 * (self._distance[rows] - self._unit)).exp_().add_(2.0**-1000)

    def _try(self, rows: Tensor, centres: Tensor) -> None:
        """Lower the distances of rows, which may repeat, to those of given centres."""
        if len(rows) == 0:
            return
        distance = self._pair_distances(rows, centres)
        self._distance.scatter_reduce_(0, rows, distance, "amin")
        equal = distance == -torch.inf
        self._twin[rows[equal]] = centres[equal]

    def _vectors(self, rows: Tensor) -> Tensor:
        """Gradients in units of the pool's longest, float64; much longer centres are shortened, and far even so."""
        size = (self._log_norm[rows] - self._unit).clamp_(max=_FAR).exp_()
        return self._store.directions(rows).double().mul_(size[:, None])

    def _pair_distances(self, rows: Tensor, others: Tensor) -> Tensor:
        step = max(1, _PAIR_NUMBERS // self._store.dim)
        parts = zip(torch.split(rows, step), torch.split(others, step), strict=True)
        return torch.cat([log_distance(self._store.take(a), self._store.take(b)) for a, b in parts])
