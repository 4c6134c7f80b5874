"""The files that the fuzzer starts from: one of each kind that a detector's file can be.

The golden files of every format are among them; the others are written at the start, from a seed, so that they follow
every change of the code. They are small: what an attack costs is seen best where the file itself costs nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import format_file
from torch_grood import GROOD, ClassSample, FaissIndex, Mixup
from torch_grood.neighbors import ExactIndex, exact, filter
from torch_grood.neighbors.exact import ExactSearcher
from torch_grood.neighbors.filter import BoundFilter

__all__ = ["Base", "as_with_bfloat16", "corpus"]

GOLDEN = Path(__file__).parent / "golden"
# Every kind that has a stored state, alone and behind others, and the kinds that are built again.
FAISS = {
    "flat": "Flat",
    "lists": "IVF8,Flat",
    "graph": "HNSW8",
    "graph-of-lists": "IVF8_HNSW4,SQ8",
    "pca-lists-codes": "PCA4,IVF8,PQ2x4",
    "rotated-graph": "RR6,HNSW4,SQ8",
    "codes": "PQ4x4",
    "opq": "OPQ2_8,IVF4,PQ2x4",
    "padded": "Pad16,SQ4",
    "half": "IVF4,SQfp16",
    "rebuilt-lsh": "LSH",
    "rebuilt-fast": "IVF4,PQ4x4fs",
    "rebuilt-refined": "IVF4,PQ4x4,RFlat",
}
# As wide as processors with tiles have it, in the small.
_WIDE = 20


class Base(NamedTuple):
    """A whole file.

    Attributes:
        name: tells its kind.
        content: its bytes.
        header: its description.
        tensors: but the checksums.
    """

    name: str
    content: bytes
    header: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def version(self) -> int:
        """Of its format; there are hashes from 3 on."""
        return int(self.header["format_version"])


def corpus(extra: Path | None = None) -> list[Base]:
    """All bases, those in the folder `extra` too: the same at every start."""
    bases: list[Base] = []
    with tempfile.TemporaryDirectory() as name, as_with_bfloat16(), _silent():
        for kind, detector in _detectors():
            path = Path(name, kind)
            with _patched(exact, "_WORTH_KEEPING", 0):
                detector.save(path)
            bases.append(_base(path))
    found = [*sorted(GOLDEN.glob("*.grood")), *(sorted(extra.glob("*.grood")) if extra else [])]
    return bases + [_base(path) for path in found]


@contextmanager
def as_with_bfloat16() -> Iterator[None]:
    """As on a processor that multiplies bfloat16 in tiles: a filter of more than a few directions is rounded to it."""
    with _patched(filter, "_in_bfloat16", lambda m, device: m >= _WIDE):
        yield


@contextmanager
def _silent() -> Iterator[None]:
    """Without faiss's warnings, which it writes from C++: every training set here is small."""
    before = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@contextmanager
def _patched(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _base(path: Path) -> Base:
    header, tensors = format_file.parts(path)
    return Base(path.name, path.read_bytes(), header, {name: tensor.clone() for name, tensor in tensors.items()})


def _gaussians(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    centres = 3 * torch.randn(4, d, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % 4
    return centres[labels] + torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), labels


def _fitted(n: int = 120, d: int = 8, **arguments: Any) -> GROOD:
    return GROOD(None, **arguments).fit_features(*_gaussians(n, d, 1))


def _detectors() -> Iterator[tuple[str, GROOD]]:
    held_out = _gaussians(80, 8, 2)[0]
    for store in ("float32", "float16", "int8"):
        yield store, _fitted(store=store).calibrate_features(held_out, fpr=0.1)
    yield "per-class", _fitted(subset=ClassSample(ratio=0.5)).calibrate_features(held_out, fpr=0.2, per_class=True)
    yield "images", _on_images()
    yield "filter", _with_filter("float32", (5,))
    yield "filter-in-stages", _with_filter("int8", (5, 12))
    yield "filter-of-bfloat16", _with_filter("float32", (_WIDE, 28))
    for kind, spec in FAISS.items():
        index = FaissIndex(spec, candidates=2, quality_queries=20)
        yield kind, _fitted(640, index=index, store="int8" if kind == "codes" else "float32")
    yield "lists-with-parameters", _fitted(320, index=FaissIndex("IVF8_HNSW4,Flat", {"nprobe": 3}))
    yield "tall", _fitted(4000, 16, index=FaissIndex("IVF32,SQ8", quality_queries=20))
    yield "wide", _fitted(6, 3000)


def _with_filter(store: str, widths: tuple[int, ...]) -> GROOD:
    """A detector whose filter is in its file, which else only large ones have."""
    detector = _fitted(600, 32, store=store)
    state = detector._need_state()
    gradients = state.searcher.gradients
    vectors = gradients.take(slice(None)).vectors(float(gradients.log_norm().max()))
    axes = torch.linalg.eigh((vectors.T @ vectors).double()).eigenvectors.flip(1)
    index = ExactIndex()
    searcher = ExactSearcher(gradients, index, BoundFilter(gradients, axes, widths, index.byte_budget))
    detector._adopt(replace(state, searcher=searcher), detector.threshold_, detector.calibration_)
    return detector


class _Photographs:
    """Batches with the names of their images."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images, labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self._images.split(16), self._labels.split(16), strict=True))

    def names(self) -> list[str]:
        return [f"photographs/class {label}/Übung {i}.png" for i, label in enumerate(self._labels.tolist())]


def _on_images() -> GROOD:
    """A detector with a model's fingerprint, names, and the metadata that `grood fit` writes."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        images = torch.randn(110, 3, 6, 6, generator=generator)
        labels = model.eval()(images).argmax(1)
    labels[:3] = torch.arange(3)
    detector = GROOD(model, outliers=Mixup(n=10), seed=3)
    detector.fit(_Photographs(images[:60], labels[:60]), progress=False)
    detector.calibrate([images[60:]], fpr=0.1, progress=False)
    detector.metadata = {
        "model": {"spec": "torchvision:resnet18", "weights": "flowers.safetensors", "num_classes": 3},
        "transform": {"resize": 232, "crop": [6, 6], "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.2] * 3},
        "training": {"paths": ["photographs"]},
        "calibration": {"paths": ["held out"]},
    }
    return detector
