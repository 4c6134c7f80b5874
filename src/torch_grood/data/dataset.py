"""Image files as batches (images, labels, positions), with unreadable files either refused or left out and counted.

Files are read by worker processes. An unreadable file travels back inside its batch as a record, not as an exception:
so it can be counted in the main process, and the message stays one line instead of a worker's traceback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torch_grood.data.images import BadImageError
from torch_grood.data.pixels import mixed_sizes, usable_cpus
from torch_grood.data.sources import ImageSource
from torch_grood.data.transforms import ImageTransform
from torch_grood.errors import GroodError

__all__ = ["ImageDataset", "ImageLoader", "OnBad", "default_workers", "image_loader"]

OnBad = Literal["raise", "skip"]
Batch = tuple[Tensor, Tensor, Tensor]

UNLABELLED = -1

SMALL_SOURCE = 500


class _Read(NamedTuple):
    """What became of one batch of positions; crosses from a worker to the main process."""

    images: Tensor
    labels: Tensor
    positions: Tensor
    bad: list[tuple[str, str]]
    error: str | None = None


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """The images of a source, transformed: item i is (image (3, H, W) float32, label, i).

    The label is −1 where the source has none. Indexing raises `BadImageError` for an unreadable file; to leave such
    files out, read through `image_loader`.

    Attributes:
        source: the files and labels.
        classes: names of the classes, or None.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform, on_bad: OnBad = "raise") -> None:
        if on_bad not in ("raise", "skip"):
            raise GroodError(f"on_bad must be 'raise' or 'skip', not {on_bad!r}")
        self.source = source
        self.transform = transform
        self.on_bad = on_bad
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int]:
        image = self.source.image(position)
        try:
            tensor = self.transform(image)
        except GroodError as error:
            raise BadImageError(self.source.paths[position], str(error)) from None
        label = UNLABELLED if self.source.labels is None else self.source.labels[position]
        return tensor, label, position

    def read(self, positions: Sequence[int]) -> _Read:
        """Read one batch; runs in a worker process."""
        items: list[tuple[Tensor, int, int]] = []
        bad: list[tuple[str, str]] = []
        for position in positions:
            try:
                items.append(self[position])
            except BadImageError as error:
                bad.append((error.path, error.reason))
                if self.on_bad == "raise":
                    break
            except GroodError as error:
                return self._nothing(bad)._replace(error=str(error))
        if not items:
            return self._nothing(bad)
        images, labels, kept = zip(*items, strict=True)
        for image, position in zip(images, kept, strict=True):
            if image.shape != images[0].shape:
                return self._nothing(bad)._replace(error=self._size_error(kept[0], images[0], position, image))
        return _Read(torch.stack(images), torch.tensor(labels), torch.tensor(kept), bad)

    def _nothing(self, bad: list[tuple[str, str]]) -> _Read:
        height, width = self.transform.output_size or (1, 1)
        none = torch.empty(0, dtype=torch.int64)
        return _Read(torch.empty(0, 3, height, width), none, none, bad)

    def _size_error(self, first: int, one: Tensor, second: int, other: Tensor) -> str:
        named = [
            (self.source.paths[position], tuple(image.shape[1:])) for position, image in ((first, one), (second, other))
        ]
        return mixed_sizes(*named)


