"""What a faiss index has learned, as plain tensors: faiss's own files are not made for strangers, ours must be.

An index is taken apart into what took time or chance to find: trained numbers, the list of each row, and graphs. To put
it together, an empty index is made by its factory string, every array is checked to be one that such an index has, and
copied in; the codes are made anew from the gradients. Bytes of a file are never given to faiss to interpret.

    unit, centre        float64 (), float32 (d,)     of the vectors that it is given (kept by `faiss`)
    transform0.matrix   float32 (d_out, d_in)        a PCA, OPQ or rotation, and float32 (d_out,) transform0.bias
    quantizer.vectors   float32 (lists, d)           the centres of the inverted lists
    sq.range            float32 (2 d,)               least value and span of each component
    pq.centroids        float32 (M, 2^bits, d / M)
    lists               int32 (N,)                   the list that each row lies in
    graph.levels        int32 (N,)                   levels that a row of an HNSW graph has, at least 1
    graph.neighbors     int32                        for each row and level a fixed number of rows, -1 for none
    graph.entry         int32 ()                     where a search begins: a row of the highest level
    quantizer.graph.*                                the same for a graph over the centres

Other kinds of index have no such state; they are built again from the seed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_grood._optional import require
from torch_grood.errors import FormatError, GroodError

__all__ = [
    "add_rows",
    "centroids_of",
    "check_learned",
    "check_storable",
    "copy",
    "has_graph",
    "is_kept",
    "limit_tables",
    "lists_of",
    "put_together",
    "query_bytes",
    "spare_training",
    "take_apart",
]

_FLAT = {"IndexFlat", "IndexFlatL2", "IndexIVFFlat"}
_SCALAR = {"IndexScalarQuantizer", "IndexIVFScalarQuantizer"}
_PRODUCT = {"IndexPQ", "IndexIVFPQ"}
_GRAPH = {"IndexHNSWFlat", "IndexHNSWSQ", "IndexHNSWPQ"}
_LINEAR = {"LinearTransform", "PCAMatrix", "OPQMatrix", "RandomRotationMatrix"}

# What a file may ask faiss to make: these parts, in this order.
_CODES = r"(?:Flat|SQ(?:8|6|4|fp16|bf16)|PQ[0-9]+(?:x[0-9]+)?(?:np)?)"
_STORABLE = re.compile(
    r"(?:(?:PCAW?R?[0-9]+|OPQ[0-9]+(?:_[0-9]+)?|RR[0-9]*|Pad[0-9]+),){0,2}"
    rf"(?:(?:IVF[0-9]+(?:_HNSW[0-9]*)?,)?(?:{_CODES}|PQ[0-9]+x4fs)|HNSW[0-9]*(?:[,_]{_CODES})?|LSHr?t?)(?:,RFlat)?"
)
_PARAMETER = re.compile(r"(?:quantizer_)?(?:nprobe|efSearch|efConstruction|max_codes|ht)|k_factor_rf")
_FROM_ZERO = {"max_codes", "ht"}
# faiss's own.
_GRAPH_SEED = 12345
_SMALL = 4096
_LARGEST_ARRAY = 2**28
_SMALL_ARRAY, _SMALL_TABLE = 2**20, 4 * 2**20
_MOST_BITS, _MOST_LINKS, _MOST_REFINED = 12, 128, 64


class _Array(NamedTuple):
    """One array that training gives: its name, the C++ vector that holds it, and its shape."""

    name: str
    vector: Any
    shape: tuple[int, ...]


class _UnknownKindError(Exception):
    """No state is known for this kind of index."""


def take_apart(index: Any) -> dict[str, Tensor] | None:
    """The state of a trained and filled index; None for a kind that has none here."""
    faiss = require("faiss", extra="all")
    try:
        arrays = _arrays(faiss, index)
    except _UnknownKindError:
        return None
    tensors = {a.name: torch.from_numpy(faiss.vector_to_array(a.vector)).view(a.shape) for a in arrays}
    core = _core(faiss, index)
    if has_graph(index):
        tensors |= _graph_of(faiss, core, "graph.")
    lists = lists_of(index)
    if lists is not None:
        quantizer = faiss.downcast_index(core.quantizer)
        tensors["quantizer.vectors"] = torch.from_numpy(quantizer.reconstruct_n(0, core.nlist))
        tensors["lists"] = torch.from_numpy(lists)
        if type(quantizer).__name__ in _GRAPH:
            tensors |= _graph_of(faiss, quantizer, "quantizer.graph.")
    return tensors


def put_together(index: Any, tensors: Mapping[str, Tensor], n: int) -> npt.NDArray[np.int32] | None:
    """Give an empty index the state of one with n rows; the rows themselves are then to be added by `add_rows`.

    Returns:
        The list of each row, None without inverted lists.

    Raises:
        FormatError: if this kind of index has no state, or the tensors are not all and only those of its state.
    """
    faiss = require("faiss", extra="all")
    left = dict(tensors)
    try:
        arrays = _arrays(faiss, index)
    except _UnknownKindError:
        raise FormatError("an index of this kind has no stored state; the file was altered") from None
    for array in arrays:
        faiss.copy_array_to_vector(_take(left, array.name, array.shape, torch.float32).ravel(), array.vector)
    chain, core = _unwrapped(faiss, index)
    for part in (*chain, core, index):
        part.is_trained = True
    lists = None
    if type(core).__name__ in _GRAPH:
        storage = faiss.downcast_index(core.storage)
        storage.is_trained = True
        if hasattr(storage, "pq"):
            storage.pq.compute_sdc_table()
        _give_graph(faiss, core, left, "graph.", n)
    elif hasattr(core, "nlist"):
        lists = _take(left, "lists", (n,), torch.int32)
        if lists.min() < 0 or lists.max() >= core.nlist:
            raise FormatError(f"a row lies in none of the {core.nlist} lists; the file was altered")
        centres = _take(left, "quantizer.vectors", (core.nlist, core.d), torch.float32)
        quantizer = faiss.downcast_index(core.quantizer)
        if type(quantizer).__name__ in _GRAPH:
            faiss.downcast_index(quantizer.storage).add(centres)
            _give_graph(faiss, quantizer, left, "quantizer.graph.", core.nlist)
        else:
            quantizer.add(centres)
        limit_tables(index, n)
    if left:
        raise FormatError(f"the index has no {', '.join(sorted(left))}; the file was altered")
    return lists


def add_rows(
    index: Any, vectors: npt.NDArray[np.float32], lists: npt.NDArray[np.int32] | None, *, linked: bool = False
) -> None:
    """Add rows at the end of a trained index.

    Args:
        index: to add to.
        vectors: float32 (n, d).
        lists: that the rows go to, -1 where that is to be found out; None: all are, or there are none.
        linked: the rows are in the index's graph already.
    """
    faiss = require("faiss", extra="all")
    chain, core = _unwrapped(faiss, index)
    for transform in chain:
        vectors = transform.apply(vectors)
    if linked:
        core.storage.add(vectors)
    elif lists is None:
        core.add(vectors)
    else:
        assigned = lists.astype(np.int64)
        unknown = assigned < 0
        if unknown.any():
            assigned[unknown] = core.quantizer.assign(vectors[unknown], 1)[:, 0]
        core.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(assigned))
    index.ntotal = core.ntotal


def check_learned(index: Any) -> None:
    """Raise a RuntimeError if training gave no finite numbers, as whitening does with more dimensions than rows."""
    state = take_apart(index)
    if state is not None and not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise RuntimeError("what it learned is not finite")


def spare_training(index: Any) -> None:
    """Do not order a product quantizer's centroids for Hamming distances: this takes longer than all else."""
    core = _core(require("faiss", extra="all"), index)
    if hasattr(core, "do_polysemous_training"):
        core.do_polysemous_training = False
    for inner in ("storage", "base_index"):
        if hasattr(core, inner):
            spare_training(getattr(core, inner))


