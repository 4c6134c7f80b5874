"""A line of a stream as an input to read."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch_grood._text import encodable
from torch_grood.errors import GroodError
from torch_grood.watching.files import Rooted
from torch_grood.watching.lines import Line, id_of, parse_request
from torch_grood.watching.source import Item

__all__ = ["HELD", "item_of"]

# Bytes of lines that are held at a time; a batch of images in base64 may otherwise take gigabytes.
HELD = 64 << 20


def item_of(line: Line, rooted: Rooted, key: bytes | None, more: dict[str, Any]) -> tuple[Item, str | int | None]:
    """What a line asks for, and its id. One that asks for nothing fails when it is read, so that its row says why.

    Args:
        line: of the stream.
        rooted: reads what a path names.
        key: of the input.
        more: columns of its row.
    """
    try:
        request = parse_request(line.content)
    except GroodError as error:
        name = id_of(line.content)
        return Item(None, key, partial(_fail, str(error)), {"id": _shown(name), **more}, again=False), name
    more = {"id": _shown(request.id), **more}
    if request.path is not None:
        return Item(request.path, key, partial(rooted.read, request.path), more), request.id
    data = request.data or b""
    return Item(None, key, lambda: data, more, again=False, weight=len(data)), request.id


def _shown(name: str | int | None) -> str | int | None:
    # Half of a pair of surrogates is JSON, but no text: strict readers would refuse the row.
    return encodable(name) if isinstance(name, str) else name


def _fail(message: str) -> bytes:
    raise GroodError(message)
