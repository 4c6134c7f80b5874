"""Training images as batches of pixels: from files by worker processes, or decoded once and kept in memory.

Both give the same pixels (a test holds them together); which one is used is a matter of memory and speed. Pixels cross
from the workers, and to an accelerator, as uint8, a quarter of the bytes; they are normalised where the network runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torch_grood._progress import Progress, track
from torch_grood.data.dataset import default_workers
from torch_grood.data.images import BadImageError, load_image
from torch_grood.data.sources import ImageSource
from torch_grood.errors import GroodError
from torch_grood.training.augmentation import Augmentation

__all__ = ["ImageFiles", "Images", "ImagesInMemory", "Wanted", "open_images"]

_CHANNELS = 3
_DECODED_AT_A_TIME = 256


class Wanted(NamedTuple):
    """Images of one batch."""

    epoch: int
    positions: Sequence[int]


class Images(Protocol):
    """Training or validation images."""

    labels: Tensor

    def __len__(self) -> int: ...

    def batches(self, wanted: Iterable[Wanted]) -> Iterator[Tensor]:
        """Pixels (b, 3, H, W) uint8, in channels-last memory, one batch after another."""
        ...


class _Read(NamedTuple):
    """A batch from a worker: pixels (b, H, W, 3), or what stood against it.

    A tuple, because a DataLoader pins what lies in tuples, and leaves other classes as they are.
    """

    pixels: Tensor
    bad: tuple[str, str] | None = None


class ImageFiles:
    """Reads every image anew, in worker processes.

    Args:
        source: files with labels.
        augmentation: what the network sees of them.
        workers: processes; 0 reads in this one.
        pin: put batches where an accelerator copies them from fastest.

    Attributes:
        labels: int64 (n,).
    """

    def __init__(self, source: ImageSource, augmentation: Augmentation, workers: int, pin: bool = False) -> None:
        self.labels = torch.tensor(source.labels, dtype=torch.int64)
        self.augmentation = augmentation
        self.workers = workers
        self._source = source
        self._pin = pin

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, wanted: Iterable[Wanted]) -> Iterator[Tensor]:
        """As `Images.batches`.

        Raises:
            BadImageError: for a file that cannot be read.
        """
        reads: DataLoader[Any] = DataLoader(
            _Itself(),
            batch_sampler=_AsBatches(wanted),
            num_workers=self.workers,
            collate_fn=self._read,
            worker_init_fn=_leave_interrupts,
            pin_memory=self._pin,
        )
        for read in reads:
            if read.bad is not None:
                path, reason = read.bad
                raise BadImageError(path, f"{reason}; replace or remove the file, and run again")
            yield read.pixels.permute(0, 3, 1, 2)

    def _read(self, items: Sequence[tuple[int, int]]) -> _Read:
        pixels = torch.empty(len(items), *self.augmentation.size, _CHANNELS, dtype=torch.uint8)
        for row, (epoch, position) in zip(pixels.numpy(), items, strict=True):
            path = self._source.paths[position]
            try:
                row[:] = self.augmentation(load_image(path), epoch, position)
            except BadImageError as error:
                return _Read(pixels[:0], (path, error.reason))
            except GroodError as error:
                return _Read(pixels[:0], (path, str(error)))
        return _Read(pixels)


class ImagesInMemory:
    """Images that were decoded once.

    Args:
        padded: as in evaluation, with the augmentation's margin of black around, so that a window is one gather;
            (n, H + 2 margin, W + 2 margin, 3) uint8.
        labels: int64 (n,).
        augmentation: one that acts on pixels.
        pin: see `ImageFiles`.
    """

    def __init__(self, padded: Tensor, labels: Tensor, augmentation: Augmentation, pin: bool = False) -> None:
        self._pin = pin
        self.labels = labels
        self.augmentation = augmentation
        self._padded = padded

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, wanted: Iterable[Wanted]) -> Iterator[Tensor]:
        """As `Images.batches`."""
        height, width = self.augmentation.size
        rows, columns = torch.arange(height), torch.arange(width)
        for epoch, positions in wanted:
            top, left, mirrored = map(torch.from_numpy, self.augmentation.windows(epoch, positions))
            across = torch.where(mirrored[:, None], columns.flip(0), columns) + left[:, None]
            down = rows + top[:, None]
            picked = self._padded[torch.tensor(positions)[:, None, None], down[:, :, None], across[:, None, :]]
            yield (picked.pin_memory() if self._pin else picked).permute(0, 3, 1, 2)


def open_images(
    source: ImageSource,
    augmentation: Augmentation,
    *,
    memory: int,
    workers: int | None = None,
    pin: bool = False,
    progress: Progress = None,
) -> Images:
    """The images in memory where they fit and the augmentation allows it, else as files.

    Args:
        source: files with labels.
        augmentation: what the network sees of them.
        memory: bytes that decoded images may take.
        workers: processes that read files; None takes one a CPU.
        pin: see `ImageFiles`.
        progress: of the decoding.

    Raises:
        BadImageError: for a file that cannot be read.
    """
    files = ImageFiles(source, augmentation, default_workers(len(source)) if workers is None else workers, pin)
    margin = augmentation.margin
    height, width = (side + 2 * margin for side in augmentation.size)
    if not augmentation.acts_on_pixels or len(source) * height * width * _CHANNELS > memory:
        return files
    plain = ImageFiles(source, Augmentation(augmentation.transform), files.workers)
    padded = torch.zeros(len(source), height, width, _CHANNELS, dtype=torch.uint8)
    inner = padded[:, margin : height - margin, margin : width - margin]
    starts = range(0, len(source), _DECODED_AT_A_TIME)
    wanted = [Wanted(0, range(start, min(start + _DECODED_AT_A_TIME, len(source)))) for start in starts]
    for start, batch in zip(track(starts, progress, "decoding"), plain.batches(wanted), strict=True):
        inner[start : start + len(batch)] = batch.permute(0, 2, 3, 1)
    return ImagesInMemory(padded, files.labels, augmentation, pin)


class _Itself(Dataset[Any]):
    """A data set of which item i is i: the workers get what is wanted and do the reading where they collate."""

    def __getitem__(self, item: Any) -> Any:
        return item


class _AsBatches:
    """What is wanted in the form of a batch sampler."""

    def __init__(self, wanted: Iterable[Wanted]) -> None:
        self._wanted = wanted

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, positions in self._wanted:
            yield [(epoch, position) for position in positions]


def _leave_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of a terminal, SIGTERM those of a job; what becomes of it the main one decides."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