def copy(index: Any, *, empty: bool) -> Any:
    """A copy of a trained index, with its rows or without any."""
    faiss = require("faiss", extra="all")
    copied = faiss.clone_index(index)
    if empty:
        copied.reset()
    if has_graph(copied):
        # Levels are drawn as for a new index, however often the generator has been asked: an index that went through a
        # file has the same future as one that did not.
        _core(faiss, copied).hnsw.rng = faiss.RandomGenerator(_GRAPH_SEED)
    return copied


def is_kept(index: Any) -> bool:
    """Whether this kind of index has a state, which a file then holds."""
    try:
        _arrays(require("faiss", extra="all"), index)
    except _UnknownKindError:
        return False
    return True


def limit_tables(index: Any, n: int) -> None:
    """Let faiss precompute no table that is larger than n gradients: it takes up to 2 GiB for a few centroids."""
    core = _core(require("faiss", extra="all"), index)
    if not hasattr(core, "use_precomputed_table"):
        return
    size = 4 * core.nlist * core.pq.M * core.pq.ksub
    core.use_precomputed_table = 0 if size <= max(_SMALL_TABLE, 4 * n * core.d) else -1
    if core.use_precomputed_table == 0 and core.is_trained:
        core.precompute_table()


def query_bytes(index: Any) -> int:
    """What a search in a product quantizer allocates for each query."""
    core = _core(require("faiss", extra="all"), index)
    if type(core).__name__ != "IndexPQ":
        return 0
    return 4 * int(core.pq.M) * int(core.pq.ksub)


