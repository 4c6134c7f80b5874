"""What keeps features between runs, as the core sees it; `torch_grood.data.FeatureCache` is one.

A pass over images consists of numbered batches. A store keeps tensors of each, its *columns*, in *journals*, and
running sums over the batches up to one; `torch_grood.stored_pass` says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from torch_grood.features import Extraction

__all__ = ["Columns", "FeatureStore", "Step", "StoredPass", "Sums"]

Columns = Mapping[str, Tensor]


class Step(NamedTuple):
    """One batch of a pass.

    Attributes:
        batch: its number.
        positions: of its readable images in the data set, int64 (b,).
        labels: int64 (b,), −1 where there are none.
        images: (b, ...); None if all that was asked for is kept.
        kept: the columns that are kept of it, by journal.
    """

    batch: int
    positions: Tensor
    labels: Tensor
    images: Tensor | None
    kept: Mapping[str, Columns]


class Sums(NamedTuple):
    """Running sums of classes.

    Attributes:
        end: the number of batches that are in them.
        labels: of the classes, int64 (k,).
        values: float64 (k, ...).
    """

    end: int
    labels: Tensor
    values: Tensor


class StoredPass(Protocol):
    """What a store has of one pass, and where it takes more."""

    def __len__(self) -> int:
        """The number of batches."""

    def steps(
        self, templates: Mapping[str, Columns], layer: str | None = None, batches: range | None = None
    ) -> Iterable[Step]:
        """Batches in order, with images where something is missing.

        Args:
            templates: the columns of each journal that is wanted, without rows: they tell dtypes and shapes.
            layer: whose sums are wanted; None: none.
            batches: those that are wanted, side by side; None: all.
        """

    def missing(self, templates: Mapping[str, Columns]) -> list[int]:
        """Numbers of the batches that a journal lacks."""

    def keep(self, step: Step, journal: str, columns: Columns) -> None:
        """Take columns of a batch that are not kept yet."""

    def flush(self, *, force: bool) -> bool:
        """Write what was taken, if it is time; whether it was."""

    def sums(self, layer: str) -> Sequence[Sums]:
        """The kept sums of a layer, to be set one after another: those of a later one replace those before."""

    def summed(self, layer: str) -> int:
        """The number of batches in a layer's kept sums, which are not read for it."""

    def drop_sums(self, layer: str) -> None:
        """Delete the kept sums of a layer."""

    def wants_sums(self, layer: str, nbytes: int) -> bool:
        """Whether it is time to write sums of this size."""

    def keep_sums(self, layer: str, sums: Sums) -> None:
        """Write the sums of the classes whose sums changed since the last time."""

    def images(self, positions: Sequence[int]) -> list[Tensor]:
        """Read images (...) by their positions."""


@runtime_checkable
class FeatureStore(Protocol):
    """Keeps features between runs."""

    def first_image(self, loader: Any) -> Tensor:
        """The first image that the loader will deliver, (1, ...).

        Raises:
            GroodError: if the loader does not tell its files, or none can be read.
        """

    def open(self, loader: Any, key: Mapping[str, Any], probe: Extraction) -> StoredPass:
        """What is there of the loader's images under the given key.

        Args:
            loader: of known files.
            key: JSON-able, all that the features depend on beyond the loader.
            probe: what the model says of the first image.
        """
