"""A table of a file of figures, read strictly: what is wrong is an error that names the place."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from torch_grood.errors import GroodError
from torch_grood.evaluation.published.figures import Figure

__all__ = ["Table"]

_PRINTED = re.compile(r"\s*(\d{1,3}(?:\.\d{1,6})?)\s*(?:(?:±|\+-|\+/-)\s*(\d{1,3}(?:\.\d{1,6})?))?\s*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Table:
    """A table of the file; its errors name the place."""

    def __init__(self, data: dict[str, Any], origin: str, where: str = "", key: str = "") -> None:
        self.data, self.origin, self.where, self.key = data, origin, where, key

    def error(self, text: str) -> GroodError:
        return GroodError(f"{self.origin}: {f'[{self.where}] ' if self.where else ''}{text}")

    def only(self, *allowed: str) -> None:
        if unknown := [key for key in self.data if key not in allowed]:
            raise self.error(f"unknown key {unknown[0]!r:.80}; expected {', '.join(allowed)}")

    def table(self, key: str) -> Table:
        found = self.data.get(key, {})
        if not isinstance(found, dict):
            raise self.error(f"{key} is no table")
        return Table(found, self.origin, f"{self.where}.{key:.80}" if self.where else f"{key:.80}", key)

    def text(self, key: str, default: str | None = None) -> str:
        found = self.data.get(key, default)
        if found is None:
            raise self.error(f"the key {key} is missing; expected a text")
        if not isinstance(found, str) or (not found and found != default):
            raise self.error(f"{key} is {found!r:.80}; expected a text")
        return found

    def number(self, key: str, default: float) -> float:
        found = self.data.get(key, default)
        # Decimal refuses to compare NaN, which TOML has; float does not.
        number = float(found) if type(found) in (int, float, Decimal) else -1.0
        if not 0 <= number <= 100:
            raise self.error(f"{key} is {found!s:.80}; expected a number, 0 to 100")
        return number

    def figure(self, key: str) -> Figure | None:
        """In per cent, a number or a text such as "90.64 ± 0.20"; decimals count as they are written."""
        if key not in self.data:
            return None
        found = self.data[key]
        text = found if isinstance(found, str) else str(found) if type(found) in (int, Decimal) else ""
        match = _PRINTED.fullmatch(text)
        value = Decimal(match[1]) if match else None
        if match is None or value is None or value > 100:
            raise self.error(f'{key} is {found!s:.80}; expected per cent such as 90.64 or "90.64 ± 0.20"')
        decimals = len(match[1].partition(".")[2])
        return Figure(float(value), float(match[2]) if match[2] else None, decimals)

    def counts(self) -> dict[str, int]:
        for key, found in self.data.items():
            if type(found) is not int or found < 0:
                raise self.error(f"{key} is {found!s:.80}; expected a number of images, or 0 if it is not known")
        return dict(self.data)

    def hashes(self, key: str) -> frozenset[str]:
        found = self.data.get(key, [])
        if not isinstance(found, list) or not all(isinstance(one, str) and _SHA256.fullmatch(one) for one in found):
            raise self.error(f"{key} is no list of SHA-256 in 64 hexadecimal digits")
        return frozenset(found)

    def plain(self) -> dict[str, Any]:
        """Free values, to be compared with those of a JSON file."""
        kinds: dict[type, Callable[[Any], Any]] = {str: str, bool: bool, int: int, Decimal: float}
        for key, found in self.data.items():
            if type(found) not in kinds or (isinstance(found, Decimal) and not math.isfinite(float(found))):
                raise self.error(f"{key} is {found!s:.80}; expected a text, a number, true or false")
        return {key: kinds[type(found)](found) for key, found in self.data.items()}
