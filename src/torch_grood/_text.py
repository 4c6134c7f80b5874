"""Text that may come from anywhere: a file name, a detector file, somebody's results."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["encodable", "plain", "shorten"]

_SHOWN = 5


def plain(text: object) -> str:
    """Text in one line that cannot steer a terminal."""
    return "".join(char if char.isprintable() else " " if char in "\n\t" else repr(char)[1:-1] for char in str(text))


def encodable(text: str) -> str:
    """Text that UTF-8 can hold; a file name may have bytes that are none."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shorten(items: Sequence[object], separator: str = ", ") -> str:
    """The first few items."""
    return separator.join(map(str, items[:_SHOWN])) + (f"{separator}…" if len(items) > _SHOWN else "")
