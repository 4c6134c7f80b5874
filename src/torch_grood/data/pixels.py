"""Image files as batches of uint8 pixels, read by threads: for runtimes that work without torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np

from torch_grood.data.images import BadImageError
from torch_grood.data.sources import ImageSource
from torch_grood.data.transforms import ImageTransform
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PixelLoader", "default_threads", "mixed_sizes", "usable_cpus"]

# Images that are read ahead, in batches.
_AHEAD = 2
_MOST_THREADS = 8


class PixelLoader:
    """Batches (b, H, W, 3) uint8 of a source's images, in its order; a batch may be empty where files are left out.

    It can be iterated again; each pass reads the files anew.

    Args:
        source: from `read_source`.
        transform: of the images.
        batch_size: images in a full batch.
        threads: that read files; None: one a CPU, at most 8.
        on_bad: "raise" stops at an unreadable file, "skip" leaves it out and lists it in `bad`.

    Attributes:
        bad: (path, reason) of the files that the current or last pass left out.

    Raises:
        BadImageError: while iterating, for an unreadable file.
        GroodError: while iterating, if images of one batch differ in size.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: ImageTransform,
        *,
        batch_size: int = 64,
        threads: int | None = None,
        on_bad: Literal["raise", "skip"] = "raise",
    ) -> None:
        self.source = source
        self.bad: list[tuple[str, str]] = []
        self._transform, self._batch_size, self._on_bad = transform, batch_size, on_bad
        self._threads = default_threads() if threads is None else max(1, threads)
        self._kept: list[str] = []

    def __len__(self) -> int:
        return -(-len(self.source) // self._batch_size)

    def names(self) -> list[str]:
        """Paths of the images that the current or last pass delivered, in order."""
        return self._kept

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        self.bad, self._kept = [], []
        paths, size = self.source.paths, self._batch_size
        with ThreadPoolExecutor(self._threads) as pool:
            pending: deque[list[tuple[str, Future[NDArray[np.uint8]]]]] = deque()
            try:
                for start in range(0, len(paths), size):
                    batch = range(start, min(start + size, len(paths)))
                    pending.append([(paths[position], pool.submit(self._read, position)) for position in batch])
                    if len(pending) > _AHEAD:
                        yield self._gathered(pending.popleft())
                while pending:
                    yield self._gathered(pending.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self, position: int) -> NDArray[np.uint8]:
        image = self.source.image(position)
        try:
            return self._transform.pixels(image)
        except GroodError as error:
            raise BadImageError(self.source.paths[position], str(error)) from None

    def _gathered(self, batch: list[tuple[str, Future[NDArray[np.uint8]]]]) -> NDArray[np.uint8]:
        images: list[NDArray[np.uint8]] = []
        first = ""
        for path, future in batch:
            try:
                image = future.result()
            except BadImageError as error:
                if self._on_bad == "raise":
                    raise BadImageError(
                        path, f"{error.reason}; on_bad='skip' (--skip-bad) leaves such files out"
                    ) from None
                self.bad.append((error.path, error.reason))
                continue
            first = first or path
            if images and image.shape != images[0].shape:
                raise GroodError(mixed_sizes((first, images[0].shape[:2]), (path, image.shape[:2])))
            images.append(image)
            self._kept.append(path)
        return np.stack(images) if images else np.empty((0, 1, 1, 3), np.uint8)


def mixed_sizes(*images: tuple[str, tuple[int, ...]]) -> str:
    """What to say of images of one batch, each with its height and width, that differ in size."""
    named = [f"{path} is {width} × {height}" for path, (height, width) in images]
    return (
        f"images of one batch must have one size, but {' and '.join(named)} (width × height); "
        "give the transform a crop, or a resize to (height, width)"
    )


def default_threads() -> int:
    """That read images: one a CPU, up to what a disk and a decision keep busy."""
    return min(usable_cpus(), _MOST_THREADS)


def usable_cpus() -> int:
    """Of this process."""
    # A container's share, where the platform tells; os.cpu_count() counts the whole machine.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
