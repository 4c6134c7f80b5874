"""Nearest training gradients: S(x) = min over training x' of ‖∇(x) - ∇(x')‖₂ (Algorithm 2).

An index specification (`ExactIndex`, `FaissIndex`) is plain, immutable configuration; its `build` returns a searcher
over the given gradients. Every searcher returns true distances: an approximate one may miss the nearest row, but
what it returns is re-scored from the gradients themselves.
"""

from torch_grood.neighbors.base import (
    GradientIndex,
    GradientSearcher,
    IndexQuality,
    make_index,
)
from torch_grood.neighbors.exact import ExactIndex
from torch_grood.neighbors.faiss import FaissIndex
from torch_grood.neighbors.pairs import Neighbors, log_distance, log_mean
from torch_grood.neighbors.store import GradientStore, StoreOptions
from torch_grood.neighbors.subset import ClassSample, Coverage, KCenterCoreset, Subset

__all__ = [
    "ClassSample",
    "Coverage",
    "ExactIndex",
    "FaissIndex",
    "GradientIndex",
    "GradientSearcher",
    "GradientStore",
    "IndexQuality",
    "KCenterCoreset",
    "Neighbors",
    "StoreOptions",
    "Subset",
    "log_distance",
    "log_mean",
    "make_index",
]
