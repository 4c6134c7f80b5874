"""Decisions for programs: JSON, CSV or Parquet, written piece by piece.

An explanation is a nested object in a row of JSON, and columns of its own in CSV and Parquet, which hold the nearest
class prototype and training image only.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch_grood._optional import require
from torch_grood.cli._explain import FLAT_COLUMNS, explanation_of, flat_explanation_of

if TYPE_CHECKING:
    from torch_grood.cli._results import Results, Row

__all__ = ["COLUMNS", "lines", "write"]

COLUMNS = ("path", "score", "p_value", "is_ood", "label", "prototype_label")
_PARQUET_ROWS = 10_000


def _rows(results: Results, explain: bool) -> Iterator[Row]:
    """Of CSV and Parquet."""
    for position in range(len(results)):
        yield results.row(position) | (flat_explanation_of(results, position) if explain else {})


def _columns(explain: bool) -> tuple[str, ...]:
    return (*COLUMNS, *FLAT_COLUMNS) if explain else COLUMNS


def lines(results: Results, format: str, explain: bool) -> Iterator[str]:
    """The text of JSON or CSV, piece by piece."""
    if format == "json":
        yield from _json(results, explain)
        return
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    for values in itertools.chain([_columns(explain)], (row.values() for row in _rows(results, explain))):
        # true and false, as in JSON; Python's True means nothing to other programs.
        writer.writerow([str(value).lower() if isinstance(value, bool) else value for value in values])
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def _json(results: Results, explain: bool) -> Iterator[str]:
    before = "[\n"
    for position in range(len(results)):
        row = results.row(position)
        if explain:
            row["explanation"] = explanation_of(results, position)
        yield before + json.dumps(row)
        before = ",\n"
    yield "\n]\n"


def write(results: Results, format: str, explain: bool, file: Path) -> None:
    """Fill a file, which is there, in one of the three formats."""
    if format == "parquet":
        _write_parquet(results, explain, file)
        return
    with file.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(lines(results, format, explain))


def _write_parquet(results: Results, explain: bool, file: Path) -> None:
    arrow, parquet = (require(name, extra="cli") for name in ("pyarrow", "pyarrow.parquet"))
    types = {"is_ood": arrow.bool_(), "neighbor": arrow.int64()}
    types |= dict.fromkeys(("path", "label", "prototype_label", "neighbor_path"), arrow.string())
    schema = arrow.schema([(name, types.get(name, arrow.float64())) for name in _columns(explain)])
    with parquet.ParquetWriter(file, schema) as writer:
        for rows in _chunks(_rows(results, explain), _PARQUET_ROWS):
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema))


def _chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
