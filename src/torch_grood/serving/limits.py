"""What a request may ask for, and what it is told if it asks for more."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits", "RefusedError"]


class RefusedError(Exception):
    """A request that is answered with a status and a reason.

    Args:
        status: of HTTP.
        reason: one sentence that says what to do.
        retry_after: seconds after which it may be tried again.
        close: whether the connection ends, because a part of the request was left unread.
    """

    def __init__(self, status: int, reason: str, *, retry_after: int | None = None, close: bool = False) -> None:
        super().__init__(reason)
        self.status, self.reason, self.retry_after, self.close = status, reason, retry_after, close


@dataclass(frozen=True)
class Limits:
    """Of one request, and of all together.

    Attributes:
        request_bytes: of a request's body.
        images: in a request.
        pixels: that an image declares.
        seconds: until a request's body must be there, and until its answer must be.
        queue: images that wait to be scored; more are refused with 503.
        held_bytes: of all bodies that are held at a time; more are refused with 503.
        connections: at a time; more are refused with 503.
    """

    request_bytes: int = 16 * 2**20
    images: int = 64
    pixels: int = 50_000_000
    seconds: float = 30.0
    queue: int = 1024
    held_bytes: int = 256 * 2**20
    connections: int = 1024
