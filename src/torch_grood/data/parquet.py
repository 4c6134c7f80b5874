"""Image files in a column of Parquet files, here or at URLs: rows by number."""

from __future__ import annotations

import bisect
import glob
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch_grood._optional import require
from torch_grood.data.images import BadImageError
from torch_grood.data.parquet_reader import ImageColumn, check_column, opened_parquet, row_groups, value_at
from torch_grood.data.trees import PARQUET_SUFFIX, LocalTree, Tree, UrlTree
from torch_grood.data.urls import MAX_BYTES, glob_urls, is_url, kind_of, stamp_of_file
from torch_grood.errors import GroodError

__all__ = ["ParquetColumns", "ParquetRows", "named_parquet", "open_rows", "parquet_files"]

_IMAGE_COLUMN = "image"
_NAME_COLUMNS = ("path", "file_name", "name", "id", "key")


class ParquetColumns(NamedTuple):
    """Which columns of Parquet files hold what.

    Attributes:
        image: image files, as bytes or a struct with a field `bytes`; None: "image", or the only such column.
        label: integers, or names of classes; None: "label", or the only column that the data set's own description
            (of Hugging Face's) calls class labels.
        name: names of the images; None: one of "path", "file_name", "name", "id", "key" that is there, else file and
            row.
    """

    image: str | None = None
    label: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class ParquetRows:
    """Rows of Parquet files that hold image files as bytes.

    Attributes:
        files: paths, or URLs.
        groups: number of rows of each row group, by file.
        image: column of the bytes, or of a struct with a field `bytes`.
        name: column of their names; None: file and row.
        start, stop: rows that are meant, of all files together.
        stamps: of the files when they were opened: to read others is an error. Empty: not compared.
    """

    files: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    image: str
    name: str | None
    start: int
    stop: int
    stamps: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start

    @cached_property
    def _ends(self) -> list[int]:
        """The row after the last of each file, of all files together."""
        return list(itertools.accumulate(sum(rows) for rows in self.groups))

    @cached_property
    def _group_ends(self) -> list[list[int]]:
        """The row after the last of each group, in its file."""
        return [list(itertools.accumulate(rows)) for rows in self.groups]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_ends", "_group_ends")}

    def slice(self, span: tuple[int, int]) -> Self:
        """A part of the rows; it knows of the files that it needs only."""
        start, stop = self.start + span[0], self.start + span[1]
        first, last = bisect.bisect_right(self._ends, start), bisect.bisect_left(self._ends, stop)
        before = self._ends[first - 1] if first else 0
        some = slice(first, last + 1)
        return replace(
            self,
            files=self.files[some],
            groups=self.groups[some],
            stamps=self.stamps[some],
            start=start - before,
            stop=stop - before,
        )

    def absolute(self) -> Self:
        """With local paths from the root."""
        return replace(self, files=tuple(file if is_url(file) else str(Path(file).absolute()) for file in self.files))

    def place(self, position: int) -> str:
        """File and row, ``file.parquet#row``."""
        file, row = self._located(position)
        return f"{self.files[file]}#{row}"

    def content(self, position: int) -> bytes:
        """The image file of a row.

        Raises:
            BadImageError: if the row holds none, or the file is damaged there.
            GroodError: if the file has changed, or its file system fails.
        """
        return self.bytes_of(self.value(position), self.place(position))

    def value(self, position: int) -> Any:
        """What the column holds, as pyarrow gives it; see `content`, and `bytes_of`."""
        file, row = self._located(position)
        group = bisect.bisect_right(self._group_ends[file], row)
        before = self._group_ends[file][group - 1] if group else 0
        column = ImageColumn(self.files[file], self.image, self.stamps[file] if self.stamps else None)
        return value_at(column, self.groups[file], group, row - before)

    @staticmethod
    def bytes_of(value: Any, name: str) -> bytes:
        """The image file that a value of the column is.

        Raises:
            BadImageError: if it is none.
        """
        arrow = require("pyarrow", extra="cli")
        if isinstance(value, arrow.StructScalar) and value.is_valid and "bytes" in value:
            value = value["bytes"]
        if not isinstance(value, arrow.BinaryScalar | arrow.LargeBinaryScalar) or not value.is_valid:
            raise BadImageError(name, "the row holds no bytes of an image file")
        buffer = value.as_buffer()
        if buffer.size > MAX_BYTES:
            raise BadImageError(name, f"the image is larger than {MAX_BYTES >> 20} MiB")
        return bytes(buffer.to_pybytes())

    def names(self) -> list[str]:
        """Of all rows: what the column of names says, or file and row.

        Raises:
            GroodError: if a file cannot be read.
        """
        found: list[str] = []
        start = 0
        for file, ends in zip(self.files, self._group_ends, strict=True):
            stop = start + (ends[-1] if ends else 0)
            low, high = max(self.start, start) - start, min(self.stop, stop) - start
            if low < high:
                given = [None] * (high - low) if self.name is None else _some(file, self.name, ends, low, high)
                found += [f"{file}#{row}" if name is None else str(name) for row, name in enumerate(given, low)]
            start = stop
        return found

    def _located(self, position: int) -> tuple[int, int]:
        """Number of the file, and of the row in it."""
        row = self.start + position
        file = bisect.bisect_right(self._ends, row)
        return file, row - (self._ends[file - 1] if file else 0)


