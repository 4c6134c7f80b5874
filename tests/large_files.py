"""Detectors whose files are read as large ones are: checked late, and with a filter over their few gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_grood import GROOD, FaissIndex, PrototypeMean, container
from torch_grood.neighbors import ExactIndex, exact
from torch_grood.neighbors.exact import ExactSearcher
from torch_grood.neighbors.filter import BoundFilter
from torch_grood.provenance import Names, TrainingRecord


def gaussians(n: int, seed: int, d: int = 48) -> tuple[Tensor, Tensor]:
    """Features (n, d) of few directions around one centre a class, and labels."""
    generator = torch.Generator().manual_seed(99)
    centres, mix = 3 * torch.randn(4, 6, generator=generator), torch.randn(6, d, generator=generator)
    labels = torch.arange(n) % 4
    inside = centres[labels] + torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return inside @ mix + 0.01 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed + 1)), labels


QUERIES = torch.cat([gaussians(24, 7)[0], 20 * torch.randn(6, 48, generator=torch.Generator().manual_seed(8))])
KINDS = ["exact", "filter", "stages", "float16", "int8", "int8 filter", "faiss", "faiss int8"]


def detector_of(kind: str, n: int = 2000) -> GROOD:
    """A calibrated detector with names. With "filter" and "stages", its filter will be in its file."""
    store = next((dtype for dtype in ("float16", "int8") if dtype in kind), "float32")
    index: Any = FaissIndex("IVF8,Flat", {"nprobe": 2}, quality_queries=10) if "faiss" in kind else "exact"
    features, labels = gaussians(n, 1)
    detector = GROOD(None, outliers=PrototypeMean(), index=index, store=store).fit_features(features, labels)
    state = detector._need_state()
    if "filter" in kind or "stages" in kind:
        # Of few gradients else, none is made.
        gradients, widths = state.searcher.gradients, (5, 12) if "stages" in kind else (8,)
        vectors = gradients.take(slice(None)).vectors(float(gradients.log_norm().max()))
        axes = torch.linalg.eigh((vectors.T @ vectors).double()).eigenvectors.flip(1)
        bounds = BoundFilter(gradients, axes, widths, ExactIndex().byte_budget)
        state = replace(state, searcher=ExactSearcher(gradients, ExactIndex(), bounds))
    hashes = detector.training_.hashes  # type: ignore[union-attr]
    names = Names.of([f"class {i % 4}/image {i}.png" for i in range(n)])
    detector._adopt(replace(state, training=TrainingRecord(hashes, names)), detector.threshold_, detector.calibration_)
    return detector.calibrate_features(gaussians(60, 5)[0], fpr=0.1)


def save_with_filter(detector: GROOD, path: Path) -> None:
    """Save as if there were many gradients, whose filter is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_WORTH_KEEPING", 0)
        detector.save(path)


def load_late(path: Path, **arguments: Any) -> GROOD:
    """Load as if the file were large: the gradients are checked when they are used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "read", partial(container.read, eager_bytes=0))
        loaded = GROOD.load(path, **arguments)
    assert (guard_of(loaded) is None) == arguments.get("verify", False)
    return loaded


def guard_of(detector: GROOD) -> Any:
    """The guard of the rows' bytes, None if they were checked at loading."""
    rows = detector._need_state().searcher.gradients._guard
    return None if rows is None else rows._guard  # type: ignore[attr-defined]


def assert_same(first: GROOD, second: GROOD, queries: Tensor = QUERIES) -> None:
    """All that a detector says of features, bit for bit."""
    assert torch.equal(first.log_score_features(queries), second.log_score_features(queries))
    for a, b in zip(first.predict_features(queries), second.predict_features(queries), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
    for a, b in zip(first.explain_features(queries, 3), second.explain_features(queries, 3), strict=True):
        assert torch.equal(a, b)
    ids = range(0, first.fit_info_.n_read, 7)
    assert first.sample_names(list(ids)) == second.sample_names(list(ids))
