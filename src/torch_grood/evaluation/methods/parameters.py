"""Parameters of methods: what values they may have, and how they are read from a command line."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

__all__ = ["Count", "Kind", "Number", "OneOf", "Text", "parameter"]


class Kind(ABC):
    """What values a parameter may have.

    Attributes:
        meaning: in words, after "k is".
    """

    meaning: str

    @abstractmethod
    def checked(self, value: Any) -> Any:
        """The value in its proper type.

        Raises:
            ValueError: if it is not a value of the parameter.
        """

    @abstractmethod
    def read(self, text: str) -> Any:
        """A value from a command line; raises ValueError."""


@dataclass(frozen=True)
class Count(Kind):
    """A whole number.

    Attributes:
        meaning: see `Kind`.
        optional: None is a value, too.
    """

    meaning: str = "a whole number, at least 1"
    optional: bool = False

    def checked(self, value: Any) -> int | None:
        """See `Kind`."""
        if value is None and self.optional:
            return None
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError
        return int(value)

    def read(self, text: str) -> int | None:
        """See `Kind`."""
        return None if text == "none" else int(text)


@dataclass(frozen=True)
class Number(Kind):
    """A number in an interval.

    Attributes:
        meaning: see `Kind`.
        low, high: the interval's ends.
        above, below: whether the lower, the upper end is left out.
        optional: None is a value, too.
    """

    meaning: str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    optional: bool = False

    def checked(self, value: Any) -> float | None:
        """See `Kind`."""
        if value is None and self.optional:
            return None
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError
        number = float(value)
        if not self.low <= number <= self.high:
            raise ValueError
        if (self.above and number == self.low) or (self.below and number == self.high):
            raise ValueError
        return number

    def read(self, text: str) -> float | None:
        """See `Kind`."""
        return None if text == "none" else float(text)


@dataclass(frozen=True)
class OneOf(Kind):
    """One of some words.

    Attributes:
        words: they.
        optional: None is a value, too.
    """

    words: tuple[str, ...]
    optional: bool = False

    @property
    def meaning(self) -> str:  # type: ignore[override]
        """See `Kind`."""
        return f"one of {', '.join(self.words)}"

    def checked(self, value: Any) -> str | None:
        """See `Kind`."""
        if value is None and self.optional:
            return None
        if value not in self.words:
            raise ValueError
        return str(value)

    def read(self, text: str) -> str | None:
        """See `Kind`."""
        return None if text == "none" and self.optional else text


@dataclass(frozen=True)
class Text(Kind):
    """Words that something else checks."""

    meaning: str

    def checked(self, value: Any) -> str:
        """See `Kind`."""
        if not isinstance(value, str) or not value:
            raise ValueError
        return value

    def read(self, text: str) -> str:
        """See `Kind`."""
        return text


def parameter(default: Any, kind: Kind) -> Any:
    """A field of a method."""
    return field(default=default, metadata={"kind": kind})


PERCENTILE = Number("a percentile, from 0 to below 100", 0, 100, below=True)
TEMPERATURE = Number("a temperature, above 0", 0, above=True)
