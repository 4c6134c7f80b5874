"""``grood report``: one page for people."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torch_grood.cli._common import (
    BatchSizeOption,
    Device,
    DeviceOption,
    FprOption,
    ModelOption,
    NumClassesOption,
    QuietOption,
    RootOption,
    SkipBadOption,
    StoredTransformOption,
    TauOption,
    WeightsOption,
    WorkersOption,
    check_output,
    open_detector,
    report_ignored,
    reporting,
    source_of,
)
from torch_grood.cli._runtime import is_onnx
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.cli._common import Reporter
    from torch_grood.report import ReportSet
    from torch_grood.report.sets import Role

__all__ = ["report"]

SETS, PAGE = "Image sets", "Page"
_PATHS = "[NAME=]PATH"


def report(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DETECTOR|RESULTS", help="A .grood file; or a results.json of grood benchmark, or its folder."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.html", help="The page to write.", rich_help_panel=PAGE)
    ] = Path("grood-report.html"),
    known: Annotated[
        str | None,
        typer.Option(
            "--known",
            metavar=_PATHS,
            help="Known images that neither the classifier nor the detector has seen: a class folder, or a list with "
            "labels, or without.",
            rich_help_panel=SETS,
        ),
    ] = None,
    near: Annotated[
        list[str] | None,
        typer.Option("--near", metavar=_PATHS, help="Unknown images that look like known ones.", rich_help_panel=SETS),
    ] = None,
    far: Annotated[
        list[str] | None,
        typer.Option("--far", metavar=_PATHS, help="Unknown images that do not.", rich_help_panel=SETS),
    ] = None,
    unknown: Annotated[
        list[str] | None,
        typer.Option("--unknown", metavar=_PATHS, help="Unknown images, near or far.", rich_help_panel=SETS),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", metavar=_PATHS, help="Images of whatever kind.", rich_help_panel=SETS),
    ] = None,
    fpr: FprOption = None,
    tau: TauOption = None,
    title: Annotated[
        str | None, typer.Option("--title", metavar="TEXT", help="Of the page.", rich_help_panel=PAGE)
    ] = None,
    points: Annotated[
        int,
        typer.Option(
            "--points",
            min=0,
            max=20_000,
            help="Images drawn one by one, about a kilobyte each; 0: no image is in the page.",
            rich_help_panel=PAGE,
        ),
    ] = 1500,
    training_root: Annotated[
        Path | None,
        typer.Option(
            "--training-root",
            metavar="DIR",
            help="Where the training images are now, if not where the detector was fitted.",
            rich_help_panel=PAGE,
        ),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            "--bootstrap",
            min=0,
            max=100_000,
            help="Draws for the 95 % intervals of FPR@95, at least 40; 0: none.",
            rich_help_panel=PAGE,
        ),
    ] = 1000,
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, help="Of which images are drawn, and of the bootstrap.", rich_help_panel=PAGE),
    ] = 0,
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
    """Write one HTML page about a detector and images, or about a benchmark's results. It needs no network.

    Examples:
        grood report flowers.grood --known flowers/test --near Weeds=weeds/ --far photos/ -o flowers.html
        grood report flowers.grood --images inbox/ --training-root flowers/train
        grood report flowers.grood --known test.txt --points 0
        grood report found/results.json -o benchmark.html
    """
    check_output(output, source, weights, *_paths(known, near, far, unknown, images))
    if source.is_dir() or source.suffix.lower() == ".json":
        given: dict[str, object] = {"--known": known, "--near": near, "--far": far, "--unknown": unknown}
        given |= {"--images": images, "--fpr": fpr, "--tau": tau, "--training-root": training_root}
        given |= {"--model": model, "--weights": weights, "--root": root}
        superfluous = [name for name, value in given.items() if value is not None]
        if superfluous:
            raise GroodError(f"{source} is about results that are there already; leave {', '.join(superfluous)} out")
        _on_results(source, output, title, quiet)
        return
    if is_onnx(source):
        raise GroodError(f"{source} has no gradients to look at; give the .grood file that it was exported from")
    if fpr is not None and tau is not None:
        raise GroodError("--fpr and --tau are different ways to decide; give one of them")
    if training_root is not None and not training_root.is_dir():
        raise GroodError(f"--training-root {training_root}: no such folder")
    from torch_grood.report import Options, detector_report, write_page

    given_sets: list[tuple[Role, str]] = [("known", known)] if known is not None else []
    roles: tuple[tuple[Role, list[str] | None], ...] = (
        *(("near", near), ("far", far)),
        *(("unknown", unknown), ("unlabelled", images)),
    )
    given_sets += [(role, text) for role, texts in roles for text in texts or ()]
    sets = [_set(role, text, root) for role, text in given_sets]
    options = Options(
        title=title,
        fpr=fpr,
        tau=tau,
        points=points,
        draws=draws,
        seed=seed,
        training_root=training_root,
        batch_size=batch_size,
        workers=workers,
        on_bad="skip" if skip_bad else "raise",
    )
    with reporting(quiet) as reporter:
        for one in sets:
            report_ignored(one.source, reporter)
        if not sets:
            reporter.warn("no images are given, so that the page tells of the fit alone; add --known, --near, --far, …")
        detector, prepared = open_detector(source, model, weights, num_classes, transform, device, reporter)
        text = detector_report(detector, prepared, sets, options, file=source, progress=reporter.progress)
        write_page(output, text)
        _say_end(output, text, reporter)


def _on_results(source: Path, output: Path, title: str | None, quiet: bool) -> None:
    from torch_grood.report import benchmark_report, write_page

    file = source / "results.json" if source.is_dir() else source
    with reporting(quiet) as reporter:
        text = benchmark_report(file, title=title)
        write_page(output, text)
        _say_end(output, text, reporter)


def _say_end(output: Path, text: str, reporter: Reporter) -> None:
    reporter.say(f"wrote {output}, {len(text.encode()) / 1e6:.1f} MB; open it in a browser")


def _set(role: Role, text: str, root: str | None) -> ReportSet:
    """What an option stands for."""
    from torch_grood.report import ReportSet

    name, path = _parted(text)
    return ReportSet(name, role, source_of([path], root, "auto" if role == "known" else "none"))


def _parted(text: str) -> tuple[str, str]:
    """Name and path; a path that is there has no name before it, whatever characters it has."""
    name, found, path = text.partition("=")
    if not found or os.path.exists(text):  # noqa: PTH110 - a text of any length
        return Path(text).stem or text, text
    if not name or not path:
        raise GroodError(f"{text!r}: expected PATH, or NAME=PATH")
    return name, path


def _paths(*options: str | list[str] | None) -> list[str]:
    texts = [
        text for option in options if option is not None for text in ([option] if isinstance(option, str) else option)
    ]
    return [_parted(text)[1] for text in texts]
