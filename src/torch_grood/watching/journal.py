"""The output as the journal: whole lines in it are done, and there is nothing else that could say something different.

The rows of a batch are appended in one write and synced. A kill leaves whole rows and at most one that is torn at the
end; a power failure may also leave zeros where rows were not yet on the disk. Either is cut off at the next start, and
what was lost is scored again. Anything else that is no row of ours is refused, so that nobody else's file is cut.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from torch_grood._files import alone
from torch_grood.errors import GroodError
from torch_grood.watching.rows import BEGINNING, Row
from torch_grood.watching.seen import KEY_BYTES, Seen
from torch_grood.watching.spans import Spans
from torch_grood.watching.stream import LastLine

__all__ = ["Journal", "Kind", "opened_journal"]

Kind = Literal["folder", "stream", "pipe"]
_NAMES: dict[Kind, str] = {"folder": "a folder", "stream": "a file of JSON lines", "pipe": "the standard input"}

# Of a row: a path of 4,096 bytes and an id of 1,000 characters take up to six times as many.
_LONGEST_ROW = 1 << 18
# What one write may have been, of which a power failure leaves parts.
_LARGEST_BATCH = 1 << 20


@dataclass
class Done:
    """What is done, by the rows of one or several outputs.

    Attributes:
        rows: how many.
        seen: keys of the inputs.
        spans: bytes of a stream.
        last: the line of a stream that ends last.
        last_path: in the last row that has one.
    """

    rows: int = 0
    seen: Seen = field(default_factory=Seen)
    spans: Spans = field(default_factory=Spans)
    last: LastLine | None = None
    last_path: str | None = None

    def add(self, row: Row) -> None:
        """Take a row in.

        Raises:
            ValueError, TypeError, KeyError: if it is none of ours.
        """
        key = None if row["key"] is None else bytes.fromhex(row["key"])
        path = row["path"]
        if (key is not None and len(key) != KEY_BYTES) or not isinstance(path, str | None):
            raise ValueError
        if "offset" in row:
            start, length = row["offset"], row["length"]
            if type(start) is not int or type(length) is not int or start < 0 or length < 1 or key is None:
                raise ValueError
            self.spans.add(start, length)
            if self.last is None or start > self.last[0]:
                self.last = start, length, key
        elif key is not None:
            self.seen.add(key)
        self.last_path = path or self.last_path
        self.rows += 1


class Journal:
    """The output, open for rows; made by `opened_journal`.

    Attributes:
        done: by this output and those before it.
        cut: bytes of torn rows that were cut off.
    """

    def __init__(self, path: Path, handle: int, done: Done, size: int, cut: int) -> None:
        self._path, self._handle, self._size = path, handle, size
        self.done, self.cut = done, cut

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows, and come back when they are on the disk.

        Raises:
            GroodError: if they cannot be written, or somebody else has changed the file.
        """
        if not rows:
            return
        content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode("ascii")
        try:
            self._check_place()
            written = 0
            while written < len(content):
                written += os.write(self._handle, content[written:])
            os.fsync(self._handle)
        except OSError as error:
            # Half a row would be cut off at the next start as well, but readers may come before.
            with suppress(OSError):
                os.ftruncate(self._handle, self._size)
            raise GroodError(
                f"cannot write {self._path}: {error.strerror or error}; the decisions before are in it, and nothing is "
                "lost: mend it (make room, for instance) and run the same again"
            ) from error
        self._size += len(content)

    def _check_place(self) -> None:
        here = os.fstat(self._handle)
        try:
            same = os.path.samestat(self._path.stat(), here)
        except FileNotFoundError:
            same = False
        if not same or here.st_size != self._size:
            raise GroodError(
                f"{self._path} was {'changed' if same else 'moved, removed or replaced'} by somebody else; it is what "
                "tells which inputs are done. Stop the watcher before moving it, and name it by --done then"
            )


@contextmanager
def opened_journal(path: Path, by: str, kind: Kind, before: Sequence[Path] = ()) -> Iterator[Journal]:
    """The journal in a file, which is made if it is not there; no other process may have it open.

    Args:
        path: of the output.
        by: what decides; all rows of an output are made by one.
        kind: of what is watched.
        before: other outputs, by whatever they were made; what has a row there is done as well.

    Raises:
        GroodError: if another process has it open, it holds anything else than rows made by `by` about such a source,
            or it cannot be read or written.
    """
    done = Done()
    for other in before:
        with _named(other), other.open("rb") as file:
            _read(other, file, done, None, kind)
    try:
        new = not path.exists()
        with alone(path, f"writing decisions to {path}"):
            handle = os.open(path, os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0))
            try:
                with _named(path), os.fdopen(os.dup(handle), "rb") as file:
                    end = _read(path, file, done, by, kind)
                size = os.fstat(handle).st_size
                if end < size:
                    os.ftruncate(handle, end)
                if new:
                    _sync_folder(path.parent)
                yield Journal(path, handle, done, end, size - end)
            finally:
                os.close(handle)
    except OSError as error:
        raise GroodError(f"cannot write {path}: {error.strerror or error}") from error


def _read(path: Path, file: IO[bytes], done: Done, by: str | None, kind: Kind) -> int:
    """Take all rows in; gives where the last whole one ends.

    Raises:
        GroodError: if there is anything else than rows.
        OSError: if it cannot be read.
    """
    end, number = 0, 0
    while line := file.readline(_LONGEST_ROW):
        number += 1
        if not line.endswith(b"\n") or b"\0" in line:
            if _is_torn(line, file, first=number == 1):
                break
            raise _no_row(path, number)
        try:
            row = json.loads(line)
            if not line.startswith(BEGINNING) or not isinstance(row["by"], str):
                raise ValueError
            of_kind: Kind = "stream" if "offset" in row else "pipe" if "id" in row else "folder"
            if of_kind != kind:
                raise GroodError(
                    f"{path} holds decisions about {_NAMES[of_kind]}, and this is {_NAMES[kind]}; give another name"
                )
            if by is not None and row["by"] != by:
                raise GroodError(
                    f"{path} holds decisions made by {row['by']}, and this is {by}: another detector, preprocessing or "
                    f"rate. Give another --output; with --done {path} only what is new is scored into it"
                )
            done.add(row)
        except GroodError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError):
            raise _no_row(path, number) from None
        end += len(line)
    return end


def _is_torn(line: bytes, file: IO[bytes], *, first: bool) -> bool:
    """Whether a line that is not whole is what a kill or a power failure leaves of a batch of rows."""
    rest = file.read(_LARGEST_BATCH + 1)
    if len(rest) > _LARGEST_BATCH:
        # Damage far from the end has another cause, and what is behind it must not be cut off.
        return False
    if b"\0" not in line and rest:
        return False
    head = line.split(b"\0")[0][: len(BEGINNING)]
    if not head and first:
        # Nothing shows that it was ours, unless there is nothing in it.
        return not (line + rest).strip(b"\0")
    return BEGINNING.startswith(head)


def _no_row(path: Path, number: int) -> GroodError:
    return GroodError(
        f"{path}, line {number}: not a row that grood watch wrote; give another name, or take the line out if you know "
        "where it comes from"
    )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GroodError(f"{path} cannot be read: {error.strerror or error}") from None


def _sync_folder(folder: Path) -> None:
    """So that a power failure does not take a new file's name away."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
