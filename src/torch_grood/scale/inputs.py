"""Where images come from: files of folders and lists, and the rows of Parquet files; here or wherever fsspec leads.

Inputs are numbered. A worker is sent a slice, which is small, and reads what it stands for.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch_grood.data.images import BadImageError
from torch_grood.data.parquet import ParquetColumns, ParquetRows, open_rows, parquet_files
from torch_grood.data.sources import read_source
from torch_grood.data.urls import content_of
from torch_grood.errors import GroodError

__all__ = ["FileInputs", "Inputs", "ParquetInputs", "Span", "inputs_of"]

Span = tuple[int, int]
"""First input, and the one after the last."""

# A row group is read as a whole: cutting one of this many times a span's length would read it again and again.
_WHOLE_GROUPS = 8


class Read(Protocol):
    """See `Inputs.read`."""

    def __call__(self) -> bytes: ...


class Inputs(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def spans(self, size: int) -> list[Span]:
        """All of the inputs in spans of about so many, cut where they are read easily."""
        ...

    def slice(self, span: Span) -> Inputs:
        """A part of them, small enough to be sent to a worker."""
        ...

    def read(self) -> Iterator[tuple[str, Read]]:
        """Name of each, and what gives the content of its file.

        The latter raises BadImageError if there is none, and may be called in another thread.
        """
        ...

    def digest(self) -> str:
        """Of what is listed, in hexadecimal: other inputs, or another order, have another one."""
        ...


@dataclass(frozen=True)
class FileInputs:
    """Image files.

    Attributes:
        paths: of files here, or URLs.
    """

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def spans(self, size: int) -> list[Span]:
        """See `Inputs.spans`."""
        return [(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def slice(self, span: Span) -> FileInputs:
        """See `Inputs.slice`."""
        return replace(self, paths=self.paths[slice(*span)])

    def read(self) -> Iterator[tuple[str, Read]]:
        """See `Inputs.read`."""
        for path in self.paths:
            yield path, lambda path=path: content_of(path)

    def digest(self) -> str:
        """See `Inputs.digest`."""
        found = hashlib.sha256()
        for path in self.paths:
            found.update(path.encode("utf-8", "surrogateescape") + b"\0")
        return found.hexdigest()


@dataclass(frozen=True)
class ParquetInputs(ParquetRows):
    """Rows of Parquet files; see `ParquetRows`."""

    def spans(self, size: int) -> list[Span]:
        """See `Inputs.spans`; row groups that are not much longer stay whole."""
        found: list[Span] = []
        first = 0
        for rows in itertools.chain.from_iterable(self.groups):
            step = rows if rows <= _WHOLE_GROUPS * size else size
            found += [(first + at, first + min(at + step, rows)) for at in range(0, rows, max(step, 1))]
            first += rows
        return found

    def read(self) -> Iterator[tuple[str, Read]]:
        """See `Inputs.read`."""
        for position, name in enumerate(self.names()):
            yield name, self._later(position, name)

    def _later(self, position: int, name: str) -> Read:
        """Goes along the file now, and takes the bytes later."""
        try:
            value = self.value(position)
        except BadImageError as error:
            damaged = error

            def fail() -> bytes:
                raise damaged

            return fail
        return lambda: self.bytes_of(value, name)

    def digest(self) -> str:
        """See `Inputs.digest`."""
        described = repr((self.files, self.groups, self.image, self.name, self.start, self.stop))
        return hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()


def inputs_of(
    paths: Sequence[str],
    root: Path | str | None = None,
    *,
    image_column: str | None = None,
    name_column: str | None = None,
) -> Inputs:
    """What arguments stand for.

    Args:
        paths: image folders of any depth, image lists, image files, or Parquet files or folders of them; here, or as
            URLs that fsspec knows (s3://…, gs://…, file://…).
        root: of the paths in image lists; a folder, or a URL.
        image_column: of Parquet files; None: "image", or the only column of bytes.
        name_column: of Parquet files; None: one of "path", "file_name", "name", "id", "key" that is there.

    Raises:
        GroodError: if nothing is there, or images and Parquet files are mixed.
    """
    parquet: list[str] = []
    others: list[str] = []
    for path in paths:
        found = parquet_files(path)
        parquet += found
        others += [] if found else [path]
    if parquet and others:
        raise GroodError(f"{parquet[0]} is Parquet, and {others[0]} is not; score them one after the other")
    if parquet:
        # Workers may be elsewhere, and start in another folder. What changes meanwhile is no matter of theirs.
        rows = open_rows(parquet, ParquetColumns(image_column, None, name_column), stamped=False).absolute()
        return ParquetInputs(**vars(rows))
    if image_column is not None or name_column is not None:
        raise GroodError("columns are for Parquet files, and there are none; leave them out")
    return FileInputs(read_source(others, root, "none").absolute().paths)
