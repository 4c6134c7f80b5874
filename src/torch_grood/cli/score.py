"""``grood score``: a decision for each image."""

from __future__ import annotations

import csv
import io
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torch_grood._files import replacing
from torch_grood._optional import require
from torch_grood.cli._common import (
    BatchSizeOption,
    Device,
    DeviceOption,
    ModelOption,
    NumClassesOption,
    QuietOption,
    RootOption,
    SkipBadOption,
    StoredTransformOption,
    WeightsOption,
    WorkersOption,
    check_output,
    open_detector,
    plain,
    report_bad,
    report_ignored,
    reporting,
    source_of,
)
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood import GROOD
    from torch_grood.cli._common import Reporter
    from torch_grood.data import ImageLoader

__all__ = ["score"]

COLUMNS = ("path", "score", "p_value", "is_ood", "label", "prototype_label")
SHOWN = 20
_WIDE = 300

Row = dict[str, Any]


class _Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"


def score(
    detector: Annotated[Path, typer.Argument(metavar="DETECTOR", help="A .grood file.")],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES", help="Folders (of any depth), image lists or image files.")
    ],
    format: Annotated[
        _Format | None,
        typer.Option("--format", help="Default: what the name of --output ends in, else a table."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to a file instead of stdout.")
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help=f"Table: all images, not the {SHOWN} most OOD ones.")] = False,
    model: ModelOption = None,
    weights: WeightsOption = None,
    num_classes: NumClassesOption = None,
    transform: StoredTransformOption = None,
    device: DeviceOption = Device.auto,
    root: RootOption = None,
    batch_size: BatchSizeOption = 64,
    workers: WorkersOption = None,
    skip_bad: SkipBadOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score images: higher is more OOD, and is_ood is the decision.

    Examples:
        grood score flowers.grood photo.jpg other.png
        grood score flowers.grood inbox/ --output scores.csv --skip-bad
        grood score flowers.grood inbox/ --format json --model nets.py:resnet20 --weights r20.pt
    """
    chosen = _format(format, output)
    if output is not None:
        check_output(output, detector, weights, *images)
    from torch_grood.data import image_loader

    source = source_of(images, root, "none")
    with reporting(quiet) as reporter:
        loaded, prepared = open_detector(detector, model, weights, num_classes, transform, device, reporter)
        report_ignored(source, reporter)
        loader = image_loader(
            source, prepared, batch_size=batch_size, workers=workers, on_bad="skip" if skip_bad else "raise"
        )
        try:
            rows = _rows(loaded, loader, reporter)
        finally:
            report_bad(loader, reporter)
    if output is not None:
        with replacing(output) as temporary:
            _write(rows, chosen, temporary)
    elif chosen is _Format.table:
        _print_table(rows, None if show_all else SHOWN)
    else:
        sys.stdout.write(_text(rows, chosen))


def _format(given: _Format | None, output: Path | None) -> _Format:
    if given is None:
        suffix = "" if output is None else output.suffix.lower().removeprefix(".")
        if output is not None and suffix not in ("json", "csv", "parquet"):
            raise GroodError(f"--output {output} ends in neither .json, .csv nor .parquet; add --format")
        return _Format(suffix or "table")
    if given is _Format.table and output is not None:
        raise GroodError("a table is for the terminal; choose --format json, csv or parquet for --output")
    if given is _Format.parquet and output is None:
        raise GroodError("Parquet is no text; add --output FILE.parquet")
    return given


def _rows(detector: GROOD, loader: ImageLoader, reporter: Reporter) -> list[Row]:
    progress = reporter.progress("scoring")
    if detector.threshold_ is None:
        reporter.warn(
            "this detector is not calibrated: there are scores, but no p-values and decisions; run grood calibrate"
        )
        columns: list[list[Any]] = [detector.score(loader, progress=progress).tolist()]
    else:
        found = detector.predict(loader, progress=progress)
        names = [str(name) for name in detector.classes_]
        labels = [
            [names[i] for i in label.tolist()] for label in (found.label, found.prototype_label) if label is not None
        ]
        columns = [found.score.tolist(), found.p_value.tolist(), found.is_ood.tolist(), *labels]
    paths = [_encodable(loader.dataset.source.paths[position]) for position in loader.kept]
    missing = [None] * (len(COLUMNS) - 1 - len(columns))
    return [dict(zip(COLUMNS, (*row, *missing), strict=True)) for row in zip(paths, *columns, strict=True)]


def _encodable(path: str) -> str:
    """A file name may hold bytes that are no UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def _text(rows: list[Row], format: _Format) -> str:
    if format is _Format.json:
        return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    # true and false, as in JSON; Python's True means nothing to other programs.
    writer.writerows(
        [str(value).lower() if isinstance(value, bool) else value for value in row.values()] for row in rows
    )
    return text.getvalue()


def _write(rows: list[Row], format: _Format, file: Path) -> None:
    if format is not _Format.parquet:
        file.write_text(_text(rows, format), encoding="utf-8", newline="")
        return
    arrow, parquet = (require(name, extra="cli") for name in ("pyarrow", "pyarrow.parquet"))
    types = (arrow.string(), arrow.float64(), arrow.float64(), arrow.bool_(), arrow.string(), arrow.string())
    schema = arrow.schema(list(zip(COLUMNS, types, strict=True)))
    parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), file)


def _print_table(rows: list[Row], limit: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    worst = sorted(rows, key=lambda row: -row["score"])[:limit]
    table = Table(*COLUMNS)
    table.columns[0].overflow = "fold"
    for row in worst:
        cells = ["" if row[name] is None else _cell(row[name]) for name in COLUMNS]
        table.add_row(*cells, style="bold red" if row["is_ood"] else None)
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        # There is no edge to wrap at in a file or pipe.
        console.width = max(console.width, _WIDE)
    console.print(table)
    if len(worst) < len(rows):
        typer.echo(
            f"the {len(worst)} most OOD of {len(rows):,} images; --all shows all, --format csv or json is for programs",
            err=True,
        )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "OOD" if value else "ID"
    return f"{value:.4g}" if isinstance(value, float) else plain(value)
