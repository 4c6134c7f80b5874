"""Which bytes of a stream are done: everything before `end`, and islands beyond it.

A line that has to be tried again is done later than the next ones. So there are islands, but never more than lines that
wait: memory does not grow with the stream.
"""

from __future__ import annotations

__all__ = ["Spans"]


class Spans:
    """Byte ranges that are done; lines lie end to end, so that each begins where another ends.

    Attributes:
        end: all bytes before it are done.
        islands: end by start, of the ranges beyond that touch no other.
    """

    def __init__(self) -> None:
        self.end = 0
        self.islands: dict[int, int] = {}
        self._start_of: dict[int, int] = {}

    def __contains__(self, start: int) -> bool:
        """Whether the line that begins at this byte is done."""
        return start < self.end or any(first <= start < end for first, end in self.islands.items())

    def add(self, start: int, length: int) -> None:
        """Take the bytes from `start` on as done."""
        if start in self:
            return
        end = start + length
        # Joined to the island that it follows, and to the one that follows it.
        if start in self._start_of:
            start = self._start_of.pop(start)
            del self.islands[start]
        if end in self.islands:
            end = self.islands.pop(end)
            del self._start_of[end]
        if start <= self.end:
            self.end = end
        else:
            self.islands[start] = end
            self._start_of[end] = start
