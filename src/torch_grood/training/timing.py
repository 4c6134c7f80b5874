"""How long the work took, and how much of it is left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from torch_grood.training.plan import Step

__all__ = ["Counted", "Stopwatch"]


class Stopwatch:
    """Seconds of work, pauses left out.

    Args:
        seconds: of an earlier run of it.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = None

    def start(self) -> None:
        """Begin, or go on."""
        if self._since is None:
            self._since = time.monotonic()

    def pause(self) -> None:
        """Stop until `start`."""
        self._before, self._since = self.seconds(), None

    def seconds(self) -> float:
        """So far."""
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)


class Counted(Iterable[Step]):
    """Steps whose number is known, for a bar that tells the time left."""

    def __init__(self, steps: Iterator[Step], length: int) -> None:
        self._steps, self._length = steps, length

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def __len__(self) -> int:
        return self._length
