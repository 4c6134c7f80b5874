"""Where images come from: files of folders and lists, and the rows of Parquet files; here or wherever fsspec leads.

Inputs are numbered. A worker is sent a slice, which is small, and reads what it stands for.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch_grood._optional import require
from torch_grood.data.images import IMAGE_SUFFIXES, BadImageError
from torch_grood.data.sources import read_source
from torch_grood.errors import GroodError

__all__ = ["FileInputs", "Inputs", "ParquetInputs", "Span", "inputs_of"]

Span = tuple[int, int]
"""First input, and the one after the last."""

# An image file may be so long; what is longer is no image.
_MAX_BYTES = 256 * 2**20
_NAME_COLUMNS = ("path", "file_name", "name", "id", "key")
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
            yield path, lambda path=path: _content(path)

    def digest(self) -> str:
        """See `Inputs.digest`."""
        found = hashlib.sha256()
        for path in self.paths:
            found.update(path.encode("utf-8", "surrogateescape") + b"\0")
        return found.hexdigest()


@dataclass(frozen=True)
class ParquetInputs:
    """Rows of Parquet files that hold image files as bytes.

    Attributes:
        files: paths, or URLs.
        groups: number of rows of each row group, by file.
        image: column of the bytes, or of a struct with a field `bytes`.
        name: column of their names; None: file and row.
        start, stop: rows that are meant, of all files together.
    """

    files: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    image: str
    name: str | None
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def spans(self, size: int) -> list[Span]:
        """See `Inputs.spans`; row groups that are not much longer stay whole."""
        found: list[Span] = []
        first = 0
        for rows in itertools.chain.from_iterable(self.groups):
            step = rows if rows <= _WHOLE_GROUPS * size else size
            found += [(first + at, first + min(at + step, rows)) for at in range(0, rows, max(step, 1))]
            first += rows
        return found

    def slice(self, span: Span) -> ParquetInputs:
        """See `Inputs.slice`; it knows of the files that it needs only."""
        start, stop = self.start + span[0], self.start + span[1]
        ends = list(itertools.accumulate(sum(rows) for rows in self.groups))
        first, last = bisect.bisect_right(ends, start), bisect.bisect_left(ends, stop)
        before = ends[first - 1] if first else 0
        some = slice(first, last + 1)
        return replace(self, files=self.files[some], groups=self.groups[some], start=start - before, stop=stop - before)

    def read(self) -> Iterator[tuple[str, Read]]:
        """See `Inputs.read`."""
        parquet = require("pyarrow.parquet", extra="cli")
        columns = [self.image] if self.name is None else [self.image, self.name]
        first = 0
        for file, groups in zip(self.files, self.groups, strict=True):
            with _opened(file) as stream:
                reader = parquet.ParquetFile(stream)
                row = 0
                for group, rows in enumerate(groups):
                    low, high = max(self.start - first, 0), min(self.stop - first, rows)
                    if low < high:
                        table = reader.read_row_group(group, columns=columns).slice(low, high - low)
                        yield from self._rows(file, row + low, table)
                    first, row = first + rows, row + rows

    def _rows(self, file: str, first: int, table: Any) -> Iterator[tuple[str, Read]]:
        images = table.column(self.image)
        names = None if self.name is None else table.column(self.name)
        for at in range(len(table)):
            name = f"{file}#{first + at}" if names is None else str(names[at].as_py())
            value = images[at]
            yield name, lambda name=name, value=value: _bytes_of(name, value)

    def digest(self) -> str:
        """See `Inputs.digest`."""
        described = repr((self.files, self.groups, self.image, self.name, self.start, self.stop))
        return hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()


def inputs_of(
    paths: Sequence[str], root: Path | None = None, *, image_column: str | None = None, name_column: str | None = None
) -> Inputs:
    """What arguments stand for.

    Args:
        paths: image folders of any depth, image lists, image files, or Parquet files or folders of them; here, or as
            URLs that fsspec knows (s3://…, gs://…, file://…).
        root: of the paths in image lists.
        image_column: of Parquet files; None: "image", or the only column of bytes.
        name_column: of Parquet files; None: one of "path", "file_name", "name", "id", "key" that is there.

    Raises:
        GroodError: if nothing is there, or images and Parquet files are mixed.
    """
    parquet: list[str] = []
    images: list[str] = []
    local: list[str] = []
    for path in paths:
        found = _parquet_files(path)
        if found:
            parquet += found
        elif "://" in path:
            images += _image_urls(path)
        else:
            local.append(path)
    if parquet and (images or local):
        raise GroodError(f"{parquet[0]} is Parquet, and {(images or local)[0]} is not; score them one after the other")
    if parquet:
        return _parquet_inputs(parquet, image_column, name_column)
    if image_column is not None or name_column is not None:
        raise GroodError("columns are for Parquet files, and there are none; leave them out")
    if local:
        # Workers may be elsewhere, and start in another folder.
        images = [str(Path(path).absolute()) for path in read_source(local, root, "none").paths] + images
    return FileInputs(tuple(images))


def _parquet_inputs(files: Sequence[str], image_column: str | None, name_column: str | None) -> ParquetInputs:
    arrow, parquet = require("pyarrow", extra="cli"), require("pyarrow.parquet", extra="cli")
    groups: list[tuple[int, ...]] = []
    image, name = image_column, name_column
    for file in files:
        try:
            with _opened(file) as stream:
                reader = parquet.ParquetFile(stream)
                schema, metadata = reader.schema_arrow, reader.metadata
        except arrow.ArrowException as error:
            raise GroodError(f"{file} cannot be read as Parquet: {error}") from None
        image = image or _image_column(file, schema, arrow)
        name = name or next((column for column in _NAME_COLUMNS if column in schema.names), None)
        for column in (image, name):
            if column is not None and column not in schema.names:
                raise GroodError(f"{file} has no column {column!r}; it has {', '.join(schema.names)}")
        groups.append(tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
    assert image is not None
    total = sum(map(sum, groups))
    if total == 0:
        raise GroodError(f"{files[0]} has no row")
    return ParquetInputs(tuple(files), tuple(groups), image, name, 0, total)


def _image_column(file: str, schema: Any, arrow: Any) -> str:
    if "image" in schema.names:
        return "image"
    types = arrow.types
    of_bytes = [one.name for one in schema if types.is_binary(one.type) or types.is_large_binary(one.type)]
    if len(of_bytes) != 1:
        raise GroodError(
            f"{file}: no column is called image, and {len(of_bytes)} hold bytes, of {', '.join(schema.names)}; name "
            "the one with the image files: --image-column"
        )
    return str(of_bytes[0])


def _parquet_files(path: str) -> list[str]:
    """Files that a path stands for, if it is Parquet; a folder is if it holds such files at any depth."""
    if path.lower().endswith(".parquet"):
        if "://" in path or Path(path).is_file():
            return [path if "://" in path else str(Path(path).absolute())]
        if not Path(path).is_dir():
            raise GroodError(f"{path}: no such file or folder")
    if "://" not in path:
        folder = Path(path)
        return sorted(str(file.absolute()) for file in folder.rglob("*.parquet")) if folder.is_dir() else []
    return [url for url in _files_of(path) if url.lower().endswith(".parquet")]


def _image_urls(url: str) -> list[str]:
    found = [file for file in _files_of(url) if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES]  # noqa: PTH122
    if not found:
        raise GroodError(f"{url} holds no image (a file that ends in {', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def _files_of(url: str) -> list[str]:
    """All files below a URL, sorted; the URL itself if it is a file."""
    fsspec = require("fsspec", extra="scale")
    try:
        system, path = fsspec.core.url_to_fs(url)
        found = system.find(path)
    except (OSError, ValueError, ImportError) as error:
        raise GroodError(f"{url} cannot be looked at: {error}") from None
    return sorted(system.unstrip_protocol(file) for file in found)


def _opened(path: str) -> Any:
    """A stream of a local path or a URL; errors as GroodError."""
    try:
        if "://" not in path:
            return Path(path).open("rb")
        return require("fsspec", extra="scale").open(path, "rb").open()
    except (OSError, ValueError) as error:
        raise GroodError(f"{path} cannot be read: {error}") from None


def _content(path: str) -> bytes:
    try:
        with _opened(path) as stream:
            content: bytes = stream.read(_MAX_BYTES + 1)
    except (GroodError, OSError) as error:
        raise BadImageError(path, getattr(error, "strerror", None) or str(error)) from None
    if len(content) > _MAX_BYTES:
        raise BadImageError(path, f"the file is larger than {_MAX_BYTES >> 20} MiB")
    return content


def _bytes_of(name: str, value: Any) -> bytes:
    content = value.as_py()
    if isinstance(content, dict):
        content = content.get("bytes")
    if not isinstance(content, bytes):
        raise BadImageError(name, "the row holds no bytes of an image file")
    return content
