r"""Lines of a stream with the bytes that they take, and the request in each.

    {"path": "a/b.png"}    {"id": 7, "data": "iVBORw0KGgo…"}    {"path": "a/b.png", "id": "order 7"}

A line takes all bytes from the end of the line before, so that blank lines belong to the next one that is not: ranges
of lines lie end to end. A line that is too long is passed over, and never held.
"""

from __future__ import annotations

import binascii
import json
from base64 import b64decode
from typing import NamedTuple

from torch_grood.errors import GroodError

__all__ = ["MAX_LINE", "Line", "Lines", "Request", "id_of", "parse_request"]

MAX_LINE = 64 << 20
_MAX_ID = 1_000
_FORM = 'expected {"path": "…"} or {"id": …, "data": "base64"}'


class Line(NamedTuple):
    """A line that is not blank.

    Attributes:
        start: first byte that it takes, counted from the beginning of the stream.
        length: bytes that it takes.
        content: those bytes, without the blanks around; None if they are too many.
    """

    start: int
    length: int
    content: bytes | None


class Lines:
    """Splits what is read of a stream.

    Args:
        start: where in the stream the reading begins, at the beginning of a line.
        longest: bytes of a line.
    """

    def __init__(self, start: int = 0, longest: int = MAX_LINE) -> None:
        self._longest = longest
        self._start = start
        self._buffer = bytearray()
        # In the buffer: where the next line begins, and up to where no end of it was found.
        self._begin = self._searched = 0
        # Bytes of the next line that are not held: blank ones before it, and those of a line that is too long.
        self._blank = self._dropped = 0

    def feed(self, content: bytes) -> None:
        """Take in what comes next in the stream."""
        del self._buffer[: self._begin]
        self._searched -= self._begin
        self._begin = 0
        self._buffer += content

    def pop(self) -> Line | None:
        """The next line, if all of it is there."""
        while (end := self._buffer.find(b"\n", self._searched)) >= 0:
            content = bytes(self._buffer[self._begin : end + 1])
            self._begin = self._searched = end + 1
            if line := self._line(content):
                return line
        self._searched = len(self._buffer)
        held = self._searched - self._begin
        if self._dropped or held > self._longest:
            self._dropped += held
            self._buffer.clear()
            self._begin = self._searched = 0
        return None

    def rest(self) -> Line | None:
        """What follows the last end of a line, as a line, when nothing more will come."""
        content = self.unfinished
        self._begin = self._searched = len(self._buffer)
        return self._line(content)

    @property
    def unfinished(self) -> bytes:
        """What follows the last end of a line, as far as it is held; after `pop` gave nothing."""
        return bytes(self._buffer[self._begin :])

    def _line(self, content: bytes) -> Line | None:
        text: bytes | None = content.strip()
        if self._dropped or len(content) > self._longest:
            text = None
        elif not text:
            self._blank += len(content)
            return None
        line = Line(self._start, self._blank + self._dropped + len(content), text)
        self._start += line.length
        self._blank = self._dropped = 0
        return line


class Request(NamedTuple):
    """What a line asks for; either a path or the bytes of an image file."""

    path: str | None
    id: str | int | None
    data: bytes | None


def parse_request(content: bytes | None) -> Request:
    """What a line asks for.

    Raises:
        GroodError: if it is no request.
    """
    if content is None:
        raise GroodError(f"the line is longer than {MAX_LINE >> 20} MiB")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise GroodError(f"the line is no JSON ({reason[:200]}); {_FORM}") from None
    if not isinstance(found, dict) or ("path" in found) == ("data" in found):
        raise GroodError(f"the line has to have either a path or data; {_FORM}")
    name = found.get("id")
    if name is not None and not _is_id(name):
        raise GroodError(f"an id is a text of 1 to {_MAX_ID:,} characters or a whole number of 64 bits")
    if "path" in found:
        path = found["path"]
        if not isinstance(path, str) or not path:
            raise GroodError(f"a path is a text; {_FORM}")
        return Request(path, name, None)
    if name is None:
        raise GroodError(f"data without an id cannot be told from other data; {_FORM}")
    if not isinstance(found["data"], str):
        raise GroodError(f"data are a text in base64; {_FORM}")
    try:
        return Request(None, name, b64decode(found["data"], validate=True))
    except (binascii.Error, ValueError) as error:
        raise GroodError(f"the data are no base64 ({error})") from None


def id_of(content: bytes | None) -> str | int | None:
    """The id in a line whose request is wrong, if it has one: so that whoever sent it finds the answer."""
    try:
        found = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    name = found.get("id") if isinstance(found, dict) else None
    return name if _is_id(name) else None


def _is_id(name: object) -> bool:
    if isinstance(name, str):
        return 0 < len(name) <= _MAX_ID
    return type(name) is int and -(2**63) <= name < 2**63
