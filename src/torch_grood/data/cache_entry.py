"""One entry of a feature cache: a pass over images of which some batches are kept, and the others read and kept.

What is new is written shard by shard: first the journals, then the sums that the same batches changed. A kill between
the two leaves batches whose sums are missing, and these alone run again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from torch_grood.data.dataset import ImageLoader
from torch_grood.data.journal import Journal, KeptBatch
from torch_grood.data.sums import SumsJournal
from torch_grood.errors import GroodError
from torch_grood.feature_store import Columns, Step, Sums

__all__ = ["CacheEntry"]

_log = logging.getLogger("torch_grood")

# Sums larger than a shard are written only where this takes less than this share of the time.
_SUMS_SHARE = 0.02


class CacheEntry:
    """One pass over one loader's images; see `torch_grood.feature_store.StoredPass`."""

    def __init__(
        self,
        folder: Path,
        name: str,
        loader: ImageLoader,
        shard_images: int,
        shard_bytes: int,
        shard_seconds: float,
    ) -> None:
        self._folder, self._name, self._loader = folder, name, loader
        self._shard_images, self._shard_bytes, self._shard_seconds = shard_images, shard_bytes, shard_seconds
        self._positions = [loader.positions(batch) for batch in range(len(loader))]
        self._journals: dict[str, Journal] = {}
        self._sums: dict[str, SumsJournal] = {}
        self._summed: dict[str, int] = {}
        self._pending: dict[str, tuple[int, list[KeptBatch]]] = {}
        self._n_pending = self._bytes_pending = 0
        self._last_flush = self._last_sums = time.monotonic()
        self._sums_cost = 0.0

    def __len__(self) -> int:
        return len(self._loader)

    def steps(self, templates: Mapping[str, Columns], layer: str | None = None, batches: range | None = None) -> _Steps:
        """Batches in order; images are read where a journal, or the layer's sums, lack the batch."""
        self._open(templates)
        if layer is not None and layer not in self._summed:
            self.sums(layer)
        summed = len(self) if layer is None else self._summed[layer]
        return _Steps(self, summed, range(len(self)) if batches is None else batches)

    def missing(self, templates: Mapping[str, Columns]) -> list[int]:
        """Numbers of the batches that a journal lacks."""
        self._open(templates)
        return [batch for batch in range(len(self)) if not self._is_complete(batch, len(self))]

    def _open(self, templates: Mapping[str, Columns]) -> None:
        self._journals = {
            name: Journal(self._folder, self._name, name, template, self._positions)
            for name, template in templates.items()
        }

    def _iterate(self, summed: int, batches: range) -> Iterator[Step]:
        loader, batch = self._loader, batches.start
        if len(batches) == len(self):
            self._report(summed)
        loader.restart()
        while batch < batches.stop:
            kept = self._kept(batch)
            if batch < summed and len(kept) == len(self._journals):
                positions, reasons, _ = next(iter(kept.values()))
                labels = loader.recall(batch, positions, reasons)
                yield Step(batch, positions, labels, None, _columns(kept))
                batch += 1
                continue
            later = range(batch + 1, batches.stop)
            end = next((b for b in later if self._is_complete(b, summed)), batches.stop)
            for images, labels, positions in loader.read(batch, end):
                kept = self._kept(batch)
                self._check_readable(positions, kept)
                yield Step(batch, positions, labels, images, _columns(kept))
                batch += 1

    def _kept(self, batch: int) -> dict[str, KeptBatch]:
        found = {name: journal.get(batch) for name, journal in self._journals.items()}
        return {name: kept for name, kept in found.items() if kept is not None}

    def _check_readable(self, positions: Tensor, kept: Mapping[str, KeptBatch]) -> None:
        """The same files must be readable as before: sums cannot forget an image."""
        for found in kept.values():
            differing = sorted(set(positions.tolist()) ^ set(found.positions.tolist()))
            if differing:
                path = self._loader.dataset.source.paths[differing[0]]
                now = "can be read, but could not" if differing[0] in positions else "cannot be read, but could"
                raise GroodError(
                    f"{path} {now} when its features were kept, though it has the same size and time; delete "
                    f"{self._folder}, or choose another cache folder"
                )

    def _is_complete(self, batch: int, summed: int) -> bool:
        return batch < summed and all(batch in journal for journal in self._journals.values())

    def _report(self, summed: int) -> None:
        """Say what is there; and find out now, not after the first shard, whether the rest can be written."""
        sizes = [len(positions) for positions in self._positions]
        features = next(iter(self._journals.values()))
        n_kept = sum(size for batch, size in enumerate(sizes) if batch in features)
        n_complete = sum(size for batch, size in enumerate(sizes) if self._is_complete(batch, summed))
        if n_kept:
            again = ""
            if n_complete < n_kept:
                again = f"; {n_kept - n_complete:,} of them are read again for this seed and early layer"
            _log.info("continued: %s of %s images are in the cache%s", f"{n_kept:,}", f"{sum(sizes):,}", again)
        if n_complete < sum(sizes) and not os.access(self._folder, os.W_OK):
            raise GroodError(
                f"{self._folder} cannot be written to, and lacks {sum(sizes) - n_complete:,} of {sum(sizes):,} images; "
                "choose another cache folder, or none"
            )

    def keep(self, step: Step, journal: str, columns: Columns) -> None:
        """Take columns of a batch that are not kept yet; `flush` writes them."""
        first, batches = self._pending.get(journal, (step.batch, []))
        if first + len(batches) != step.batch:
            # What lies between is kept already.
            self._write()
            first, batches = step.batch, []
        n_bad = len(self._positions[step.batch]) - len(step.positions)
        reasons = tuple(reason for _, reason in self._loader.bad[-n_bad:]) if n_bad else ()
        # Copied: a tensor from another process holds a file open.
        batches.append(KeptBatch(step.positions.clone(), reasons, columns))
        self._pending[journal] = first, batches
        self._bytes_pending += sum(column.nbytes for column in columns.values())

    def flush(self, *, force: bool) -> bool:
        """Write what was taken, if it is enough; to be called once for each batch that was not complete."""
        self._n_pending += self._loader.batch_size
        is_due = (
            self._n_pending >= self._shard_images
            or self._bytes_pending >= self._shard_bytes
            or time.monotonic() - self._last_flush >= self._shard_seconds
        )
        if not (is_due or force):
            return False
        self._write()
        self._n_pending, self._last_flush = 0, time.monotonic()
        return True

    def _write(self) -> None:
        with self._explaining():
            for name, (first, batches) in self._pending.items():
                self._journals[name].write(first, batches)
        self._pending, self._bytes_pending = {}, 0

    def sums(self, layer: str) -> Sequence[Sums]:
        """The kept sums of a layer, to be set one after another."""
        self._sums[layer] = SumsJournal(self._folder, self._name, layer)
        found = self._sums[layer].read()
        self._summed[layer] = found[-1].end if found else 0
        return found

    def summed(self, layer: str) -> int:
        """The number of batches in a layer's kept sums, which are not read for it."""
        return SumsJournal(self._folder, self._name, layer).end()

    def drop_sums(self, layer: str) -> None:
        """Delete the kept sums of a layer."""
        SumsJournal(self._folder, self._name, layer).delete()
        self._sums.pop(layer, None)
        self._summed.pop(layer, None)

    def wants_sums(self, layer: str, nbytes: int) -> bool:
        """Whether it is time to write sums of this size."""
        waited = time.monotonic() - self._last_sums
        return nbytes <= self._shard_bytes or self._sums_cost <= _SUMS_SHARE * waited

    def keep_sums(self, layer: str, sums: Sums) -> None:
        """Write the sums of the classes whose sums changed since the last time."""
        started = time.monotonic()
        with self._explaining():
            self._sums[layer].write(sums)
        self._last_sums = time.monotonic()
        self._sums_cost = self._last_sums - started

    def images(self, positions: Sequence[int]) -> list[Tensor]:
        """Read images (3, H, W) by their positions."""
        return self._loader.images(positions)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Errors in writing tell what is not lost."""
        try:
            yield
        except GroodError as error:
            features = next(iter(self._journals.values()))
            n_kept = sum(len(positions) for batch, positions in enumerate(self._positions) if batch in features)
            n_all = sum(map(len, self._positions))
            raise GroodError(
                f"{error}. The features of {n_kept:,} of {n_all:,} images are kept; make room, or make the folder "
                "writable, and run the same again: it continues from there"
            ) from error


class _Steps:
    """The batches of an entry, of known number."""

    def __init__(self, entry: CacheEntry, summed: int, batches: range) -> None:
        self._entry, self._summed, self._batches = entry, summed, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Step]:
        return self._entry._iterate(self._summed, self._batches)


def _columns(kept: Mapping[str, KeptBatch]) -> dict[str, Columns]:
    return {name: found.columns for name, found in kept.items()}
