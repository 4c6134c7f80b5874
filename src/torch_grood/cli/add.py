"""``grood add``: store more training images in a fitted detector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    report_ignored,
    reporting,
    run_over,
    source_of,
)

__all__ = ["add"]


def add(
    detector: Annotated[Path, typer.Argument(metavar="DETECTOR", help="A .grood file.")],
    train: Annotated[
        str,
        typer.Argument(
            metavar="DIR|LIST",
            help="More of the classifier's training images: class folders, named as the detector's classes, or a list.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write here; else DETECTOR is replaced.")
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
    """Store more training images without a refit; prototypes and threshold stay.

    No score becomes larger, so that the promised share of false alarms still
    holds; calibrate again to catch as many outliers as it allows.

    Examples:
        grood add flowers.grood flowers/new
        grood add flowers.grood new.txt --root images --output more.grood
    """
    target = output or detector
    check_output(target)
    from torch_grood.data import image_loader

    source = source_of([train], root, "required")
    with reporting(quiet) as reporter:
        loaded, prepared = open_detector(detector, model, weights, num_classes, transform, device, reporter)
        report_ignored(source, reporter)
        before = loaded.fit_info_.n_indexed
        loader = image_loader(
            source, prepared, batch_size=batch_size, workers=workers, on_bad="skip" if skip_bad else "raise"
        )
        run_over(loaded.add, loader, reporter, progress=reporter.progress("adding"))
        loaded.save(target)
    if not quiet:
        stored = loaded.fit_info_.n_indexed
        typer.echo(f"wrote {target}: {stored - before:,} of {len(source):,} images are stored now, {stored:,} in all")
