"""Approximate search by faiss, from any factory string: inverted lists, quantization, graphs.

faiss computes squared L2 distances in float32 by expansion, which cancels, and returns them with 3.4e38 for "nothing
found". Hence the gradients are scaled by one common constant and centred first, faiss only proposes candidates, and
their distances are computed from the gradients themselves. A query for which faiss proposes too few rows (empty
inverted lists) is searched exactly.

What an index learns (scale and centre, transforms, quantizers) it learns once, at `build`, from a sample; the rows come
in chunks. It is kept when rows are added or removed, and in a file (see `faiss_state`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_grood._optional import require
from torch_grood.errors import FormatError, GroodError
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors import faiss_state
from torch_grood.neighbors.base import GradientIndex, GradientSearcher, IndexQuality
from torch_grood.neighbors.exact import ExactIndex, ExactSearcher
from torch_grood.neighbors.pairs import Neighbors, nearest_pairs
from torch_grood.neighbors.store import GradientStore, StoreOptions

__all__ = ["FaissIndex"]

# A gradient whose magnitude is e^20 times the largest of the fit is equally far from all rows in float32.
_LARGEST = 20.0
_BYTE_BUDGET = 256 * 2**20
_TABLE_BUDGET = 16 * 2**20
# faiss's k-means takes 256 points a centroid at most.
_POINTS = 256
_TRAIN_BYTES = 2 * 2**30
_SAMPLE_ROWS = 16_384
# A product quantizer takes 1 KiB a row and part while it encodes.
_ADD_ROWS = 4096
_MOST_ON_GPU = 2048


@dataclass(frozen=True)
class FaissIndex(GradientIndex):
    """An index of the faiss library, over re-scored candidates.

    The same seed gives the same index (a graph, with older versions of faiss, on one thread only). A detector's file
    keeps what the index learned, for Flat, SQ, PQ and HNSW, also behind IVF and after PCA, OPQ, RR or Pad. LSH, PQ…x4fs
    and RFlat are built again from the seed at loading. Other kinds work, but cannot be saved.

    Args:
        factory: faiss factory string, e.g. "IVF1024,Flat" or "OPQ64_128,IVF4096,PQ64".
        parameters: parameters by their faiss name, e.g. {"nprobe": 16}, {"efSearch": 64} or {"quantizer_efSearch": 64}.
        candidates: rows that faiss proposes for each neighbour wanted.
        train_size: gradients, drawn by seed, that the index learns from at most; None: what faiss makes use of, within
            2 GiB.
        quality_queries: stored gradients that recall and score inflation are measured on, each with its own row left
            out. They have been learned from, and a graph leads to them: new images are served no better.
        gpu: search on a GPU; None: where faiss is built for it, there is one, and it takes this kind of index.
    """

    factory: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    candidates: int = 8
    train_size: int | None = None
    quality_queries: int = 256
    gpu: bool | None = None

    def __post_init__(self) -> None:
        counts = {"candidates": self.candidates, "train_size": self.train_size, "quality_queries": self.quality_queries}
        for name, value in counts.items():
            if name == "train_size" and value is None:
                continue
            if type(value) is not int or value < (name != "quality_queries"):
                raise GroodError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(self.factory, str) or not isinstance(self.parameters, Mapping):
            raise GroodError("a faiss index takes a factory string and a mapping of parameters")
        for name, number in self.parameters.items():
            if not isinstance(name, str) or isinstance(number, bool) or not isinstance(number, (int, float)):
                raise GroodError(f"a search parameter is a name and a number, got {name!r}: {number!r}")
            if not -(2**31) < number < 2**31:
                raise GroodError(f"the search parameter {name!r} must be a number below 2^31, got {number!r}")
        if self.gpu not in (None, True, False):
            raise GroodError(f"gpu must be True, False or None, got {self.gpu!r}")

    @property
    def spec(self) -> str:
        """See `GradientIndex.spec`."""
        return self.factory

    def config(self) -> dict[str, Any]:
        """The other arguments that belong to the index and not to the machine, JSON-able."""
        arguments = asdict(self)
        del arguments["factory"], arguments["gpu"]
        return arguments

    def build(self, gradients: PolarGradients | GradientStore, *, seed: int = 0) -> GradientSearcher:
        """See `GradientIndex.build`.

        Raises:
            GroodError: if faiss does not know the factory string or a parameter, or needs more gradients to train on.
        """
        store = GradientStore.of(gradients).to("cpu")
        with self._explained(store):
            searcher = self._build(store, seed)
            searcher.try_out()
            searcher.measure(seed)
        return searcher

    def restore(
        self,
        gradients: GradientStore,
        tensors: Mapping[str, Tensor],
        *,
        seed: int = 0,
        quality: IndexQuality | None = None,
    ) -> GradientSearcher:
        """The searcher that `GradientSearcher.tensors` was asked of, over the same gradients; nothing is learned.

        Args:
            gradients: N gradients.
            tensors: of the searcher, of whatever origin; none: the index is built from the seed.
            seed: as for `build`.
            quality: that was measured; None: it is measured now.

        Raises:
            GroodError: if the index is none that a file may ask for; a FormatError if the tensors are not its own.
        """
        store = gradients.to("cpu")
        self.check_storable(store, tensors)
        with self._explained(store):
            if tensors:
                index = self._empty(store.dim)
                state = {name.removeprefix("index."): tensor for name, tensor in tensors.items()}
                space = _Space.stored(state.pop("unit", None), state.pop("centre", None), store.dim)
                lists = faiss_state.put_together(index, state, len(store))
                _fill(index, store, space, lists, linked=faiss_state.has_graph(index))
                searcher = _FaissSearcher(self, index, store, space)
            else:
                searcher = self._build(store, seed)
            searcher.try_out()
            searcher.quality = quality
            if quality is None:
                searcher.measure(seed)
        return searcher

    def check_storable(self, store: GradientStore, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Raise a GroodError if a file may not ask for this index; see `faiss_state.check_storable`."""
        faiss_state.check_storable(self.factory, self.parameters, len(store), store.dim, tensors)

    def check_rebuilt(self, store: GradientStore) -> None:
        """Raise a FormatError for an index that a file without its tensors cannot have: these are always kept."""
        self.check_storable(store)
        with self._explained(store):
            if faiss_state.is_kept(self._empty(store.dim)):
                raise FormatError(f"the index {self.factory!r} lacks its tensors; the file was altered")

    def _build(self, store: GradientStore, seed: int) -> _FaissSearcher:
        if len(store) == 0:
            raise GroodError("there is no gradient to search; no training sample was classified correctly")
        index, space = self._empty(store.dim), _Space.of(store)
        faiss_state.limit_tables(index, len(store))
        if not index.is_trained:
            size = self.train_size or _train_size(index, store.dim)
            index.train(_sample(store, space, size, seed))
            faiss_state.check_learned(index)
        _fill(index, store, space)
        return _FaissSearcher(self, index, store, space)

    def _empty(self, d: int) -> Any:
        faiss = require("faiss", extra="all")
        index = faiss.index_factory(d, self.factory, faiss.METRIC_L2)
        if "ht" not in self.parameters:
            faiss_state.spare_training(index)
        for name, value in self.parameters.items():
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        return index

    @contextmanager
    def _explained(self, store: GradientStore) -> Iterator[None]:
        """Say of an error of faiss what it was about."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            raise GroodError(
                f"faiss cannot build index {self.factory!r} over {len(store)} gradients of dimension {store.dim}: "
                f"{_reason(error)}. Use fewer lists or another factory string, or index='exact'."
            ) from error


class _Space(NamedTuple):
    """How gradients become the vectors that faiss is given: H · exp(-unit) - centre, float32.

    Attributes:
        unit: the largest log π of the fit.
        centre: float32 (d,).
    """

    unit: float
    centre: Tensor

    @classmethod
    def of(cls, store: GradientStore) -> _Space:
        space = cls(float(store.log_magnitude.max()), torch.zeros(store.dim, dtype=torch.float32))
        total = torch.zeros(store.dim, dtype=torch.float64)
        for rows in store.chunks():
            total += torch.from_numpy(space.vectors(store.take(rows))).sum(0, dtype=torch.float64)
        return space._replace(centre=(total / len(store)).float())

    @classmethod
    def stored(cls, unit: Tensor | None, centre: Tensor | None, d: int) -> _Space:
        if unit is None or unit.dtype != torch.float64 or unit.ndim or not bool(unit.isfinite()):
            raise FormatError("the index lacks its unit; the file was altered")
        # No mean of vectors of length 1 at most is longer.
        if centre is None or centre.dtype != torch.float32 or centre.shape != (d,) or not float(centre.norm()) < 1.001:
            raise FormatError("the index lacks its centre; the file was altered")
        return cls(float(unit), centre)

    def vectors(self, gradients: PolarGradients) -> npt.NDArray[np.float32]:
        clamped = gradients.log_magnitude.clamp(max=self.unit + _LARGEST)
        vectors: npt.NDArray[np.float32] = PolarGradients(clamped, gradients.direction).vectors(self.unit).numpy()
        vectors -= self.centre.numpy()
        return vectors


class _FaissSearcher(GradientSearcher):
    def __init__(self, config: FaissIndex, index: Any, gradients: GradientStore, space: _Space) -> None:
        self._config = config
        self.gradients = gradients
        self._index = index
        self._space = space
        self._candidates = config.candidates
        self._table_bytes = faiss_state.query_bytes(index)
        self._on_gpu, self._resources = _on_gpu(index, config.gpu)

    @cached_property
    def exact(self) -> ExactSearcher:
        """For the few queries that need it; a filter would take longer to make than it saves."""
        return ExactIndex(prune=False).build(self.gradients)

    def tensors(self) -> dict[str, Tensor]:
        state = faiss_state.take_apart(self._index)
        if state is None:
            return {}
        state |= {"unit": torch.tensor(self._space.unit, dtype=torch.float64), "centre": self._space.centre}
        return {f"index.{name}": tensor for name, tensor in state.items()}

    def with_added(self, gradients: PolarGradients, store: StoreOptions, *, seed: int = 0) -> GradientSearcher:
        n, more = len(self.gradients), self.gradients.extended(gradients, store)
        if faiss_state.has_graph(self._index):
            return self._over(more, None, seed, start=n)
        lists = faiss_state.lists_of(self._index)
        if lists is not None:
            lists = np.pad(lists, (0, len(more) - n), constant_values=-1)
        return self._over(more, lists, seed)

    def with_only(self, rows: Tensor, store: StoreOptions, *, seed: int = 0) -> GradientSearcher:
        lists = faiss_state.lists_of(self._index)
        if lists is not None:
            lists = lists[rows.cpu().numpy()]
        return self._over(self.gradients.select(rows, store), lists, seed)

    def _over(
        self, store: GradientStore, lists: npt.NDArray[np.int32] | None, seed: int, start: int = 0
    ) -> GradientSearcher:
        """What was learned here, over other gradients, of which the first `start` are these."""
        with self._config._explained(store):
            index = faiss_state.copy(self._index, empty=start == 0)
            faiss_state.limit_tables(index, len(store))
            _fill(index, store, self._space, lists, start)
            searcher = _FaissSearcher(self._config, index, store, self._space)
            searcher.measure(seed)
        return searcher

    @torch.no_grad()
    def search(self, queries: PolarGradients, k: int = 1) -> Neighbors:
        self._check_k(k, len(self.gradients))
        queries = PolarGradients(queries.log_magnitude.cpu(), queries.direction.cpu().float())
        wanted = min(k * self._candidates, len(self.gradients))
        # A candidate takes a row and a distance here and in faiss, and its place in the order; a query its vector.
        block = self._block(wanted)
        found: list[Neighbors] = []
        for start in range(0, max(1, len(queries.log_magnitude)), block):
            part = queries.take(slice(start, start + block))
            found.append(self._nearest(part, self._propose(part, wanted), k))
        return found[0] if len(found) == 1 else Neighbors(*(torch.cat(x) for x in zip(*found, strict=True)))

    def _propose(self, queries: PolarGradients, wanted: int) -> Tensor:
        """The rows that faiss finds nearest, int64 (n, wanted), -1 where it finds too few."""
        index = self._index if self._on_gpu is None or wanted > _MOST_ON_GPU else self._on_gpu
        n, block = len(queries.log_magnitude), self._block(wanted)
        parts = [
            torch.from_numpy(index.search(self._space.vectors(queries.take(slice(start, start + block))), wanted)[1])
            for start in range(0, max(1, n), block)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _block(self, wanted: int) -> int:
        """Queries at a time. One takes candidates, its vector, and in faiss a table of distances to centroids."""
        most = _TABLE_BUDGET // max(1, self._table_bytes)
        return max(1, min(_BYTE_BUDGET // (64 * wanted + 24 * self.gradients.dim), most))

    def _nearest(self, queries: PolarGradients, rows: Tensor, k: int) -> Neighbors:
        """The k nearest among proposed rows, or among all where there are too few."""
        enough = (rows >= 0).sum(1) >= k
        log_distance = torch.empty(len(rows), k, dtype=torch.float64)
        row = torch.empty(len(rows), k, dtype=torch.int64)
        if bool(enough.any()):
            chosen = rows[enough]
            query, column = (chosen >= 0).nonzero(as_tuple=True)
            log_distance[enough], row[enough] = nearest_pairs(
                queries.take(enough), self.gradients, query, chosen[query, column], k, _BYTE_BUDGET
            )
        if not bool(enough.all()):
            log_distance[~enough], row[~enough] = self.exact.search(queries.take(~enough), k)
        return Neighbors(log_distance, row)

    def try_out(self) -> None:
        """Search once: only a search tells whether the parameters can work."""
        self._propose(self.gradients.take(slice(0, 1)), 1)

    @torch.no_grad()
    def measure(self, seed: int) -> None:
        """Search stored gradients for their nearest other row, as a new query is searched for and exactly."""
        n = len(self.gradients)
        n_queries = min(self._config.quality_queries, n)
        if n < 2 or n_queries < 1:
            return
        own = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(n)[:n_queries])
        queries = self.gradients.take(own)
        found = self.exact.search(queries, 2)
        # Among duplicates the own row may not be listed: then the first is another row.
        other = torch.where(found.row[:, 0] == own, 1, 0)
        exact = found.log_distance.gather(1, other[:, None]).flatten()
        rows = self._propose(queries, min(self._candidates + 1, n))
        is_own = rows == own[:, None]
        # One more than a new query gets, and one less: the own row or, if faiss missed that, the last.
        is_own[:, -1] |= ~is_own.any(1)
        left = rows.masked_fill(is_own, -1)
        some = (left >= 0).any(1)
        approximate = exact.clone()
        if bool(some.any()):
            approximate[some] = self._nearest(queries.take(some), left[some], 1).log_distance.flatten()
        self.quality = _quality(approximate, exact)


def _quality(approximate: Tensor, exact: Tensor) -> IndexQuality:
    recall = (approximate == exact).double().mean()
    # Infinite where the nearest is a duplicate that was missed.
    excess = torch.where(approximate == exact, 0.0, approximate - exact).expm1()
    excess = excess[excess.isfinite()]
    return IndexQuality(float(recall), 1 + float((excess / max(1, len(excess))).sum()), len(exact))


def _fill(
    index: Any,
    store: GradientStore,
    space: _Space,
    lists: npt.NDArray[np.int32] | None = None,
    start: int = 0,
    *,
    linked: bool = False,
) -> None:
    """Add the gradients from row `start` on, chunk by chunk; see `faiss_state.add_rows`."""
    for chunk in store.chunks():
        end = min(chunk.stop, len(store))
        for first in range(max(start, chunk.start), end, _ADD_ROWS):
            rows = slice(first, min(first + _ADD_ROWS, end))
            vectors = space.vectors(store.take(rows))
            faiss_state.add_rows(index, vectors, None if lists is None else lists[rows], linked=linked)


def _train_size(index: Any, d: int) -> int:
    """As many rows as faiss makes use of, within a limit."""
    centroids = faiss_state.centroids_of(index)
    return min(_POINTS * centroids, max(centroids, _TRAIN_BYTES // (4 * d)))


def _sample(store: GradientStore, space: _Space, size: int, seed: int) -> npt.NDArray[np.float32]:
    rows = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(store))[:size]))
    sample = np.empty((len(rows), store.dim), np.float32)
    for start in range(0, len(rows), _SAMPLE_ROWS):
        part = slice(start, start + _SAMPLE_ROWS)
        sample[part] = space.vectors(store.take(rows[part]))
    return sample


def _on_gpu(index: Any, wanted: bool | None) -> tuple[Any, Any]:
    """A copy of the index on the first GPU, and what must live as long; None where there is none."""
    if wanted is False:
        return None, None
    faiss = require("faiss", extra="all")
    n_gpus = faiss.get_num_gpus() if hasattr(faiss, "index_cpu_to_gpu") else 0
    reason = "this faiss is built without GPU support, or there is no GPU"
    if n_gpus > 0:
        try:
            resources = faiss.StandardGpuResources()
            return faiss.index_cpu_to_gpu(resources, 0, index), resources
        except RuntimeError as error:
            reason = _reason(error)
    if wanted:
        raise GroodError(
            f"gpu=True, but the index cannot be searched on a GPU: {reason}. Install a faiss-gpu build on a machine "
            "with a GPU and choose Flat, IVF…,Flat, IVF…,SQ8 or IVF…,PQ, or leave gpu out."
        )
    return None, None


def _reason(error: Exception) -> str:
    """The last line of an error of faiss: the lines before it are of its source."""
    return (str(error).strip().splitlines() or ["out of memory"])[-1].rstrip(".")
