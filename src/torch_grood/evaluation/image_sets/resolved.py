"""Image sets that are ready for use: what `resolve` returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch_grood.data.sources import ImageSource
from torch_grood.evaluation.image_sets.reports import Group, SetReport
from torch_grood.evaluation.spec import BenchmarkSpec, SetSpec

__all__ = ["ImageSet", "ResolvedSets"]


@dataclass(frozen=True)
class ImageSet:
    """A set to work with.

    Attributes:
        spec: what the benchmark says of it.
        group: id, val_ood, near or far.
        source: its images; with labels in group id, without in the others.
    """

    spec: SetSpec
    group: Group
    source: ImageSource

    @property
    def key(self) -> str:
        """Its name in the spec."""
        return self.spec.key

    @property
    def is_complete(self) -> bool:
        """Whether it has as many images as the benchmark asks for, if it asks."""
        return self.spec.count in (None, len(self.source))

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class ResolvedSets:
    """The image sets of a benchmark, ready for use.

    Attributes:
        spec: the benchmark.
        root: what its paths were relative to.
        train: with labels.
        val: with labels, or None if the benchmark has none.
        test: with labels.
        val_ood: None if the benchmark has none, or it was left out.
        near: those that are there.
        far: those that are there.
        left_out: sets that the benchmark has and this disk has not.
        warnings: what a report should say beside the figures.
    """

    spec: BenchmarkSpec
    root: Path
    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    val_ood: ImageSet | None
    near: tuple[ImageSet, ...]
    far: tuple[ImageSet, ...]
    left_out: tuple[SetReport, ...] = ()
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ImageSet]:
        """All sets, in the order of the spec."""
        single = (self.train, self.val, self.test, self.val_ood)
        yield from (found for found in single if found is not None)
        yield from (*self.near, *self.far)
