"""From the body of a request to image files: multipart, JSON with base64, or one file as it is."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from typing import NamedTuple

from python_multipart.multipart import parse_options_header

from torch_grood._text import encodable, plain
from torch_grood.serving.asgi import Receive
from torch_grood.serving.limits import Limits, RefusedError

__all__ = ["Held", "Upload", "images_of", "read_body"]

_RETRY_AFTER = 1
_LONGEST_NAME = 200
# Of a part of a multipart body: a name and a type.
_MAX_PART_HEADER = 4096
_LONGEST_BOUNDARY = 70
# Of a multipart body, beside its images.
_MOST_FIELDS = 64
# Of a JSON body, for each image: more than a name has.
_MOST_COMMAS = 256
_JSON_FORM = '{"images": [{"name": "…", "data": "base64"}]} or {"image": "base64"}'


class Upload(NamedTuple):
    """An image file, and what its sender calls it."""

    name: str | None
    content: bytes


class Held:
    """Bytes of all bodies that are held, of which there may be so many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.now = 0

    def take(self, count: int) -> None:
        """Count bytes in.

        Raises:
            RefusedError: if that is too many.
        """
        if self.now + count > self._most:
            raise RefusedError(
                503, "too much is being sent at the same time; try again later", retry_after=_RETRY_AFTER, close=True
            )
        self.now += count


async def read_body(receive: Receive, length: str | None, limits: Limits, held: Held) -> bytes:
    """The body of a request, whose bytes are counted as held; the caller gives them back.

    Args:
        receive: of ASGI.
        length: the header Content-Length.
        limits: of it.
        held: counts.

    Raises:
        RefusedError: if it is too long (413), too slow (408), never ends, or too much is held already (503).
    """
    too_long = RefusedError(413, f"a request has at most {limits.request_bytes:,} bytes; send fewer images", close=True)
    if length is not None and length.isdecimal() and (len(length) > 18 or int(length) > limits.request_bytes):
        raise too_long
    parts: list[bytes] = []
    size, complete = 0, False
    try:
        async with asyncio.timeout(limits.seconds):
            while not complete:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RefusedError(400, "the connection ended before the request did", close=True)
                part: bytes = message.get("body", b"")
                if size + len(part) > limits.request_bytes:
                    raise too_long
                held.take(len(part))
                size += len(part)
                parts.append(part)
                complete = not message.get("more_body", False)
    except TimeoutError:
        held.now -= size
        raise RefusedError(408, f"the request did not arrive within {limits.seconds:g} seconds", close=True) from None
    except BaseException:
        held.now -= size
        raise
    return parts[0] if len(parts) == 1 else b"".join(parts)


def images_of(content_type: str, body: bytes, limits: Limits) -> list[Upload]:
    """The image files in a body.

    Raises:
        RefusedError: if there are none (422), too many (413), it is no such body (400), or of another type (415).
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        found = _multipart(content_type, body, limits)
    elif kind == "application/json":
        found = _from_json(body, limits)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        found = [Upload(None, body)]
    else:
        raise RefusedError(
            415, "send an image file as it is (Content-Type: image/png, …), multipart/form-data, or application/json"
        )
    if not found:
        raise RefusedError(422, "there is no image in the request")
    return found


def _too_many(limits: Limits) -> RefusedError:
    return RefusedError(413, f"a request has at most {limits.images} images")


def _from_json(body: bytes, limits: Limits) -> list[Upload]:
    # Each value of a list or an object, but for its first one, comes after a comma. Millions of small ones, which take
    # a hundred times their length in memory, are no list of images.
    if body.count(b",") > _MOST_COMMAS * (limits.images + 1):
        raise RefusedError(400, f"the body has more than images in it; expected {_JSON_FORM}")
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, f"the body is no JSON; expected {_JSON_FORM}") from None
    if not isinstance(data, dict) or ("image" in data) == ("images" in data):
        raise RefusedError(422, f"expected {_JSON_FORM}")
    items = data["images"] if "images" in data else [{"data": data["image"]}]
    if not isinstance(items, list):
        raise RefusedError(422, f"images is a list; expected {_JSON_FORM}")
    if len(items) > limits.images:
        raise _too_many(limits)
    return [_from_item(item, position) for position, item in enumerate(items)]


def _from_item(item: object, position: int) -> Upload:
    if isinstance(item, str):
        item = {"data": item}
    if not isinstance(item, dict) or not isinstance(item.get("data"), str):
        raise RefusedError(422, f"image {position} has no data; expected {_JSON_FORM}")
    name = item.get("name")
    if name is not None and not isinstance(name, str):
        raise RefusedError(422, f"the name of image {position} is no text")
    try:
        return Upload(_named(name), base64.b64decode(item["data"], validate=True))
    except (binascii.Error, ValueError):
        raise RefusedError(422, f"the data of image {position} are no base64") from None


def _multipart(content_type: str, body: bytes, limits: Limits) -> list[Upload]:
    """The files of a multipart body (RFC 7578); fields that are no files are passed over.

    It lies in memory as a whole, so that it need only be cut, whose time is that of its length whatever it holds.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    # RFC 2046.
    if not 1 <= len(boundary) <= _LONGEST_BOUNDARY:
        raise RefusedError(400, "multipart/form-data without a boundary")
    # The first delimiter may open the body; what precedes it is nothing.
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, limits.images + _MOST_FIELDS + 2)
    if len(pieces) == limits.images + _MOST_FIELDS + 3:
        raise _too_many(limits)
    if len(pieces) == 1 or not pieces[-1].startswith(b"--"):
        raise RefusedError(400, "the multipart/form-data ends too early")
    found = [upload for piece in pieces[1:-1] if (upload := _from_part(piece)) is not None]
    if len(found) > limits.images:
        raise _too_many(limits)
    return found


def _from_part(piece: bytes) -> Upload | None:
    """What follows a delimiter: the rest of its line, headers, an empty line, the content. None: it is no file."""
    head, blank, content = piece.partition(b"\r\n\r\n")
    if not blank or len(head) > _MAX_PART_HEADER:
        raise RefusedError(400, "a part of the multipart/form-data has no header, or too long a one")
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-disposition":
            _, options = parse_options_header(value)
            if b"filename" in options:
                return Upload(_named(options[b"filename"].decode("utf-8", "replace")), content)
    return None


def _named(name: str | None) -> str | None:
    """What the sender calls an image, fit to be sent back: it names nothing here."""
    return None if name is None else encodable(plain(name[:_LONGEST_NAME]))[:_LONGEST_NAME]