def has_graph(index: Any) -> bool:
    """Whether the rows are linked in a graph, from which none can be removed."""
    return type(_core(require("faiss", extra="all"), index)).__name__ in _GRAPH


def centroids_of(index: Any) -> int:
    """How many centroids the largest k-means of the training looks for, at least the 256 of an 8-bit code."""
    core = _core(require("faiss", extra="all"), index)
    lists, codes = getattr(core, "nlist", 0), core.pq.ksub if hasattr(core, "pq") else 0
    return max(256, int(lists), int(codes))


def lists_of(index: Any) -> npt.NDArray[np.int32] | None:
    """The inverted list of each row, int32 (N,); None where there is none, or rows cannot be given one."""
    faiss = require("faiss", extra="all")
    core = _core(faiss, index)
    if type(core).__name__ not in _FLAT | _SCALAR | _PRODUCT or not hasattr(core, "nlist"):
        return None
    lists = np.full(core.ntotal, -1, np.int32)
    for number in range(core.nlist):
        size = core.invlists.list_size(number)
        if size:
            lists[faiss.rev_swig_ptr(core.invlists.get_ids(number), size)] = number
    return lists


def check_storable(
    factory: str, parameters: Mapping[str, float], n: int, d: int, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Refuse an index that a file may not ask for: faiss allocates what it is told to, or ends the process.

    Args:
        factory: factory string.
        parameters: search parameters.
        n: stored gradients.
        d: their dimension.
        tensors: of the index: there may be as many lists as it has centres.

    Raises:
        GroodError: for a string that is not known to be harmless, or a number that is too large.
    """
    if len(factory) > 100 or _STORABLE.fullmatch(factory) is None:
        raise GroodError(
            f"an index {factory!r} cannot be kept in a file; the kinds that can are Flat, SQ, PQ, IVF, HNSW and LSH, "
            "with a PCA, OPQ, RR or Pad before them, or 'exact'"
        )
    centres = (tensors or {}).get("index.quantizer.vectors", torch.empty(0))
    # As many as there are numbers for: a shape alone costs nothing.
    limit = max(_SMALL, n, d, len(centres) if centres.ndim and centres.numel() else 0)
    numbers = _numbers("", factory)
    bits = _numbers("PQ[0-9]+x", factory) or [8]
    links = _numbers("HNSW", factory) or [32]
    padded = max([d, *_numbers("Pad", factory)])
    # As much as the gradients take, or as the tensors of the index do, which are in the file.
    stored = sum(tensor.numel() for tensor in (tensors or {}).values())
    array = min(_LARGEST_ARRAY, max(_SMALL_ARRAY, n * d, 4 * stored))
    row_bytes = 4 * padded + 8 * max(links) * ("HNSW" in factory)
    sizes_fit = (
        all(1 <= number <= limit for number in numbers)
        and max(bits) <= (8 if "HNSW" in factory else _MOST_BITS)
        and 2 <= min(links) <= max(links) <= _MOST_LINKS
        and padded <= 2 * d + 64
        and max([0, *_numbers("PCAW?R?|OPQ[0-9]+_|RR", factory)]) <= padded
        # A table of centroids, a transform, and all rows.
        and padded * 2 ** max(bits) * ("PQ" in factory) <= array
        and padded**2 * bool(re.search("PCA|OPQ|RR|LSH", factory)) <= array
        and n * row_bytes <= max(4 * array, 16 * n * (d + 8))
    )
    if not sizes_fit:
        raise GroodError(f"the index {factory!r} is too large for {n} gradients of dimension {d} in a file")
    for name, value in parameters.items():
        least, most = name not in _FROM_ZERO, _MOST_REFINED if name == "k_factor_rf" else limit
        if _PARAMETER.fullmatch(name) is None or not math.isfinite(value) or not least <= value <= most:
            raise GroodError(
                f"the search parameter {name!r} with value {value!r} cannot be kept in a file with {n} gradients"
            )


def _numbers(before: str, factory: str) -> list[int]:
    return [int(number) for number in re.findall(rf"(?:{before})([0-9]+)", factory)]


def _core(faiss: Any, index: Any) -> Any:
    return _unwrapped(faiss, index)[1]


def _unwrapped(faiss: Any, index: Any) -> tuple[list[Any], Any]:
    """The transforms before an index, and the index behind them; both live as long as `index`."""
    index = faiss.downcast_index(index)
    if not hasattr(index, "chain"):
        return [], index
    transforms = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
    return transforms, faiss.downcast_index(index.index)


def _arrays(faiss: Any, index: Any) -> list[_Array]:
    """The arrays of an index beside lists and graphs, trained or not."""
    chain, core = _unwrapped(faiss, index)
    arrays: list[_Array] = []
    for i, transform in enumerate(chain):
        kind = type(transform).__name__
        if kind in _LINEAR:
            arrays.append(_Array(f"transform{i}.matrix", transform.A, (transform.d_out, transform.d_in)))
            if transform.have_bias:
                arrays.append(_Array(f"transform{i}.bias", transform.b, (transform.d_out,)))
        elif kind != "RemapDimensionsTransform":
            raise _UnknownKindError
    if hasattr(core, "nlist") and type(faiss.downcast_index(core.quantizer)).__name__ not in _FLAT | _GRAPH:
        raise _UnknownKindError
    codes = faiss.downcast_index(core.storage) if type(core).__name__ in _GRAPH else core
    kind = type(codes).__name__
    if kind in _SCALAR:
        arrays.append(_Array("sq.range", codes.sq.trained, (_range_length(faiss, codes.sq),)))
    elif kind in _PRODUCT:
        arrays.append(_Array("pq.centroids", codes.pq.centroids, (codes.pq.M, codes.pq.ksub, codes.pq.dsub)))
    elif kind not in _FLAT:
        raise _UnknownKindError
    return arrays


def _range_length(faiss: Any, quantizer: Any) -> int:
    scalar = faiss.ScalarQuantizer
    if quantizer.qtype in (scalar.QT_fp16, scalar.QT_bf16):
        return 0
    if quantizer.qtype in (scalar.QT_8bit, scalar.QT_6bit, scalar.QT_4bit):
        return 2 * int(quantizer.d)
    raise _UnknownKindError


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> npt.NDArray[Any]:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise FormatError(f"the index lacks its {name}; the file was altered")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(
            f"{name} of the index is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}; the file was altered"
        )
    # NaN is the least and the greatest of all; `isfinite` would take as much memory as the tensor.
    if tensor.is_floating_point() and tensor.numel() and not all(bool(end.isfinite()) for end in tensor.aminmax()):
        raise FormatError(f"{name} of the index holds NaN or infinity; the file was altered")
    return tensor.cpu().contiguous().numpy()


def _graph_of(faiss: Any, index: Any, prefix: str) -> dict[str, Tensor]:
    graph = index.hnsw
    return {
        f"{prefix}levels": torch.from_numpy(faiss.vector_to_array(graph.levels)),
        f"{prefix}neighbors": torch.from_numpy(faiss.vector_to_array(graph.neighbors)),
        f"{prefix}entry": torch.tensor(graph.entry_point, dtype=torch.int32),
    }


def _give_graph(faiss: Any, index: Any, tensors: dict[str, Tensor], prefix: str, n: int) -> None:
    """Give an index the graph of its n rows, if a search in it reads nothing that is not there."""
    graph = index.hnsw
    # Slots that a row has below each level, cumulated.
    slots = faiss.vector_to_array(graph.cum_nneighbor_per_level).astype(np.int64)
    levels = _take(tensors, f"{prefix}levels", (n,), torch.int32)
    if levels.min() < 1 or levels.max() >= len(slots):
        raise FormatError(f"{prefix}levels of the index are not from 1 to {len(slots) - 1}; the file was altered")
    offsets = np.concatenate([[0], np.cumsum(slots[levels])])
    neighbors = _take(tensors, f"{prefix}neighbors", (int(offsets[-1]),), torch.int32)
    if neighbors.min() < -1 or neighbors.max() >= n:
        raise FormatError(f"{prefix}neighbors of the index are not all among its {n} rows; the file was altered")
    entry = int(_take(tensors, f"{prefix}entry", (), torch.int32))
    if not 0 <= entry < n or levels[entry] != levels.max():
        raise FormatError(f"{prefix}entry of the index is no row of the highest level; the file was altered")
    for level in range(1, int(levels.max())):
        rows = np.flatnonzero(levels > level)
        found = neighbors[offsets[rows, None] + np.arange(slots[level], slots[level + 1])]
        if (levels[found[found >= 0]] <= level).any():
            raise FormatError(f"{prefix}neighbors of the index lie on a level that they lack; the file was altered")
    faiss.copy_array_to_vector(levels, graph.levels)
    faiss.copy_array_to_vector(offsets.astype(np.uint64), graph.offsets)
    faiss.copy_array_to_vector(neighbors, graph.neighbors)
    graph.entry_point, graph.max_level = entry, int(levels.max()) - 1
    index.ntotal = n
