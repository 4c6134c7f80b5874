"""``grood fit``: from a classifier and its training images to a detector file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from torch_grood._text import shorten
from torch_grood.cli._cache import CacheOption, cache_of
from torch_grood.cli._common import (
    MODEL,
    BatchSizeOption,
    ClassThresholdsOption,
    Device,
    DeviceOption,
    DropTrainingOption,
    ImageColumnOption,
    LabelColumnOption,
    NameColumnOption,
    NumClassesOption,
    QuietOption,
    Reporter,
    RootOption,
    SkipBadOption,
    WeightsOption,
    WorkersOption,
    check_columns,
    check_output,
    columns_of,
    held_out_source,
    least_rate,
    report_bad,
    report_ignored,
    reporting,
    run_over,
    source_of,
    to_device,
)
from torch_grood.cli._scaled import (
    AddressOption,
    Engine,
    EngineOption,
    GpusOption,
    ParallelOption,
    ShardsOption,
    check_local,
)
from torch_grood.cli._search import (
    CoresetOption,
    IndexOption,
    IndexParameterOption,
    MemoryOption,
    PerClassOption,
    Store,
    StoreOption,
    index_of,
    store_of,
    subset_of,
)
from torch_grood.cli._transform import (
    CropOption,
    MeanOption,
    ResizeOption,
    StdOption,
    TransformOption,
    transform_of,
)
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood import FitInfo
    from torch_grood.data import ImageLoader, ImageSource
    from torch_grood.outliers import OutlierSource

__all__ = ["fit"]

OUTLIERS = "Method"
DEFAULT_RATE = 0.05


class _Outliers(StrEnum):
    energy = "energy"
    mixup = "mixup"
    noise = "noise"
    mean = "mean"
    samples = "samples"


class _Geometry(StrEnum):
    raw = "raw"
    half = "half"
    unit = "unit"


def fit(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="SPEC",
            help="torchvision:NAME, timm:NAME, package.module:factory, file.py:factory, or the folder of a "
            "grood train.",
            rich_help_panel=MODEL,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The detector file to write.")],
    train: Annotated[
        str | None,
        typer.Option(
            "--train",
            metavar="DIR|LIST|PARQUET",
            help="The classifier's training images: a folder of class folders, which sorted by name are its outputs "
            "0, 1, …; a list of lines 'path label'; or Parquet files with a column of labels. Each may be a URL. "
            "Default: those of the grood train.",
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="DIR|LIST|PARQUET",
            help="Held-out in-distribution images for the threshold; without them the detector cannot decide. Default: "
            "those that the grood train held out.",
        ),
    ] = None,
    fpr: Annotated[float, typer.Option("--fpr", help="Share of false alarms to promise.")] = DEFAULT_RATE,
    class_thresholds: ClassThresholdsOption = False,
    drop_training: DropTrainingOption = False,
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="A,B,…", help="Only these classes take part; names or numbers."),
    ] = None,
    weights: WeightsOption = None,
    num_classes: NumClassesOption = None,
    device: DeviceOption = Device.auto,
    transform: TransformOption = None,
    resize: ResizeOption = None,
    crop: CropOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    outliers: Annotated[
        _Outliers,
        typer.Option(
            "--outliers",
            help="Where the OOD prototype comes from; each source has settings of its own (docs/research). "
            "mixup: as in the paper.",
            rich_help_panel=OUTLIERS,
        ),
    ] = _Outliers.energy,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Number of outliers.", rich_help_panel=OUTLIERS)] = None,
    lam: Annotated[
        float | None,
        typer.Option("--lam", help="mixup: weight of the sample in the mix.", rich_help_panel=OUTLIERS),
    ] = None,
    ood: Annotated[
        str | None,
        typer.Option("--ood", metavar="DIR|LIST|PARQUET", help="samples: real OOD images.", rich_help_panel=OUTLIERS),
    ] = None,
    geometry: Annotated[
        _Geometry | None,
        typer.Option(
            "--geometry",
            help="Features as they are, of unit length, or between. Default: the source's.",
            rich_help_panel=OUTLIERS,
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            "--k", min=1, help="Nearest gradients in the mean. Default: the source's.", rich_help_panel=OUTLIERS
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="LAYER", help="The model's last layer, if not found.", rich_help_panel=OUTLIERS),
    ] = None,
    early_layer: Annotated[
        str | None,
        typer.Option(
            "--early-layer", metavar="LAYER", help="mixup: where to mix, if not found.", rich_help_panel=OUTLIERS
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.", rich_help_panel=OUTLIERS)] = 0,
    index: IndexOption = "exact",
    index_option: IndexParameterOption = None,
    store: StoreOption = Store.float32,
    memory: MemoryOption = None,
    per_class: PerClassOption = None,
    coreset: CoresetOption = None,
    root: RootOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    name_column: NameColumnOption = None,
    batch_size: BatchSizeOption = 64,
    workers: WorkersOption = None,
    skip_bad: SkipBadOption = False,
    cache: CacheOption = None,
    engine: EngineOption = Engine.local,
    parallel: ParallelOption = None,
    address: AddressOption = None,
    gpus: GpusOption = 0,
    shards: ShardsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Fit a detector for a classifier and write it to a file.

    Examples:
        grood fit --model flowers-run --output flowers.grood
        grood fit --model torchvision:resnet50 --train in/train --calibrate in/val -o in.grood
        grood fit --model nets.py:net --weights w.pt --transform cifar10 --train train.txt -o c.grood
        grood fit --model timm:resnet18 --train dogs --outliers samples --ood cats -o d.grood
        grood fit --model torchvision:vit_b_16 --train in/train --store int8 --memory 4GiB -o v.grood
        grood fit --model torchvision:resnet50 --train in/train --cache ~/in.cache -o in.grood
        grood fit --model torchvision:resnet50 --train 's3://bucket/train-*.parquet' -o in.grood
        grood fit --model torchvision:resnet50 --train in/train --cache ~/in.cache -o in.grood --engine ray
    """
    from torch_grood.cli import _filling

    if engine is Engine.local:
        check_local(parallel, address, gpus, shards)
    else:
        cache = _filling.check_filling(cache, engine, shards)
    from torch_grood.models.from_run import WEIGHTS, is_run, read_record

    used_weights, is_complete = weights, True
    if is_run(model):
        is_complete = read_record(Path(model)).get("status") == "complete"
        # The images that it held out chose nothing in the training, so that they may calibrate.
        train, calibrate = train or str(Path(model) / "train.txt"), calibrate or str(Path(model) / "val.txt")
        used_weights = weights or Path(model) / WEIGHTS
    if train is None:
        raise typer.BadParameter(
            "the training images of this model must be named; only the folder of a grood train knows its own",
            param_hint="--train",
        )
    check_output(output, used_weights, train, calibrate, ood, model.rpartition(":")[0])
    from torch_grood import GROOD
    from torch_grood.data import image_loader
    from torch_grood.models import load_model
    from torch_grood.summary import facts, rows

    if calibrate is not None and not 0 < fpr < 1:
        raise GroodError(f"--fpr is the share of false alarms, between 0 and 1; got {fpr}")
    columns = columns_of(image_column, label_column, name_column)
    source = source_of([train], root, "required", columns)
    held_out = None if calibrate is None else held_out_source([calibrate], root, columns)
    if held_out is not None:
        _check_rate(fpr, held_out)
    kept = cache_of(cache, train, calibrate, ood)
    if held_out is not None and not drop_training:
        _check_apart(source, held_out)
    loaded = load_model(model, weights, num_classes)
    if source.classes is None and loaded.classes is not None:
        source = replace(source, classes=loaded.classes)
    prepared = transform_of(loaded, transform, resize, crop, mean, std)

    on_bad: Literal["raise", "skip"] = "skip" if skip_bad else "raise"

    def loader_of(images: ImageSource) -> ImageLoader:
        return image_loader(images, prepared, batch_size=batch_size, workers=workers, on_bad=on_bad)

    outlier_source = None if ood is None else source_of([ood], root, "none", columns)
    check_columns(columns, source, held_out, outlier_source)
    outlier_images = None if outlier_source is None else loader_of(outlier_source)
    detector = GROOD(
        to_device(loaded.model, device),
        outliers=_outlier_source(outliers, n, lam, outlier_images),
        index=index_of(index, index_option or []),
        head=head,
        early_layer=early_layer,
        seed=seed,
        store=store_of(store, memory),
        subset=subset_of(per_class, coreset),
        geometry=geometry,
        k=k,
    )
    with reporting(quiet) as reporter:
        reporter.say(f"model: {loaded.spec}, on {next(iter(loaded.model.parameters())).device}")
        if weights is None and loaded.transform is None:
            reporter.warn("no --weights: the network is as its factory made it")
        if not is_complete:
            reporter.warn(f"the training {model} is not complete; if it goes on, its weights fit this detector no more")
        reporter.say(f"preprocessing: {prepared}")
        reporter.say(f"training images: {len(source):,} from {source.origin}")
        report_ignored(source, reporter)
        chosen = None if classes is None else _classes(classes, source)
        loader = loader_of(source)
        fitting: AbstractContextManager[Any] = nullcontext(detector.fit)
        if engine is not Engine.local:
            assert cache is not None
            filler = _filling.MakeFiller(
                model,
                weights,
                num_classes,
                device,
                source,
                prepared,
                batch_size,
                on_bad,
                cache,
                head,
                early_layer,
                chosen,
                detector.outliers if detector.outliers.uses_early_layer else None,
                seed,
            )
            sets = [filler] if held_out is None else [filler, replace(filler, source=held_out, outliers=None)]
            scaled = _filling.Filling(engine, parallel, address, gpus, shards, sets)
            fitting = scaled.fitting(detector, loader, output, reporter)
        with fitting as run_fit:
            if run_fit is None:
                return
            progress = reporter.progress("fitting", "outliers")
            run_over(run_fit, loader, reporter, progress=progress, classes=chosen, cache=kept)
            if outlier_images is not None:
                report_bad(outlier_images, reporter)
            _check_accuracy(detector.fit_info_, reporter)
            if held_out is not None:
                reporter.say(f"calibration images: {len(held_out):,} from {held_out.origin}")
                run_over(
                    detector.calibrate,
                    loader_of(held_out),
                    reporter,
                    progress=reporter.progress("calibrating"),
                    fpr=fpr,
                    per_class=class_thresholds,
                    on_training="drop" if drop_training else "raise",
                    cache=kept,
                )
                detector.metadata["calibration"] = {"paths": [calibrate]}
        # The weights' bare name: a path of this machine says nothing on another.
        stored = {
            "spec": loaded.spec,
            "weights": None if used_weights is None else used_weights.name,
            "num_classes": num_classes,
        }
        detector.metadata.update({"model": stored, "transform": prepared.to_dict(), "training": {"paths": [train]}})
        detector.save(output)
        if shards is not None:
            # Its gradients are in files now.
            detector = GROOD.load(output)
    if not quiet:
        for name, value in rows(facts(detector, output)):
            typer.echo(f"{name:<18} {value}")