def parquet_files(path: str) -> list[str]:
    """The Parquet files that a path or URL stands for; none if it stands for something else.

    A file that ends in .parquet, a pattern that does (``train-*.parquet``), or a folder that holds such files at any
    depth, and no image.

    Raises:
        GroodError: if one is named and not there.
    """
    named = named_parquet(path)
    if named:
        return named
    tree: Tree
    if is_url(path):
        if kind_of(path) != "folder":
            return []
        tree = UrlTree(path)
    elif Path(path).is_dir():
        tree = LocalTree(Path(path))
    else:
        return []
    found = tree.parquet()
    return [] if not found or tree.walk()[0] else found


def named_parquet(path: str) -> list[str]:
    """As `parquet_files`, but of what is a folder, nothing.

    Raises:
        GroodError: if a file or pattern is named and not there.
    """
    if not path.lower().endswith(PARQUET_SUFFIX):
        return []
    if is_url(path):
        kind = None if set("*?") & set(path) else kind_of(path)
    else:
        kind = "file" if Path(path).is_file() else "folder" if Path(path).is_dir() else None
    if kind is not None:
        return [path] if kind == "file" else []
    if not set("*?[") & set(path):
        raise GroodError(f"{path}: no such file or folder")
    found = glob_urls(path) if is_url(path) else sorted(glob.glob(path, recursive=True))  # noqa: PTH207 - strings
    if not found:
        raise GroodError(f"{path}: no file fits this pattern")
    return found


def open_rows(files: Sequence[str], columns: ParquetColumns | None = None, *, stamped: bool = True) -> ParquetRows:
    """Look at Parquet files: which columns they have, and how many rows.

    Args:
        files: paths or URLs; all have the same columns of images and names.
        columns: which.
        stamped: whether a change of a file is to be noticed.

    Raises:
        GroodError: if a file is no Parquet, lacks a column, or has none that is meant without doubt; if there is no
            row.
    """
    groups: list[tuple[int, ...]] = []
    image, _, name = columns or ParquetColumns()
    # Before they are opened: a change in between is noticed later.
    stamps = tuple(stamp_of_file(file) for file in files) if stamped else ()
    for file in files:
        with opened_parquet(file) as reader:
            schema = reader.schema_arrow
            groups.append(row_groups(reader.metadata))
        image = image or _image_column(file, schema)
        name = name or next((column for column in _NAME_COLUMNS if column in schema.names), None)
        for column, option in ((image, "--image-column"), (name, "--name-column")):
            check_column(file, schema, column, option)
        if not _holds_bytes(schema.field(image).type):
            raise GroodError(
                f"{file}: the column {image!r} holds {schema.field(image).type}, not image files as bytes; name "
                "another one: --image-column"
            )
    assert image is not None
    total = sum(map(sum, groups))
    if total == 0:
        raise GroodError(f"{files[0]} has no row")
    return ParquetRows(tuple(files), tuple(groups), image, name, 0, total, stamps)


def _image_column(file: str, schema: Any) -> str:
    if _IMAGE_COLUMN in schema.names:
        return _IMAGE_COLUMN
    of_bytes = [field.name for field in schema if _holds_bytes(field.type)]
    if len(of_bytes) != 1:
        raise GroodError(
            f"{file}: no column is called image, and {len(of_bytes)} hold bytes, of {', '.join(schema.names)}; name "
            "the one with the image files: --image-column"
        )
    return str(of_bytes[0])


def _holds_bytes(kind: Any) -> bool:
    types = require("pyarrow", extra="cli").types
    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _some(file: str, column: str, ends: Sequence[int], low: int, high: int) -> list[Any]:
    """Rows of a column, of the row groups that end there."""
    groups = range(bisect.bisect_right(ends, low), bisect.bisect_left(ends, high) + 1)
    first = ends[groups[0] - 1] if groups[0] else 0
    with opened_parquet(file) as reader:
        values = reader.read_row_groups(list(groups), columns=[column], use_threads=False).column(column)
    found: list[Any] = values.slice(low - first, high - low).to_pylist()
    return found
