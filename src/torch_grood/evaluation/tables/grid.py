"""One table, for a terminal and for Markdown; texts are escaped when it is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch_grood._optional import require
from torch_grood._text import plain

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["NONE", "Cell", "Grid", "escape_markdown", "percent"]

NONE = "–"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~&$#])")


@dataclass(frozen=True)
class Cell:
    """Text of a table, not yet escaped for anything."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: above it.
        headings: of the columns; the first is of the rows' names.
        rows: a cell a column.
        n_texts: columns at the end that are texts and no numbers.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    n_texts: int = 0

    def to_rich(self) -> Table:
        """For a terminal."""
        text = require("rich.text", extra="cli").Text
        # `Text` and not `str`, which would be searched for markup.
        table: Table = require("rich.table", extra="cli").Table(title=text(plain(self.title), style="table.title"))
        for place, heading in enumerate(self.headings):
            # A line for each part of a heading keeps the columns narrow.
            lines = text(plain(heading).replace(", ", ",\n").replace(": ", "\n"))
            table.add_column(lines, justify="right" if self._is_number(place) else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(text(plain(cell.text), style="bold" if cell.bold else "") for cell in row))
        return table

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown, with its title above it."""
        lines = [f"**{escape_markdown(self.title)}**", ""]
        lines.append(_markdown_row(escape_markdown(heading) for heading in self.headings))
        lines.append(_markdown_row("---:" if self._is_number(place) else "---" for place in range(len(self.headings))))
        for row in self.rows:
            cells = [escape_markdown(cell.text) for cell in row]
            lines.append(
                _markdown_row(f"**{text}**" if cell.bold else text for cell, text in zip(row, cells, strict=True))
            )
        return "\n".join(lines) + "\n"

    def _is_number(self, column: int) -> bool:
        return 0 < column < len(self.headings) - self.n_texts


def escape_markdown(text: object) -> str:
    """Text in one line that Markdown shows as it is."""
    escaped = _MARKDOWN.sub(r"\\\1", plain(text))
    # Angle brackets: a renderer that knows no escapes must not see a tag either.
    return escaped.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def percent(share: float, std: float | None = None) -> str:
    """A share as all tables print it, with its standard deviation if it has one."""
    return f"{100 * share:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