def _outlier_source(kind: _Outliers, n: int | None, lam: float | None, images: ImageLoader | None) -> OutlierSource:
    from torch_grood.outliers import Mixup, OutlierSamples, named_source

    if lam is not None and kind is not _Outliers.mixup:
        raise GroodError(f"--lam belongs to --outliers mixup, not to {kind}; leave it out")
    if images is not None and kind is not _Outliers.samples:
        raise GroodError(f"--ood belongs to --outliers samples, not to {kind}; add --outliers samples or leave it out")
    if n is not None and kind is _Outliers.mean:
        raise GroodError("--outliers mean uses no outliers; leave --n out")
    if kind is not _Outliers.samples:
        return named_source(kind, n, Mixup.lam if lam is None else lam)
    if images is None:
        raise GroodError("--outliers samples needs real OOD images; add --ood DIR")
    return OutlierSamples(images, n)


def _classes(text: str, source: ImageSource) -> Sequence[int | str]:
    known = source.classes or ()
    names = [name.strip() for name in text.split(",")]
    return [int(name) if name.isascii() and name.isdigit() and name not in known else name for name in names]


def _check_apart(train: ImageSource, held_out: ImageSource) -> None:
    """A threshold from training images promises nothing: each finds itself in the index and scores 0."""
    both = set(train.places()) & set(held_out.places())
    if both:
        raise GroodError(
            f"{len(both)} of {len(held_out)} calibration images are training images ({shorten(sorted(both))}); "
            "calibrate on held-out images"
        )


