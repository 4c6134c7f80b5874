"""``grood score``: a decision for each image."""

from __future__ import annotations

import io
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from torch_grood._files import replacing
from torch_grood._text import plain
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
    report_bad,
    report_ignored,
    reporting,
    source_of,
)
from torch_grood.cli._runtime import is_onnx, refuse_model_options
from torch_grood.cli._scaled import (
    AddressOption,
    Engine,
    EngineOption,
    GpusOption,
    ParallelOption,
    check_local,
)
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from rich.console import Console

    from torch_grood import GROOD
    from torch_grood.cli._common import Reporter
    from torch_grood.cli._decision import Decision
    from torch_grood.cli._results import Results, Row
    from torch_grood.data import ImageSource, ImageTransform

__all__ = ["score"]

SHOWN = 20
# Neighbours of an image that are looked for at most; each is a distance, an angle and a path to show.
_NEIGHBORS = 100
_WIDE = 300

DECIDING, EXPLAINING = "Deciding (at most one)", "Explaining"


class _Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"


def score(
    detector: Annotated[Path, typer.Argument(metavar="DETECTOR", help="A .grood file, or an .onnx of grood export.")],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES", help="Folders (of any depth), image lists or image files.")
    ],
    format: Annotated[
        _Format | None,
        typer.Option("--format", help="Default: what the name of --output ends in, else a table."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write to a file instead of stdout; with --engine, to a folder."
        ),
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help=f"Show all images, not the {SHOWN} most OOD ones; draw up to 80.")
    ] = False,
    fpr: Annotated[
        float | None,
        typer.Option(
            "--fpr",
            metavar="RATE",
            help="Another false-alarm rate than the detector's, promised by the same calibration.",
            rich_help_panel=DECIDING,
        ),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(
            "--tau",
            metavar="SCORE",
            help="A threshold of your own: OOD above it. Nothing is promised; needs no calibration.",
            rich_help_panel=DECIDING,
        ),
    ] = None,
    fdr: Annotated[
        float | None,
        typer.Option(
            "--fdr",
            metavar="RATE",
            help="All images together: of those flagged, at most this share are ID in expectation "
            "(Benjamini-Hochberg).",
            rich_help_panel=DECIDING,
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say why: the parts of the score, the nearest class prototypes and training images.",
            rich_help_panel=EXPLAINING,
        ),
    ] = False,
    neighbors: Annotated[
        int | None,
        typer.Option(
            "--neighbors",
            metavar="K",
            min=1,
            max=_NEIGHBORS,
            help="Training images for each image. Default: 5.",
            rich_help_panel=EXPLAINING,
        ),
    ] = None,
    grid: Annotated[
        Path | None,
        typer.Option(
            "--grid",
            metavar="FILE",
            help="Draw the most OOD images beside their nearest training images: .png, .jpg or .webp.",
            rich_help_panel=EXPLAINING,
        ),
    ] = None,
    training_root: Annotated[
        Path | None,
        typer.Option(
            "--training-root",
            metavar="DIR",
            help="Where the training images of --grid are now, if not where the detector was fitted.",
            rich_help_panel=EXPLAINING,
        ),
    ] = None,
    engine: EngineOption = Engine.local,
    parallel: ParallelOption = None,
    address: AddressOption = None,
    gpus: GpusOption = 0,
    image_column: Annotated[
        str | None,
        typer.Option(
            "--image-column",
            metavar="NAME",
            help="Of Parquet inputs: the image files' bytes. Default: image.",
            rich_help_panel="Many processes",
        ),
    ] = None,
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
        grood score flowers.grood inbox/ --fdr 0.1
        grood score flowers.grood inbox/ --explain --grid why.png
        grood score flowers.grood inbox/ --format json --model nets.py:resnet20 --weights r20.pt
        grood score flowers.onnx inbox/
        grood score flowers.onnx s3://bucket/photos/ --engine ray --output s3://bucket/scores
        torchrun --nproc-per-node 8 -m torch_grood score flowers.onnx photos/ --engine torchrun -o scores/
    """
    if engine is not Engine.local:
        from torch_grood.cli import _scaled

        local_only = {"--format": format, "--all": show_all, "--fdr": fdr, "--explain": explain, "--grid": grid}
        local_only |= {"--neighbors": neighbors, "--training-root": training_root, "--workers": workers}
        folder = _scaled.check_scaled(output, local_only)
        make_runtime = _scaled.MakeRuntime.of(detector, model, weights, num_classes, transform, device, fpr, tau)
        scaled = _scaled.Scaled(engine, folder, parallel, address, gpus, image_column, batch_size)
        _scaled.score_scaled(make_runtime, images, root, scaled, quiet)
        return
    check_local(parallel, address, gpus, image_column)
    target = None if output is None else Path(output)
    chosen = _format(format, target)
    explaining = explain or grid is not None
    _check_explaining(explaining, neighbors, grid, training_root)
    for file in (target, grid):
        if file is not None:
            check_output(file, detector, weights, *images)
    if target is not None and grid is not None and target.resolve() == grid.resolve():
        raise GroodError(f"--output and --grid both name {grid}; give two names")
    from torch_grood.cli import _formats
    from torch_grood.cli._decision import Decision, report_decision

    decision = Decision(fpr, tau, fdr)
    if is_onnx(detector):
        refuse_model_options(detector, model, weights, num_classes, transform, device)
        if explaining:
            raise GroodError(
                f"{detector} has no training images to explain with; give --explain and --grid a .grood file"
            )
    source = source_of(images, root, "none")
    _check_not_an_image(grid, source)
    with reporting(quiet) as reporter:
        how = _How(decision, batch_size, workers, "skip" if skip_bad else "raise", reporter)
        if is_onnx(detector):
            results = _by_onnx(detector, source, how)
        else:
            opened = open_detector(detector, model, weights, num_classes, transform, device, reporter)
            most = _most(explain, chosen, grid, show_all) if explaining else 0
            results = _by_detector(*opened, source, how, (neighbors or 5, most) if explaining else None)
        report_decision(results, decision, reporter)
    if grid is not None:
        from torch_grood.cli import _grid

        drawn = results.by_score[: _grid.GRID_ROWS_ALL if show_all else _grid.GRID_ROWS]
        _grid.write_grid(grid, results, drawn, training_root)
    if target is not None:
        with replacing(target) as temporary:
            _formats.write(results, chosen, explain, temporary)
    elif chosen is _Format.table:
        _print(results, explain, None if show_all else SHOWN)
    else:
        sys.stdout.writelines(_formats.lines(results, chosen, explain))


class _How(NamedTuple):
    """In which way a source is read and decided about."""

    decision: Decision
    batch_size: int
    workers: int | None
    on_bad: Literal["raise", "skip"]
    reporter: Reporter


def _by_detector(
    detector: GROOD, transform: ImageTransform, source: ImageSource, how: _How, explain: tuple[int, int | None] | None
) -> Results:
    """In PyTorch; `explain` is how many neighbours of how many images are wanted."""
    from torch_grood.cli._assessing import assess_all, explain_most
    from torch_grood.cli._decision import check_decision
    from torch_grood.data import image_loader

    check_decision(detector, how.decision)
    report_ignored(source, how.reporter)
    loader = image_loader(source, transform, batch_size=how.batch_size, workers=how.workers, on_bad=how.on_bad)
    progress = how.reporter.progress("scoring")
    try:
        if explain is None:
            return assess_all(detector, loader, how.decision, progress)
        return explain_most(detector, loader, how.decision, progress, *explain)
    finally:
        report_bad(loader, how.reporter)


def _by_onnx(file: Path, source: ImageSource, how: _How) -> Results:
    """In ONNX Runtime, without torch."""
    from torch_grood.cli._exported import decide_all, opened
    from torch_grood.data.pixels import PixelLoader

    runtime = opened(file, how.decision)
    report_ignored(source, how.reporter)
    loader = PixelLoader(source, runtime.transform, batch_size=how.batch_size, threads=how.workers, on_bad=how.on_bad)
    try:
        return decide_all(runtime, loader, how.decision, how.reporter.progress("scoring"))
    finally:
        report_bad(loader, how.reporter)


def _check_explaining(explaining: bool, neighbors: int | None, grid: Path | None, training_root: Path | None) -> None:
    from torch_grood.cli._grid import GRID_FORMATS

    if neighbors is not None and not explaining:
        raise GroodError("--neighbors is for --explain and --grid; add one of them or leave it out")
    if training_root is not None and grid is None:
        raise GroodError("--training-root is for --grid; add it or leave it out")
    if training_root is not None and not training_root.is_dir():
        raise GroodError(f"--training-root {training_root}: no such folder")
    if grid is not None and grid.suffix.lower() not in GRID_FORMATS:
        raise GroodError(f"--grid {grid} must end in {', '.join(GRID_FORMATS)}")


def _check_not_an_image(grid: Path | None, source: ImageSource) -> None:
    if grid is not None and grid.exists() and any(Path(path).exists() and grid.samefile(path) for path in source.paths):
        raise GroodError(f"--grid {grid} would overwrite an image that is scored; give another name")


def _most(explain: bool, chosen: _Format, grid: Path | None, show_all: bool) -> int | None:
    """How many of the most OOD images are shown with an explanation; None: all."""
    from torch_grood.cli._grid import GRID_ROWS, GRID_ROWS_ALL

    if explain and (show_all or chosen is not _Format.table):
        return None
    drawn = 0 if grid is None else GRID_ROWS_ALL if show_all else GRID_ROWS
    return max(drawn, SHOWN if explain else 0)


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


def _print(results: Results, explain: bool, limit: int | None) -> None:
    """The most OOD images, as a table or as blocks with the reasons."""
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows few characters shows the others by their numbers.
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        # There is no edge to wrap at in a file or pipe.
        console.width = max(console.width, _WIDE)
    worst = results.by_score[:limit]
    if explain:
        from torch_grood.cli._explain import print_blocks

        print_blocks(results, worst, console)
    else:
        _print_table([results.row(position) for position in worst], console)
    if len(worst) < len(results):
        typer.echo(
            f"the {len(worst)} most OOD of {len(results):,} images; --all shows all, --format csv or json is for "
            "programs",
            err=True,
        )


def _print_table(rows: list[Row], console: Console) -> None:
    from rich.table import Table

    from torch_grood.cli._formats import COLUMNS

    table = Table(*COLUMNS)
    table.columns[0].overflow = "fold"
    for row in rows:
        cells = ["" if row[name] is None else _cell(row[name]) for name in COLUMNS]
        table.add_row(*cells, style="bold red" if row["is_ood"] else None)
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "OOD" if value else "ID"
    return f"{value:.4g}" if isinstance(value, float) else plain(value)
