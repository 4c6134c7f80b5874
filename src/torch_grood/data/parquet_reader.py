"""What is open of Parquet files in a process, and the pieces of their columns that it keeps.

A row group may hold more than memory does. So a process reads along the column in pieces of some MiB and keeps the
last few: whoever asks for rows in about their order, as a loader does, reads each group once.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch_grood._optional import require
from torch_grood.data.images import BadImageError
from torch_grood.data.urls import is_url, opened, stamp_of_file
from torch_grood.errors import GroodError

__all__ = ["ImageColumn", "check_column", "opened_parquet", "row_groups", "value_at", "whole_column"]

# Of a piece: bytes, by what the file says of its column, and rows.
_PIECE_BYTES = 8 * 2**20
_LEAST_ROWS, _MOST_ROWS = 8, 1024
# Threads ask for rows a little out of order.
_PIECES, _STREAMS, _FILES = 4, 2, 2
# Read at a time of a compressed column: without, it would be read as a whole.
_BUFFER = 4 * 2**20


@contextmanager
def opened_parquet(file: str) -> Iterator[Any]:
    """A file that is looked at for a moment.

    Raises:
        GroodError: if it cannot be read, or is no Parquet.
    """
    arrow, parquet = require("pyarrow", extra="cli"), require("pyarrow.parquet", extra="cli")
    try:
        with opened(file) as stream:
            yield parquet.ParquetFile(stream)
    except (arrow.ArrowException, OSError) as error:
        raise GroodError(f"{file} cannot be read as Parquet: {error}") from None


def check_column(file: str, schema: Any, column: str | None, option: str) -> None:
    """Check that a column is there, if one is named.

    Raises:
        GroodError: if not; it tells of the option.
    """
    if column is not None and schema.names.count(column) != 1:
        found = "has no column" if column not in schema.names else "has more than one column"
        raise GroodError(f"{file} {found} {column!r}; it has {', '.join(schema.names)}. Name another one: {option}")


def whole_column(file: str, column: str) -> Any:
    """A whole column of small values."""
    with opened_parquet(file) as reader:
        return reader.read(columns=[column], use_threads=False).column(column)


class ImageColumn(NamedTuple):
    """Of image files, in one file.

    Attributes:
        file: path or URL.
        image: name of the column.
        stamp: of the file, see `stamp_of_file`; to read another one is an error. None: not compared.
    """

    file: str
    image: str
    stamp: str | None


class _Stream:
    """Goes along the column in one row group."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches
        self.next_row = 0


class _Reader:
    """What one process has open, and the pieces that it keeps."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self._lock = threading.Lock()
        self._files: OrderedDict[ImageColumn, tuple[Any, Any]] = OrderedDict()
        self._streams: OrderedDict[tuple[ImageColumn, int], _Stream] = OrderedDict()
        # Of which group, the first row, the values; the newest last.
        self._pieces: deque[tuple[tuple[ImageColumn, int], int, Any]] = deque(maxlen=_PIECES)
        # From which row on, and why: not read again for each row.
        self._damaged: dict[tuple[ImageColumn, int], tuple[int, str]] = {}

    def __del__(self) -> None:
        for _, stream in self._files.values():
            # At the end of a process, a file system may be gone already.
            with suppress(Exception):
                stream.close()

    def value(self, column: ImageColumn, groups: tuple[int, ...], group: int, row: int) -> Any:
        """A value of the column, by its row in the group."""
        key = column, group
        with self._lock:
            for of, first, piece in self._pieces:
                if of == key and 0 <= row - first < len(piece):
                    return piece[row - first]
            place = f"{column.file}#{sum(groups[:group]) + row}"
            first, reason = self._damaged.get(key, (0, ""))
            if reason and row >= first:
                raise BadImageError(place, reason)
            return self._read(key, groups, row, place)

    def _read(self, key: tuple[ImageColumn, int], groups: tuple[int, ...], row: int, place: str) -> Any:
        arrow = require("pyarrow", extra="cli")
        stream = self._streams.get(key)
        if stream is None or row < stream.next_row:
            stream = self._streams[key] = _Stream(self._batches(*key, groups))
        self._streams.move_to_end(key)
        while len(self._streams) > _STREAMS:
            self._streams.popitem(last=False)
        try:
            while row >= stream.next_row:
                first, piece = stream.next_row, next(stream.batches).column(0)
                stream.next_row += len(piece)
        except StopIteration:
            raise _changed(key[0].file) from None
        except (arrow.ArrowException, OSError) as error:
            del self._streams[key]
            if is_url(key[0].file) and not isinstance(error, arrow.ArrowException):
                raise GroodError(f"{place} cannot be fetched ({error}); run the same again") from None
            self._damaged[key] = stream.next_row, f"the Parquet file is damaged here ({error})"
            raise BadImageError(place, self._damaged[key][1]) from None
        self._pieces.append((key, first, piece))
        return piece[row - first]

    def _batches(self, column: ImageColumn, group: int, groups: tuple[int, ...]) -> Iterator[Any]:
        reader = self._opened(column, groups)
        row_group = reader.metadata.row_group(group)
        chunks = (row_group.column(i) for i in range(row_group.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.startswith(column.image))
        rows = _PIECE_BYTES * row_group.num_rows // max(size, 1)
        batches: Iterator[Any] = reader.iter_batches(
            batch_size=min(max(rows, _LEAST_ROWS), _MOST_ROWS),
            row_groups=[group],
            columns=[column.image],
            use_threads=False,
        )
        return batches

    def _opened(self, column: ImageColumn, groups: tuple[int, ...]) -> Any:
        if column not in self._files:
            arrow, parquet = require("pyarrow", extra="cli"), require("pyarrow.parquet", extra="cli")
            if column.stamp is not None and stamp_of_file(column.file) != column.stamp:
                raise _changed(column.file)
            stream = opened(column.file)
            try:
                reader = parquet.ParquetFile(stream, buffer_size=_BUFFER, pre_buffer=False)
            except (arrow.ArrowException, OSError) as error:
                stream.close()
                raise GroodError(f"{column.file} cannot be read as Parquet: {error}") from None
            if row_groups(reader.metadata) != groups:
                stream.close()
                raise _changed(column.file)
            self._files[column] = reader, stream
        self._files.move_to_end(column)
        while len(self._files) > _FILES:
            old, (_, stream) = self._files.popitem(last=False)
            self._streams = OrderedDict((key, value) for key, value in self._streams.items() if key[0] != old)
            stream.close()
        return self._files[column][0]


def row_groups(metadata: Any) -> tuple[int, ...]:
    """Number of rows of each row group."""
    return tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))


_current: _Reader | None = None


def value_at(column: ImageColumn, groups: tuple[int, ...], group: int, row: int) -> Any:
    """What a column holds, as pyarrow gives it; threads may ask at a time.

    Args:
        column: of a file.
        groups: rows of its row groups.
        group: number of one.
        row: in that group.

    Raises:
        BadImageError: if the file is damaged there.
        GroodError: if it has changed, or its file system fails.
    """
    return _reader().value(column, groups, group, row)


def _reader() -> _Reader:
    """That of this process: a place in a file is nothing to share with the process that this one is a fork of."""
    global _current
    if _current is None or _current.process != os.getpid():
        _current = _Reader()
    return _current


def _changed(file: str) -> GroodError:
    return GroodError(f"{file} has changed since it was first looked at; run again")
