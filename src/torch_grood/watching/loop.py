"""From inputs to rows: read, decide, write, one batch after the other, while the next one is read.

An input leaves this loop as one row, or it stays in its source. What cannot be read is tried again twice, and then has
a row that says why; what a runtime refuses has one at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch_grood._optional import require
from torch_grood.data.images import MAX_PIXELS, BadImageError, decode_image
from torch_grood.errors import GroodError, MissingDependencyError
from torch_grood.runtime.base import decide_each
from torch_grood.watching.files import SystemLimitError
from torch_grood.watching.journal import Journal
from torch_grood.watching.requests import HELD
from torch_grood.watching.rows import Row, decision_row, error_row, now
from torch_grood.watching.source import Gone, Item, Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from torch_grood.data.transforms import ImageTransform
    from torch_grood.runtime import Runtime

__all__ = ["TRIES", "Counts", "watch"]

TRIES = 3
# How soon a wish to stop is granted while there is nothing to do, in seconds.
_SLICE = 0.1
# A network whose preprocessing leaves the size has seen small images; a batch of those that `MAX_PIXELS` allows would
# take gigabytes.
_MAX_UNCROPPED = 4_000_000


@dataclass(frozen=True)
class Counts:
    """What has become of the inputs.

    Attributes:
        images: that have a decision or a score.
        ood: of these, decided to be OOD.
        errors: inputs that have a row that says why there is no score.
        gone: files that were deleted or replaced between being found and being read.
    """

    images: int = 0
    ood: int = 0
    errors: int = 0
    gone: int = 0


def watch(
    source: Source,
    runtime: Runtime,
    journal: Journal,
    by: str,
    *,
    batch_size: int = 64,
    max_wait: float = 0.2,
    threads: int = 2,
    retry_after: float = 1.0,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Decide about all that a source hands out, until it ends or is stopped.

    Args:
        source: of inputs.
        runtime: decides.
        journal: takes the rows.
        by: what decides, as rows say it.
        batch_size: images that the runtime gets at a time, at most.
        max_wait: seconds that an image waits for others to share a batch with, while nothing is under way.
        threads: that read and prepare images.
        retry_after: seconds until an unreadable file is tried again.
        stop: whether to stop after the batch under way.
        tell: is told the counts after each batch.

    Raises:
        GroodError: if what is watched is gone, or the rows cannot be written. What is in the journal then is whole, and
            the next run does the rest.
    """
    require("PIL.Image", extra="cli")
    loop = _Loop(source, runtime, journal, by, batch_size, max_wait, retry_after, stop)
    with ThreadPoolExecutor(threads, "grood-watch") as pool:
        try:
            reading: list[_Reading] = []
            while True:
                batch = loop.batch(wait=not reading)
                begun = [_Reading(item, pool.submit(_prepared, item, runtime.transform)) for item in batch]
                if reading:
                    loop.finish(reading)
                    tell(loop.counts)
                elif not begun and loop.over():
                    tell(loop.counts)
                    return loop.counts
                reading = begun
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(eq=False, slots=True)
class _Reading:
    item: Item
    result: Future[Any]


def _prepared(item: Item, transform: ImageTransform) -> NDArray[np.uint8] | GroodError | Gone:
    """The pixels of an image, or why there are none; runs in a thread."""
    item.tries += 1
    name = item.path or "the image"
    most = MAX_PIXELS if transform.output_size else _MAX_UNCROPPED
    try:
        return transform.pixels(decode_image(item.read(), name, max_pixels=most))
    except Gone as gone:
        return gone
    except OSError as error:
        return BadImageError(name, error.strerror or type(error).__name__)
    except (MissingDependencyError, SystemLimitError):
        raise
    except GroodError as error:
        return error


class _Again(NamedTuple):
    """An input that is to be read once more, and why it could not be read."""

    due: float
    item: Item
    reason: str


class _Loop:
    """The state of `watch`, in the thread that decides and writes."""

    def __init__(
        self,
        source: Source,
        runtime: Runtime,
        journal: Journal,
        by: str,
        batch_size: int,
        max_wait: float,
        retry_after: float,
        stop: Callable[[], bool],
    ) -> None:
        self._source, self._runtime, self._journal, self._by = source, runtime, journal, by
        self._size, self._max_wait, self._retry_after, self._stop = batch_size, max_wait, retry_after, stop
        # In the order in which they are due.
        self._again: deque[_Again] = deque()
        self.counts = Counts()

    def batch(self, *, wait: bool) -> list[Item]:
        """The next inputs to read; without waiting, those at hand."""
        items: list[Item] = []
        since = time.monotonic()
        while True:
            items += self._due(self._size - len(items))
            room = self._size - len(items)
            if room == 0 or sum(item.weight for item in items) >= HELD:
                return items
            now_ = time.monotonic()
            left = min(_SLICE, since + self._max_wait - now_) if items else _SLICE
            found = self._source.take(room, max(left, 0) if wait else 0)
            if found and not items:
                since = time.monotonic()
            items += found
            if found and len(items) < self._size and left > 0 and wait and not self._stop():
                continue
            if not wait or self._stop() or (items and left <= 0):
                return items
            if self._source.ended and not found:
                if items or not self._again:
                    return items
                time.sleep(_SLICE)

    def over(self) -> bool:
        """Whether all is done that can be, when nothing is under way and nothing is at hand."""
        if not self._stop():
            return self._source.ended and not self._again
        if not self._source.durable:
            # They would not come again.
            self._write([(again.item, self._error(again.item, again.reason)) for again in self._again])
            self._again.clear()
        return True

    def finish(self, reading: Sequence[_Reading]) -> None:
        """Decide about inputs that were read, and write their rows in the order in which they came."""
        rows: dict[Item, Row] = {}
        readable: list[tuple[Item, NDArray[np.uint8]]] = []
        for item, result in ((reading.item, reading.result.result()) for reading in reading):
            if isinstance(result, Gone):
                self._source.release(item)
                self.counts = replace(self.counts, gone=self.counts.gone + 1)
            elif not isinstance(result, GroodError):
                readable.append((item, result))
            elif item.again and item.tries < TRIES:
                self._again.append(_Again(time.monotonic() + self._retry_after, item, _reason_of(result)))
            else:
                rows[item] = self._error(item, _reason_of(result))
        decided = decide_each(self._runtime, [pixels for _, pixels in readable])
        for (item, _), decision in zip(readable, decided, strict=True):
            rows[item] = (
                self._error(item, str(decision))
                if isinstance(decision, GroodError)
                else decision_row(item, decision, self._runtime.classes, self._by, now())
            )
        self._write([(item, rows[item]) for item in (reading.item for reading in reading) if item in rows])

    def _due(self, most: int) -> list[Item]:
        items: list[Item] = []
        while self._again and len(items) < most and not self._stop() and self._again[0].due <= time.monotonic():
            items.append(self._again.popleft().item)
        return items

    def _error(self, item: Item, reason: str) -> Row:
        return error_row(item, reason, self._by, now())

    def _write(self, rows: Sequence[tuple[Item, Row]]) -> None:
        self._journal.append([row for _, row in rows])
        self._source.done([item for item, _ in rows])
        errors = sum(row["error"] is not None for _, row in rows)
        ood = sum(row["is_ood"] is True for _, row in rows)
        before = self.counts
        self.counts = replace(
            before,
            images=before.images + len(rows) - errors,
            ood=before.ood + ood,
            errors=before.errors + errors,
        )


def _reason_of(error: GroodError) -> str:
    return error.reason if isinstance(error, BadImageError) else str(error)
