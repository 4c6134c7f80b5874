"""All tables of a benchmark at once: for a terminal, and as files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch_grood._files import replacing
from torch_grood._optional import require
from torch_grood.evaluation.results import BenchmarkResults
from torch_grood.evaluation.tables.grid import escape_markdown
from torch_grood.evaluation.tables.long_form import to_csv
from torch_grood.evaluation.tables.notes import footnotes
from torch_grood.evaluation.tables.parts import PARTS, Part, Sort, grids

if TYPE_CHECKING:
    from rich.console import Group as Renderables

__all__ = ["to_markdown", "to_rich", "write_tables"]

_BLOCK_START = re.compile(r"^(\d*)([-+=.)])")


def to_rich(
    results: BenchmarkResults,
    *,
    parts: Sequence[Part] = ("methods", "sets"),
    sort: Sort = "near",
    intervals: bool = False,
) -> Renderables:
    """Tables for a terminal; print `footnotes` below them.

    Args:
        results: of a benchmark.
        parts: which tables; one that would be empty is left out.
        sort: rows by mean AUROC of a group, the best first, or in the order given.
        intervals: also show 95 % intervals, if there is one run.
    """
    found = [grid.to_rich() for grid in grids(results, parts, sort, intervals)]
    tables: Renderables = require("rich.console", extra="cli").Group(*found)
    return tables


def to_markdown(
    results: BenchmarkResults, *, parts: Sequence[Part] = PARTS, sort: Sort = "near", intervals: bool = True
) -> str:
    """A Markdown document: title, tables and footnotes; see `to_rich`."""
    blocks = [f"# {escape_markdown(results.spec.title)}\n"]
    blocks += [grid.to_markdown() for grid in grids(results, parts, sort, intervals)]
    lines = (_BLOCK_START.sub(r"\1\\\2", escape_markdown(line)) for line in footnotes(results, intervals=intervals))
    blocks.append("".join(f"- {line}\n" for line in lines))
    return "\n".join(blocks)


def write_tables(folder: str | os.PathLike[str], results: BenchmarkResults) -> None:
    """Write ``results.md`` and ``results.csv`` into a folder that is there.

    Raises:
        GroodError: if a file cannot be written.
    """
    for name, text in (("results.md", to_markdown(results)), ("results.csv", to_csv(results))):
        with replacing(Path(folder) / name) as temporary:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
