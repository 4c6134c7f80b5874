"""JSON lines from a pipe, as a source.

What was read from a pipe cannot be read again, so that a kill loses what is read and not written. Whoever writes into
it gives ids, and after a restart sends again what has no row: what has one is passed over, and so nothing is lost and
nothing scored twice. Lines without an id are scored as often as they come.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Callable, Sequence
from pathlib import Path

from torch_grood.errors import GroodError
from torch_grood.watching.files import Rooted
from torch_grood.watching.lines import Line, Lines
from torch_grood.watching.requests import HELD, item_of
from torch_grood.watching.seen import Seen, key_of
from torch_grood.watching.source import Item

__all__ = ["Pipe"]

_CHUNK = 1 << 16


class Pipe:
    """See `Source`.

    Args:
        handle: number of the open file.
        seen: keys of the ids that are done.
        root: what paths are relative to, and may not lead out of; None: the current folder.
        stop: whether to stop; whole lines that were read already are handed out nevertheless.

    Attributes:
        repeated: lines that were passed over, because their id was there before.
    """

    durable = False

    def __init__(
        self, handle: int, seen: Seen, *, root: Path | None = None, stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._handle, self._seen, self._stop = handle, seen, stop
        self._rooted = Rooted(str(root or Path()))
        self._lines = Lines()
        self._number = 0
        self._at_end = False
        self.repeated = 0

    @property
    def ended(self) -> bool:
        """See `Source`."""
        return self._at_end

    def take(self, most: int, wait: float) -> list[Item]:
        """See `Source.take`."""
        items: list[Item] = []
        held = 0
        while len(items) < most and held < HELD:
            line = self._lines.pop() or self._more(0 if items else wait)
            if line is None:
                break
            item = self._item(line)
            if item is not None:
                items.append(item)
                held += item.weight
        return items

    def done(self, items: Sequence[Item]) -> None:
        """See `Source.done`."""

    def release(self, item: Item) -> None:
        """See `Source.release`."""
        raise AssertionError("a line of a stream is never gone")

    def _item(self, line: Line) -> Item | None:
        item, name = item_of(line, self._rooted, None, {})
        if name is None:
            return item
        item.key = key_of(b"id", json.dumps(name).encode())
        if item.key in self._seen:
            self.repeated += 1
            return None
        # At once: the second of two lines with one id, in one batch, is one too many as well.
        self._seen.add(item.key)
        return item

    def _more(self, wait: float) -> Line | None:
        """Read on, until a line ends, the pipe does, or nothing comes for so long."""
        while not self._at_end and not self._stop():
            try:
                if not select.select([self._handle], [], [], wait)[0]:
                    return None
                content = os.read(self._handle, _CHUNK)
            except OSError as error:
                raise GroodError(f"the standard input cannot be read: {error.strerror or error}") from None
            if not content:
                self._at_end = True
                return self._lines.rest()
            self._lines.feed(content)
            if line := self._lines.pop():
                return line
        return None