class ImageLoader:
    """Batches (images (b, 3, H, W) float32, labels (b,) int64, positions (b,) int64) in the order of the source.

    A batch in which every file is bad has 0 images. It can be iterated again; each pass reads the files anew.

    Attributes:
        dataset: the `ImageDataset`, with `classes`.
        batch_size: images in a full batch.
        workers: number of processes that read files; 0 reads in this one.
        bad: (path, reason) of the files that the current or last pass left out.
        kept: positions of the images that it delivered, in order.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, workers: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.workers = workers
        self.bad: list[tuple[str, str]] = []
        self.kept: list[int] = []

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self.restart()
        yield from self.read(0, len(self))

    @property
    def source(self) -> ImageSource:
        """The files."""
        return self.dataset.source

    def names(self) -> list[str]:
        """Paths of the images that the current or last pass delivered, in order."""
        paths = self.dataset.source.paths
        return [paths[position] for position in self.kept]

    def restart(self) -> None:
        """Begin a pass that consists of `read` and `recall`: nothing is delivered or left out yet."""
        self.bad, self.kept = [], []

    def read(self, first: int, end: int) -> Iterator[Batch]:
        """The batches from number `first` to before `end`, as the next ones of this pass.

        Raises:
            BadImageError: for an unreadable file, if such are to be refused.
            GroodError: if images of one batch differ in size.
        """
        for read in self._read([self.positions(batch) for batch in range(first, end)]):
            if read.bad:
                self._left_out(read.bad)
            if read.error is not None:
                raise GroodError(read.error)
            self.kept += read.positions.tolist()
            yield read.images, read.labels, read.positions

    def recall(self, batch: int, positions: Tensor, reasons: Sequence[str]) -> Tensor:
        """Take a batch as read that an earlier pass has read, without reading it.

        Args:
            batch: its number.
            positions: of the images that it delivered.
            reasons: why it left out the others, in order.

        Returns:
            the labels.

        Raises:
            BadImageError: if files were left out and are to be refused.
        """
        kept = positions.tolist()
        missing = sorted(set(self.positions(batch)) - set(kept))
        paths = self.dataset.source.paths
        self._left_out([(paths[position], reason) for position, reason in zip(missing, reasons, strict=True)])
        self.kept += kept
        labels = self.dataset.source.labels
        return torch.tensor([UNLABELLED if labels is None else labels[i] for i in kept], dtype=torch.int64)

    def positions(self, batch: int) -> range:
        """Positions of a batch's files, good or bad."""
        start = batch * self.batch_size
        return range(start, min(start + self.batch_size, len(self.dataset)))

    def first_image(self) -> Tensor:
        """The first image that a pass delivers, (1, 3, H, W), read by itself.

        Raises:
            BadImageError: for an unreadable file before it, if such are to be refused.
            GroodError: if no file can be read.
        """
        bad: list[tuple[str, str]] = []
        for position in range(len(self.dataset)):
            try:
                return self.dataset[position][0][None]
            except BadImageError as error:
                bad.append((error.path, error.reason))
                if self.dataset.on_bad == "raise":
                    self._left_out(bad)
        raise GroodError(f"none of the {len(bad)} images of {self.dataset.source.origin} can be read")

    def images(self, positions: Sequence[int]) -> list[Tensor]:
        """The images (3, H, W) at some positions, beside any pass.

        Raises:
            BadImageError: for an unreadable file.
        """
        found: list[Tensor] = []
        for read in self._read([[position] for position in positions]):
            for path, reason in read.bad:
                raise BadImageError(path, f"{reason}; it could be read before")
            if read.error is not None:
                raise GroodError(read.error)
            # Copied: a tensor from another process holds a file open.
            found += [image.clone() for image in read.images]
        return found

    def _read(self, batches: Sequence[Sequence[int]]) -> Iterator[_Read]:
        # The workers get positions and do the reading where DataLoader expects the collation: so a batch can shrink.
        reads: DataLoader[Any] = DataLoader(
            range(len(self.dataset)),  # type: ignore[arg-type]
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self.workers if len(batches) > 1 else 0,
            collate_fn=self.dataset.read,
        )
        yield from reads

    def _left_out(self, bad: list[tuple[str, str]]) -> None:
        if bad and self.dataset.on_bad == "raise":
            path, reason = bad[0]
            raise BadImageError(path, f"{reason}; on_bad='skip' (--skip-bad) leaves such files out")
        self.bad += bad


def image_loader(
    source: ImageSource,
    transform: ImageTransform,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_bad: OnBad = "raise",
) -> ImageLoader:
    """Batches of a source's images.

    Args:
        source: from `read_source`: files, here or at URLs, or rows of Parquet files.
        transform: the model's preprocessing.
        batch_size: images in a batch.
        workers: processes that read files; None takes `default_workers`.
        on_bad: "raise" stops at an unreadable file, "skip" leaves it out and lists it in `bad`.

    Raises:
        GroodError: if a number is out of range; while iterating, if images of one batch differ in size.
        BadImageError: while iterating, for an unreadable file.
    """
    if batch_size < 1:
        raise GroodError(f"batch_size must be at least 1, not {batch_size}")
    if workers is not None and workers < 0:
        raise GroodError(f"workers must be 0 (read in this process) or more, not {workers}")
    dataset = ImageDataset(source, transform, on_bad)
    return ImageLoader(dataset, batch_size, default_workers(len(source)) if workers is None else workers)


def default_workers(n_images: int) -> int:
    """One process a CPU, at most 8; none where starting them takes longer than the reading."""
    return 0 if n_images < SMALL_SOURCE else min(usable_cpus(), 8)
