"""A journal of a pass: columns of its batches in files, each written whole or not at all and checked when it is read.

    NAME-0000032-0000064.safetensors      batches 32 to 63 of the journal NAME

A file holds its columns one batch after the other, and in the header the rows of each batch. Whatever is found damaged,
or to belong elsewhere, is left out with a warning and deleted, as if it had never been written.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_grood import container
from torch_grood.errors import AlteredFileError, FormatError
from torch_grood.feature_store import Columns

__all__ = ["CONTAINER_VERSION", "DAY", "Journal", "KeptBatch", "check_identity", "is_damage"]

_log = logging.getLogger("torch_grood")

# The version of `container` files that has checksums.
CONTAINER_VERSION = 3
# What nobody needs any more is deleted when it is so old, in seconds: no run under way still writes it.
DAY = 86_400
_POSITIONS, _BATCHES = "positions", "batches"
_NAME = r"-(\d{7,})-(\d{7,})\.safetensors"


class KeptBatch(NamedTuple):
    """One batch of a journal.

    Attributes:
        positions: of the images that could be read, int64 (b,).
        reasons: why the others could not, in their order.
        columns: by name.
    """

    positions: Tensor
    reasons: tuple[str, ...]
    columns: Columns


class Journal:
    """The batches of one journal that are kept.

    Args:
        folder: of the cache entry.
        entry: its key's hash, which every file of it repeats.
        name: of the journal.
        template: its columns, without rows.
        positions: gives the positions of a batch's files.
    """

    def __init__(self, folder: Path, entry: str, name: str, template: Columns, positions: Sequence[range]) -> None:
        self._folder, self._entry, self._name = folder, entry, name
        self._template = {**template, _POSITIONS: torch.empty(0, dtype=torch.int64)}
        self._batches = positions
        self._part_of: dict[int, Path] = {}
        self._loaded: tuple[Path | None, dict[int, KeptBatch]] = (None, {})
        for path in sorted(folder.iterdir()):
            found = re.fullmatch(re.escape(name) + _NAME, path.name)
            if found and int(found[1]) < int(found[2]) <= len(positions):
                for batch in range(int(found[1]), int(found[2])):
                    self._part_of.setdefault(batch, path)

    def __contains__(self, batch: int) -> bool:
        return batch in self._part_of

    def get(self, batch: int) -> KeptBatch | None:
        """What is kept of a batch; None if nothing is, or if its file is damaged; that file is then deleted."""
        while (path := self._part_of.get(batch)) is not None:
            if self._loaded[0] != path:
                try:
                    self._loaded = (path, self._read(path))
                except FormatError as error:
                    _log.warning("%s cannot be used and is made again: %s", path.name, error)
                    self._forget(path, delete=is_damage(error))
                    continue
            return self._loaded[1][batch]
        return None

    def write(self, first: int, batches: Sequence[KeptBatch]) -> None:
        """Write consecutive batches from number `first` on, as one part.

        Raises:
            GroodError: if the file cannot be written.
        """
        end = first + len(batches)
        columns = [{**batch.columns, _POSITIONS: batch.positions} for batch in batches]
        header = {
            **self._identity(first, end),
            "rows": {name: [len(column[name]) for column in columns] for name in self._template},
            "reasons": [list(batch.reasons) for batch in batches],
        }
        path = self._folder / f"{self._name}-{first:07}-{end:07}.safetensors"
        tensors = {name: torch.cat([column[name] for column in columns]) for name in self._template}
        # A file holds one number at least, even where no image can be read.
        container.write(path, header, {**tensors, _BATCHES: torch.tensor([first, end])})
        for batch in range(first, end):
            self._part_of[batch] = path

    def _identity(self, first: int, end: int) -> dict[str, Any]:
        return {
            "format_version": CONTAINER_VERSION,
            "entry": self._entry,
            "journal": self._name,
            _BATCHES: [first, end],
        }

    def _read(self, path: Path) -> dict[int, KeptBatch]:
        """All batches of a part.

        Raises:
            FormatError: if it is not what was written here.
        """
        found = container.read(path, CONTAINER_VERSION)
        first, end = (int(text) for text in path.stem.rsplit("-", 2)[1:])
        check_identity(found.header, self._identity(first, end))
        rows, reasons = found.header.get("rows"), found.header.get("reasons")
        if not isinstance(rows, dict) or not isinstance(reasons, list) or len(reasons) != end - first:
            raise AlteredFileError("its header is not that of a part")
        parts = {name: _split(name, found.tensors, kind, rows.get(name)) for name, kind in self._template.items()}
        if set(found.tensors) != {*parts, _BATCHES} or any(len(part) != end - first for part in parts.values()):
            raise AlteredFileError("it has other columns")
        kept = {}
        for i, batch in enumerate(range(first, end)):
            columns = {name: part[i] for name, part in parts.items()}
            positions = columns.pop(_POSITIONS)
            _check_positions(positions, reasons[i], self._batches[batch])
            kept[batch] = KeptBatch(positions, tuple(reasons[i]), columns)
        return kept

    def _forget(self, path: Path, *, delete: bool) -> None:
        self._part_of = {batch: part for batch, part in self._part_of.items() if part != path}
        if delete:
            with suppress(OSError):
                path.unlink()


def is_damage(error: FormatError) -> bool:
    """Whether a file is wrong; else it could not be read, perhaps only now."""
    return not isinstance(error.__context__, OSError)


def check_identity(header: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that a file is the one that its name and folder say.

    Raises:
        AlteredFileError: if its header says something else.
    """
    for name, value in expected.items():
        if header.get(name) != value:
            raise AlteredFileError(f"its {name} is {header.get(name)!r:.80}, not {value!r:.80}: it belongs elsewhere")


def _split(name: str, tensors: Mapping[str, Tensor], kind: Tensor, rows: Any) -> Sequence[Tensor]:
    """A column's rows by batch, if it is of the same kind as the template's."""
    column = tensors.get(name)
    if column is None or (column.dtype, column.shape[1:]) != (kind.dtype, kind.shape[1:]):
        raise AlteredFileError(f"its column {name!r} is missing or of another kind")
    if not isinstance(rows, list) or any(type(n) is not int or n < 0 for n in rows) or sum(rows) != len(column):
        raise AlteredFileError(f"the rows of its column {name!r} do not add up")
    # Copied: what is kept in memory must not hang on a file.
    return torch.split(column.clone(), rows)


def _check_positions(positions: Tensor, reasons: Any, batch: range) -> None:
    inside = bool(((positions >= batch.start) & (positions < batch.stop)).all())
    if not inside or not bool((positions.diff() > 0).all()):
        raise AlteredFileError("its positions are not those of its batches")
    if (
        not isinstance(reasons, list)
        or len(reasons) != len(batch) - len(positions)
        or not all(isinstance(reason, str) for reason in reasons)
    ):
        raise AlteredFileError("its unreadable files are not those of its batches")
