"""Running sums of the early prototypes in files, each written whole or not at all and checked when it is read.

    sums-LAYER-0000064-DIGEST.safetensors      sums of some classes over batches 0 to 63; LAYER and DIGEST are hashes

A file holds the classes whose sums have changed since the file before: where images come class by class, this is
little, however many classes there are. It names the earlier files that it needs, those that hold the newest sums of
some class; the others are deleted. A layer's sums may take gigabytes: 1,000 classes of 256 x 56 x 56 numbers, 6 GiB.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from torch_grood import container
from torch_grood.data.journal import CONTAINER_VERSION, DAY, check_identity, is_damage
from torch_grood.errors import AlteredFileError, FormatError
from torch_grood.feature_store import Sums

__all__ = ["SumsJournal"]

_log = logging.getLogger("torch_grood")

_NAME = r"-(\d{7,})-([0-9a-f]{16})\.safetensors"


class SumsJournal:
    """The running sums of one layer that are kept.

    Args:
        folder: of the cache entry.
        entry: its key's hash.
        layer: name of the layer.
    """

    def __init__(self, folder: Path, entry: str, layer: str) -> None:
        self._folder, self._entry, self._layer = folder, entry, layer
        self._prefix = f"sums-{hashlib.sha256(layer.encode()).hexdigest()[:16]}"
        # Where the newest sums of each class are.
        self._part_of: dict[int, str] = {}

    def read(self) -> list[Sums]:
        """The newest files that are whole and have all that they need, oldest first; to be called before `write`."""
        ends = self._ends()
        for newest in sorted(ends, key=lambda digest: (ends[digest], digest), reverse=True):
            try:
                last, needs = self._read(newest, ends)
                parts = [*(self._read(digest, ends)[0] for digest in needs), last]
            except FormatError:
                continue
            for digest, part in zip([*needs, newest], parts, strict=True):
                self._part_of |= dict.fromkeys(part.labels.tolist(), digest)
            self._delete([digest for digest in ends if digest not in {newest, *needs}], ends, older_than=DAY)
            return parts
        return []

    def end(self) -> int:
        """The number of batches in the newest file, by its name alone; 0 if there is none."""
        return max(self._ends().values(), default=0)

    def delete(self) -> None:
        """Delete all files of this layer."""
        ends = self._ends()
        self._delete(list(ends), ends)
        self._part_of.clear()

    def write(self, sums: Sums) -> None:
        """Write the sums of some classes, and delete the parts that hold nothing newest any more.

        Raises:
            GroodError: if the file cannot be written.
        """
        labels = sums.labels.tolist()
        before = set(self._part_of.values())
        needed = {digest for label, digest in self._part_of.items() if label not in set(labels)}
        ends = self._ends()
        needs = sorted(needed, key=lambda digest: (ends.get(digest, 0), digest))
        header = {**self._identity(sums.end), "needs": needs}
        # Of equal images and model, sums are equal too: where they come from identifies them.
        digest = hashlib.sha256(json.dumps([sums.end, labels, needs]).encode()).hexdigest()[:16]
        # A file holds one number at least, even if no sum has changed.
        tensors = {"labels": sums.labels, "values": sums.values, "batches": torch.tensor([0, sums.end])}
        container.write(self._path(sums.end, digest), header, tensors)
        self._part_of |= dict.fromkeys(labels, digest)
        self._delete(before - needed - {digest}, ends)

    def _delete(self, digests: Iterable[str], ends: Mapping[str, int], older_than: float = 0) -> None:
        for digest in digests:
            # Another process may have deleted it.
            with suppress(OSError, KeyError):
                path = self._path(ends[digest], digest)
                if time.time() - path.stat().st_mtime >= older_than:
                    path.unlink()

    def _ends(self) -> dict[str, int]:
        """The number of batches in each part of this layer, by digest."""
        ends = {}
        for path in self._folder.iterdir():
            if found := re.fullmatch(self._prefix + _NAME, path.name):
                ends[found[2]] = int(found[1])
        return ends

    def _path(self, end: int, digest: str) -> Path:
        return self._folder / f"{self._prefix}-{end:07}-{digest}.safetensors"

    def _identity(self, end: int) -> dict[str, Any]:
        return {"format_version": CONTAINER_VERSION, "entry": self._entry, "layer": self._layer, "batches": [0, end]}

    def _read(self, digest: str, ends: dict[str, int]) -> tuple[Sums, list[str]]:
        """What a file holds, and the digests of those that it needs; one that cannot be used is taken out of `ends`.

        Raises:
            FormatError: if it is absent, or not what was written here.
        """
        if digest not in ends:
            raise FormatError("an earlier file is missing")
        path = self._path(ends[digest], digest)
        try:
            return self._checked(path, ends[digest])
        except FormatError as error:
            _log.warning("%s cannot be used and is made again: %s", path.name, error)
            if is_damage(error):
                self._delete([digest], ends)
            ends.pop(digest)
            raise

    def _checked(self, path: Path, end: int) -> tuple[Sums, list[str]]:
        found = container.read(path, CONTAINER_VERSION)
        check_identity(found.header, self._identity(end))
        labels, values, needs = found.tensors.get("labels"), found.tensors.get("values"), found.header.get("needs")
        if (
            labels is None
            or values is None
            or (labels.dtype, labels.ndim, values.dtype) != (torch.int64, 1, torch.float64)
            or values.shape[:1] != labels.shape
            or not isinstance(needs, list)
            or not all(isinstance(need, str) for need in needs)
        ):
            raise AlteredFileError(f"{path.name} holds no sums")
        return Sums(end, labels, values), needs
