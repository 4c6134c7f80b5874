"""A table of a spec, read strictly: what is wrong is an error that names file, table and key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch_grood.errors import GroodError

__all__: list[str] = []

# Names become file names, columns and arguments.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_MAX_TEXT = 2000
_MAX_COUNT = 2**53
_NAME_RULE = "expected letters, digits, hyphens and underscores, 64 at most, the first a letter or digit"

_MISSING = {
    "id": "add [id.train] and [id.test], each with a list or a folder of labelled images",
    "id.train": "add it with a list or a folder of labelled images to fit on",
    "id.test": "add it with a list or a folder of labelled images to measure with",
}


class _Table:
    """A TOML table that knows where it stands, for messages."""

    def __init__(self, data: Mapping[str, Any], origin: str, where: str) -> None:
        self.data = data
        self.origin = origin
        self.where = where
        self.key = where.rpartition(".")[2]

    def __contains__(self, key: str) -> bool:
        return key in self.data

    def error(self, message: str) -> GroodError:
        """An error in this table."""
        return GroodError(f"{self.origin}: [{self.where}]: {message}" if self.where else f"{self.origin}: {message}")

    def wrong(self, key: str, expected: str) -> GroodError:
        """An error in a value of this table."""
        return self.error(f"{key} = {self.data[key]!r:.100} is not {expected}")

    def check_keys(self, *allowed: str) -> None:
        """Refuse what would otherwise be silently left aside, such as a key with a spelling mistake."""
        if unknown := [key for key in self.data if key not in allowed]:
            raise self.error(f"unknown key {unknown[0]!r:.80}; expected {', '.join(allowed)}")

    def table(self, key: str, needed: bool = False) -> _Table:
        """The table of that key; an empty one if it need not be there."""
        where = f"{self.where}.{key}" if self.where else key
        if needed and key not in self.data:
            raise GroodError(f"{self.origin}: the table [{where}] is missing; {_MISSING[where]}")
        found = self.data.get(key, {})
        if not isinstance(found, dict):
            raise self.wrong(key, f"a table; write it as [{where}] on a line of its own")
        return _Table(found, self.origin, where)

    def tables(self, key: str) -> list[_Table]:
        """The tables below that of a key, in the order of the file."""
        outer = self.table(key)
        if bad := [name for name in outer.data if not _NAME.fullmatch(name)]:
            raise outer.error(f"{bad[0]!r:.80} is no name; {_NAME_RULE}")
        return [outer.table(name) for name in outer.data]

    def text(self, key: str) -> str | None:
        """A string, or None if it is not there."""
        if key not in self.data:
            return None
        value = self.data[key]
        if not isinstance(value, str) or not value.strip() or len(value) > _MAX_TEXT or not value.isprintable():
            raise self.wrong(key, f"a text in one line of at most {_MAX_TEXT} characters")
        return value.strip()

    def name(self, key: str) -> str:
        """A name, which must be there."""
        value = self.text(key)
        if value is None:
            raise self.error(f'the key {key} is missing; add a line such as {key} = "flowers"')
        if not _NAME.fullmatch(value):
            raise self.wrong(key, f"a name; {_NAME_RULE}")
        return value

    def integer(self, key: str) -> int | None:
        """A number of things, or None if it is not there."""
        if key not in self.data:
            return None
        value = self.data[key]
        # type(…), not isinstance: true is an int to isinstance.
        if type(value) is not int or not 1 <= value <= _MAX_COUNT:
            raise self.wrong(key, "a whole number from 1 on")
        return value
