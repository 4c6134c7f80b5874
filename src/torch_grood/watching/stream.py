"""A file of JSON lines that grows, as a source.

A line is its place: the byte where it begins, and its content. What the journal knows of the last line must be what the
file holds there, so that a file that was truncated or replaced is an error and not a file half of which is skipped.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from torch_grood.errors import GroodError
from torch_grood.watching.files import Rooted
from torch_grood.watching.lines import Line, Lines, parse_request
from torch_grood.watching.requests import HELD, item_of
from torch_grood.watching.seen import key_of
from torch_grood.watching.source import Item
from torch_grood.watching.spans import Spans

__all__ = ["LastLine", "Stream"]

_CHUNK = 1 << 20
LastLine = tuple[int, int, bytes]
"""Where a line begins, its length, and its key."""


class Stream:
    """See `Source`. A context manager that closes the file.

    Args:
        file: to watch.
        done: bytes that are done.
        last: the done line that ends last; None if none is done.
        root: what paths are relative to, and may not lead out of; None: the file's folder.
        interval: seconds between two looks at the file.
        once: only what is there now.
        stop: whether to stop.

    Attributes:
        left: whether the file ends in a line without an end, which waits; with `once`.

    Raises:
        GroodError: if it is no file, or not the one that `done` and `last` are about.
    """

    durable = True

    def __init__(
        self,
        file: Path,
        done: Spans,
        last: LastLine | None = None,
        *,
        root: Path | None = None,
        interval: float = 1.0,
        once: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._file, self._done = file, done
        self._interval, self._once, self._stop = interval, once, stop
        self._rooted = Rooted(str(file.parent if root is None else root))
        self._next_look = 0.0
        self._handed = 0
        self._at_end = False
        self.left = False
        try:
            # A named pipe would wait here for its writer.
            if not stat.S_ISREG(file.stat().st_mode):
                raise GroodError(f"{file} is neither a folder nor a file; a pipe is given as -: … < {file}")
            self._handle = file.open("rb", buffering=0)
        except OSError as error:
            raise GroodError(f"{file} cannot be read: {error.strerror or error}") from None
        try:
            self._check_last(last)
            self._position = self._handle.seek(done.end)
        except BaseException:
            self._handle.close()
            raise
        self._lines = Lines(done.end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handle.close()

    @property
    def ended(self) -> bool:
        """See `Source`."""
        return self._once and self._at_end

    def take(self, most: int, wait: float) -> list[Item]:
        """See `Source.take`."""
        items: list[Item] = []
        held = 0
        while len(items) < most and held < HELD and not self._stop():
            line = self._lines.pop() or self._more(wait > 0 and not items)
            if line is None:
                if items or wait == 0 or self._at_end:
                    break
                self._sleep(wait)
                return items
            if isinstance(line, Line) and line.start not in self._done:
                more = {"offset": line.start, "length": line.length}
                item, _ = item_of(line, self._rooted, _key(line), more)
                items.append(item)
                held += item.weight
        return items

    def done(self, items: Sequence[Item]) -> None:
        """See `Source.done`."""
        for item in items:
            self._done.add(item.more["offset"], item.more["length"])

    def release(self, item: Item) -> None:
        """See `Source.release`."""
        raise AssertionError("a line of a stream is never gone")

    def _more(self, check: bool) -> Line | None:
        """Read on, until a line ends or the file does."""
        while not self._stop() and not self._at_end:
            try:
                content = self._handle.read(_CHUNK)
            except OSError as error:
                raise GroodError(f"{self._file} cannot be read any more: {error.strerror or error}") from None
            if not content:
                if check:
                    self._check_place()
                if self._once:
                    self._at_end = True
                    return self._last_line()
                return None
            self._position += len(content)
            self._lines.feed(content)
            if line := self._lines.pop():
                return line
        return None

    def _last_line(self) -> Line | None:
        """The line without an end, if it is a request already."""
        unfinished = self._lines.unfinished
        if not unfinished.strip():
            return None
        try:
            parse_request(unfinished)
        except GroodError:
            self.left = True
            return None
        return self._lines.rest()

    def _sleep(self, wait: float) -> None:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + self._interval
        time.sleep(max(0.0, min(wait, self._next_look - now)))

    def _check_place(self) -> None:
        """That the file is still the one that is open, and holds what was read of it."""
        here = os.fstat(self._handle.fileno())
        if here.st_size < self._position:
            raise GroodError(
                f"{self._file} was truncated: it has {here.st_size:,} bytes, and {self._position:,} were read; what is "
                "decided is written. Start again with another --output"
            )
        try:
            named = self._file.stat()
        except OSError:
            named = None
        if named is None or not os.path.samestat(named, here):
            raise GroodError(
                f"{self._file} was {'removed' if named is None else 'replaced by another file'}; all whole lines of "
                "the old one are decided. Start again with another --output for the new one"
            )

    def _check_last(self, last: LastLine | None) -> None:
        size = os.fstat(self._handle.fileno()).st_size
        end = max([self._done.end, *self._done.islands.values()])
        if size < end:
            raise GroodError(
                f"{self._file} has {size:,} bytes, and decisions up to byte {end:,} are written: it was truncated or "
                "replaced, or is another file. Give another --output"
            )
        if last is None:
            return
        start, length, key = last
        self._handle.seek(start)
        lines = Lines(start)
        line, left = None, length
        while left and (content := self._handle.read(min(left, _CHUNK))):
            left -= len(content)
            lines.feed(content)
            line = line or lines.pop()
        line = line or lines.rest()
        if line is None or _key(line) != key:
            raise GroodError(
                f"{self._file} is not the file that the last decision is about: it holds something else at byte "
                f"{start:,}. Give another --output"
            )


def _key(line: Line) -> bytes:
    return key_of(b"line", line.start, line.length, b"" if line.content is None else line.content)