def _check_rate(fpr: float, held_out: ImageSource) -> None:
    """Say before the long pass, not after it, that so few images cannot promise so little."""
    import torch

    from torch_grood import ConformalThreshold

    try:
        ConformalThreshold.fit(torch.zeros(len(held_out)), fpr)
    except GroodError as error:
        raise GroodError(
            f"{held_out.origin}: {error} Here: --fpr {least_rate(len(held_out)):g}, or --calibrate with more "
            "images that the classifier was not trained on"
        ) from None


def _check_accuracy(info: FitInfo, reporter: Reporter) -> None:
    accuracy, chance = info.classifier_accuracy, 1 / info.n_classes
    if accuracy is not None and accuracy < info.prototype_accuracy - 0.2:
        reporter.warn(
            f"the nearest class prototype is right on {100 * info.prototype_accuracy:.1f} % of the training images, "
            f"the classifier on {100 * accuracy:.1f} % only: the labels are probably not in the order of its outputs. "
            "Class folders count in the order of their names; an image list gives each label itself."
        )
        return
    if accuracy is not None and info.n_classes > 1 and accuracy < chance + 0.1 * (1 - chance):
        reporter.warn(
            f"the classifier is right on {100 * accuracy:.1f} % of the training images, and chance is "
            f"{100 * chance:.1f} %. Are the labels in the order of its outputs, is the preprocessing its own, and are "
            "these its weights? A detector of such a classifier means little."
        )
