"""``grood calibrate``: a threshold for a fitted detector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torch_grood.cli._cache import CacheOption, cache_of
from torch_grood.cli._common import (
    BatchSizeOption,
    ClassThresholdsOption,
    Device,
    DeviceOption,
    DropTrainingOption,
    ImageColumnOption,
    LabelColumnOption,
    ModelOption,
    NameColumnOption,
    NumClassesOption,
    QuietOption,
    RootOption,
    SkipBadOption,
    StoredTransformOption,
    WeightsOption,
    WorkersOption,
    check_columns,
    check_output,
    columns_of,
    held_out_source,
    open_detector,
    reporting,
    run_over,
)

__all__ = ["calibrate"]


def calibrate(
    detector: Annotated[Path, typer.Argument(metavar="DETECTOR", help="A .grood file.")],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Held-out in-distribution images: folders, lists, files or Parquet files, here or at URLs; none of "
            "the training images.",
        ),
    ],
    fpr: Annotated[float, typer.Option("--fpr", help="Share of false alarms to promise.")] = 0.05,
    class_thresholds: ClassThresholdsOption = False,
    drop_training: DropTrainingOption = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write here; else DETECTOR is replaced.")
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    num_classes: NumClassesOption = None,
    transform: StoredTransformOption = None,
    device: DeviceOption = Device.auto,
    root: RootOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    name_column: NameColumnOption = None,
    batch_size: BatchSizeOption = 64,
    workers: WorkersOption = None,
    skip_bad: SkipBadOption = False,
    cache: CacheOption = None,
    quiet: QuietOption = False,
) -> None:
    """Give a fitted detector its threshold, or another one.

    Examples:
        grood calibrate flowers.grood flowers/val
        grood calibrate flowers.grood val.txt --root images --fpr 0.01
        grood calibrate flowers.grood flowers/val --output strict.grood --fpr 0.001
        grood calibrate flowers.grood flowers/val --class-thresholds
        grood calibrate flowers.grood s3://bucket/val.parquet --label-column fine_label
    """
    target = output or detector
    check_output(target)
    from torch_grood.data import image_loader
    from torch_grood.summary import facts, operating_points, rows

    columns = columns_of(image_column, label_column, name_column)
    source = held_out_source(images, root, columns)
    check_columns(columns, source)
    kept = cache_of(cache, *images)
    with reporting(quiet) as reporter:
        loaded, prepared = open_detector(detector, model, weights, num_classes, transform, device, reporter)
        loader = image_loader(
            source, prepared, batch_size=batch_size, workers=workers, on_bad="skip" if skip_bad else "raise"
        )
        run_over(
            loaded.calibrate,
            loader,
            reporter,
            fpr=fpr,
            per_class=class_thresholds,
            on_training="drop" if drop_training else "raise",
            progress=reporter.progress("calibrating"),
            cache=kept,
        )
        loaded.metadata["calibration"] = {"paths": images}
        loaded.save(target)
    if not quiet:
        found = facts(loaded, target)
        summary = dict(rows(found))
        typer.echo(f"wrote {summary['file']}\nthreshold: {summary['threshold']}")
        for line in operating_points(found):
            typer.echo(line)
