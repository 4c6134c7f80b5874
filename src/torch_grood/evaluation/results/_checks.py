"""What numbers and names in results may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch_grood.errors import GroodError

__all__ = ["Interval", "check_interval", "check_seconds", "check_shares", "twice"]

Interval = tuple[float, float]

# OpenOOD's trapezoids of a perfect ranking may sum to a few units in the last place above 1, and are kept as they are.
_ROUNDING = 1e-12


def check_shares(shares: Mapping[str, float | None]) -> None:
    """Refuse what is no share; None is not known."""
    for name, value in shares.items():
        # NaN compares with nothing.
        if value is not None and not 0 <= value <= 1 + _ROUNDING:
            raise GroodError(f"{name} is {value}; expected a share, 0 to 1")


def check_seconds(**seconds: float) -> None:
    """Refuse what is no time."""
    for name, value in seconds.items():
        if not 0 <= value < math.inf:
            raise GroodError(f"{name} took {value} seconds; expected a number from 0 on")


def check_interval(interval: Interval, least: float, name: str) -> None:
    """Refuse an interval that does not lie within `least` and 1, the low end first."""
    if len(interval) != 2 or not least <= interval[0] <= interval[1] <= 1:
        raise GroodError(f"the interval of {name} is {list(interval)}; expected two ascending numbers, {least:g} to 1")


def twice(names: Sequence[str]) -> str | None:
    """The first name that occurs again, if one does."""
    return None if len(set(names)) == len(names) else next(name for name in names if names.count(name) > 1)
