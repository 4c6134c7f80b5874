"""What is watched, as `watch` sees it: inputs that come, and go when their rows are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Gone", "Item", "Source"]


class Gone(Exception):  # noqa: N818 - it is no error
    """The file is no longer there, or no longer the one that was found; what is there now will be found anew."""


@dataclass(eq=False, slots=True)
class Item:
    """One input.

    Attributes:
        path: as the row shows it; None for an image that came in the line itself.
        key: tells it from all others, 16 bytes; None if nothing does.
        read: gives the bytes of the image file. Raises OSError, GroodError, or `Gone`.
        more: columns of its row that only this source has.
        again: whether reading once more may help.
        weight: bytes that it holds in memory.
        tries: how often it was read.
    """

    path: str | None
    key: bytes | None
    read: Callable[[], bytes]
    more: dict[str, Any] = field(default_factory=dict)
    again: bool = True
    weight: int = 0
    tries: int = 0


class Source(Protocol):
    """Hands out each input that is not done, once.

    Attributes:
        ended: nothing more will come, as far as can be told now.
        durable: what was handed out and is not done comes again in the next run.
    """

    @property
    def ended(self) -> bool: ...

    @property
    def durable(self) -> bool: ...

    def take(self, most: int, wait: float) -> list[Item]:
        """The next inputs.

        Args:
            most: of them at a time.
            wait: seconds after which to come back with nothing; 0: what is at hand, without looking for more.

        Raises:
            GroodError: if what is watched is no longer there, or no longer the same.
        """
        ...

    def done(self, items: Sequence[Item]) -> None:
        """Their rows are in the journal."""
        ...

    def release(self, item: Item) -> None:
        """It is `Gone`."""
        ...
