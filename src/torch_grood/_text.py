"""Text that may come from anywhere: a file name, a detector file, somebody's results."""

from __future__ import annotations

__all__ = ["plain"]


def plain(text: object) -> str:
    """Text in one line that cannot steer a terminal."""
    return "".join(char if char.isprintable() else " " if char in "\n\t" else repr(char)[1:-1] for char in str(text))
