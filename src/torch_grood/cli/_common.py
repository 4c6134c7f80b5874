"""What the commands share: their common options, messages, progress bars, and models and detectors by name.

Everything that is said goes to stderr; stdout carries results only.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from torch_grood._files import target_of
from torch_grood._text import plain, shorten
from torch_grood.errors import GroodError, ModelMismatchError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from torch_grood import GROOD
    from torch_grood.data import ImageLoader, ImageSource, ImageTransform, ParquetColumns
    from torch_grood.data.pixels import PixelLoader

_MAX_CLASSES = 1_000_000


class Device(StrEnum):
    """Where the model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


READING, MODEL = "Reading images", "Model"

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="torchvision:NAME, timm:NAME, package.module:factory, file.py:factory or the folder of a grood train. By "
        "default the detector's own, if it is torchvision's, timm's or torch_grood's.",
        rich_help_panel=MODEL,
    ),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        help="Its weights: .safetensors, or a state dict. Without: the pretrained ones.",
        rich_help_panel=MODEL,
    ),
]
NumClassesOption = Annotated[
    int | None,
    typer.Option(
        "--num-classes", min=1, help="Its number of outputs; else taken from the weights.", rich_help_panel=MODEL
    ),
]
StoredTransformOption = Annotated[
    str | None,
    typer.Option(
        "--transform",
        metavar="NAME|FILE",
        help="Preprocessing, for a detector whose file has none: cifar10, cifar100, imagenet or a .json file.",
        rich_help_panel=MODEL,
    ),
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the model runs.", rich_help_panel=MODEL)]
FprOption = Annotated[
    float | None,
    typer.Option(
        "--fpr",
        metavar="RATE",
        help="Another false-alarm rate than the detector's, promised by the same calibration.",
    ),
]
TauOption = Annotated[
    float | None,
    typer.Option("--tau", metavar="SCORE", help="A threshold of your own: OOD above it. Nothing is promised."),
]
RootOption = Annotated[
    str | None,
    typer.Option(
        "--root",
        metavar="DIR|URL",
        help="What the paths of image lists are relative to; else looked for near the list.",
        rich_help_panel=READING,
    ),
]
ImageColumnOption = Annotated[
    str | None,
    typer.Option(
        "--image-column",
        metavar="NAME",
        help="Of Parquet files: the image files' bytes. Default: image, or the only column of bytes.",
        rich_help_panel=READING,
    ),
]
LabelColumnOption = Annotated[
    str | None,
    typer.Option(
        "--label-column",
        metavar="NAME",
        help="Of Parquet files: class numbers or names. Default: label.",
        rich_help_panel=READING,
    ),
]
NameColumnOption = Annotated[
    str | None,
    typer.Option(
        "--name-column",
        metavar="NAME",
        help="Of Parquet files: names of the images. Default: path, file_name, name, id or key; else file and row.",
        rich_help_panel=READING,
    ),
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.", rich_help_panel=READING)]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=0,
        help="Processes that read files; 0: none. Default: one a CPU, at most 8.",
        rich_help_panel=READING,
    ),
]
SkipBadOption = Annotated[
    bool,
    typer.Option("--skip-bad", help="Leave unreadable images out, and count them.", rich_help_panel=READING),
]
ClassThresholdsOption = Annotated[
    bool,
    typer.Option(
        "--class-thresholds",
        help="Keep the promise for each class by itself, by a threshold for each; needs enough held-out images of all.",
    ),
]
DropTrainingOption = Annotated[
    bool,
    typer.Option("--drop-training", help="Leave out held-out images that are training images, instead of refusing."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors.")]


Progress = Callable[[Iterable[Any]], Iterable[Any]] | Literal[False]


class Reporter:
    """Messages and progress bars on stderr."""

    def __init__(self, console: Console, bars: Any | None, quiet: bool) -> None:
        self._console = console
        self._bars = bars
        self._quiet = quiet

    def say(self, message: object) -> None:
        """A line, unless the user wants quiet."""
        if not self._quiet:
            self._print(plain(message))

    def warn(self, message: object) -> None:
        """A line that quiet does not suppress."""
        self._print(f"warning: {plain(message)}", style="yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def progress(self, *descriptions: str) -> Progress:
        """For a detector's `progress`: a bar for each loop it runs through, the last description for all others."""
        if self._bars is None:
            return False
        bars, names = self._bars, list(descriptions)

        def wrap(batches: Iterable[Any]) -> Iterator[Any]:
            name = names.pop(0) if len(names) > 1 else names[0]
            task = bars.add_task(name, total=len(batches) if isinstance(batches, Sized) else None)
            try:
                for batch in batches:
                    yield batch
                    bars.advance(task)
            finally:
                bars.stop_task(task)

        return wrap


@contextmanager
def reporting(quiet: bool) -> Iterator[Reporter]:
    """While it lasts, the library's log and warnings come as lines on stderr, above the progress bars."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    show_bars = console.is_terminal and not quiet
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches"),
        TimeRemainingColumn(),
        console=console,
        disable=not show_bars,
    )
    reporter = Reporter(console, bars if show_bars else None, quiet)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            (reporter.warn if record.levelno >= logging.WARNING else reporter.say)(record.getMessage())

    def show_warning(message: Warning | str, *rest: object, **more: object) -> None:
        reporter.warn(message)

    log, handler = logging.getLogger("torch_grood"), Handler()
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        with warnings.catch_warnings(), bars:
            warnings.filterwarnings("always", category=UserWarning, module="torch_grood")
            warnings.showwarning = show_warning
            yield reporter
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


def report_ignored(source: ImageSource, reporter: Reporter) -> None:
    """Say that a folder holds files that are not taken for images."""
    if source.ignored:
        reporter.warn(f"{source.origin}: {source.ignored} files without an image's ending are left out")


def report_bad(loader: ImageLoader | PixelLoader, reporter: Reporter) -> None:
    """Say which files were left out."""
    if loader.bad:
        shown = shorten([f"{path} ({reason})" for path, reason in loader.bad], "; ")
        reporter.warn(f"left out {len(loader.bad)} unreadable of {len(loader.source)} images: {shown}")


def run_over(method: Callable[..., Any], loader: ImageLoader, reporter: Reporter, **options: Any) -> None:
    """Call a detector's method with the loader, and say in any case which files were left out."""
    try:
        method(loader, **options)
    finally:
        report_bad(loader, reporter)


def check_output(path: Path, *inputs: str | Path | None) -> None:
    """Fail before a long run, not after it.

    Raises:
        GroodError: if the file could not be written, or is one of the inputs.
    """
    if path.is_dir():
        raise GroodError(f"{path} is a folder; give the name of a file in it: {path / 'detector.grood'}")
    if not path.parent.is_dir():
        raise GroodError(f"the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise GroodError(f"the folder {path.parent} cannot be written to; choose another --output")
    target_of(path)
    for source in inputs:
        if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
            raise GroodError(f"--output {path} would overwrite an input; give another name")


def source_of(
    paths: Sequence[str],
    root: str | None,
    labels: Literal["auto", "required", "none"],
    columns: ParquetColumns | None = None,
) -> ImageSource:
    """The images that arguments stand for; the root concerns the lists among them, the columns Parquet files."""
    from torch_grood.data import read_source
    from torch_grood.data.urls import is_url, kind_of

    def is_folder(path: str) -> bool:
        return kind_of(path) == "folder" if is_url(path) else Path(path).is_dir()

    lists = root is not None and not all(is_folder(path) for path in paths)
    return read_source(list(paths), root if lists else None, labels, columns=columns)


def columns_of(image: str | None, label: str | None, name: str | None) -> ParquetColumns:
    """What the options say of columns."""
    from torch_grood.data import ParquetColumns

    return ParquetColumns(image, label, name)


def check_columns(columns: ParquetColumns, *sources: ImageSource | None) -> None:
    """Fail for columns where none of the sources has any.

    Raises:
        GroodError: then.
    """
    if any(columns) and all(source is None or source.rows is None for source in sources):
        raise GroodError(
            "--image-column, --label-column and --name-column are for Parquet files, and there are none; leave them out"
        )


def held_out_source(paths: Sequence[str], root: str | None, columns: ParquetColumns | None = None) -> ImageSource:
    """Images to calibrate on.

    Raises:
        GroodError: if some are marked as OOD: the threshold is about ID images.
    """
    source = source_of(paths, root, "auto", columns)
    n_ood = 0 if source.labels is None else source.labels.count(-1)
    if n_ood:
        raise GroodError(
            f"{source.origin}: {n_ood} of {len(source)} images have the label −1, OOD; calibrate on in-distribution "
            "images only, such as the classifier's validation set"
        )
    return source


def least_rate(n: int) -> float:
    """The least whole percentage of false alarms that n calibration images can promise."""
    return math.ceil(100 / (n + 1)) / 100


def to_device(model: nn.Module, device: Device) -> nn.Module:
    """Move a model.

    Raises:
        GroodError: if there is no such device.
    """
    import torch

    available = {
        Device.cuda: torch.cuda.is_available(),
        Device.mps: torch.backends.mps.is_available(),
        Device.cpu: True,
    }
    if device is Device.auto:
        device = next(name for name, is_there in available.items() if is_there)
    if not available[device]:
        raise GroodError(f"PyTorch finds no {device} device here; use --device cpu, or auto")
    return model.to(device.value)


def read_transform(name: str) -> ImageTransform:
    """A preset by name, or a JSON file.

    Raises:
        GroodError: if it is neither, or the file does not describe a transform.
    """
    from torch_grood.data import PRESETS, ImageTransform

    if name in PRESETS:
        return PRESETS[name]
    file = Path(name)
    if not file.is_file():
        raise GroodError(f"--transform {name}: neither one of {', '.join(PRESETS)} nor a file")
    try:
        return ImageTransform.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise GroodError(f"--transform {name}: {error}") from None


def open_detector(
    path: Path,
    spec: str | None,
    weights: Path | None,
    num_classes: int | None,
    transform: str | None,
    device: Device,
    reporter: Reporter,
) -> tuple[GROOD, ImageTransform]:
    """A detector with its model and preprocessing.

    The file may come from anywhere: what it says about its model is followed only as far as no code of its choice runs.

    Raises:
        GroodError: if the file does not tell how to make the model, or may not; the message tells what to add.
    """
    from torch_grood import GROOD
    from torch_grood.models import is_builtin_spec, load_model
    from torch_grood.models.from_run import is_run

    detector = GROOD.load(path)
    stored = detector.metadata
    stored_spec, stored_weights, stored_classes = _stored_model(stored)
    if spec is not None and is_run(spec):
        # A run has its own weights, and knows its number of classes.
        stored_weights = stored_classes = None
    reasons, options = [], []
    if spec is None and stored_spec is None:
        reasons.append("it does not say which model it was fitted on")
        options.append("--model SPEC")
    elif spec is None and not is_builtin_spec(str(stored_spec)):
        reasons.append(f"it was fitted on {stored_spec}, code that a detector file must not start by itself, only you")
        options.append(f"--model {shlex.quote(str(stored_spec))}")
    if weights is None and stored_weights is not None:
        weights = path.parent / stored_weights
        if weights.is_file():
            reporter.say(f"using the weights {weights}")
        else:
            reasons.append(f"its weights {stored_weights} do not lie beside it")
            options.append(f"--weights {shlex.quote(f'path/to/{stored_weights}')}")
    if options:
        raise GroodError(f"{path}: {' and '.join(reasons)}; add {' '.join(options)}")
    loaded = load_model(spec or str(stored_spec), weights, stored_classes if num_classes is None else num_classes)
    try:
        detector.bind(to_device(loaded.model, device))
    except ModelMismatchError as error:
        raise ModelMismatchError(f"{path}: {error}") from None
    return detector, _stored_transform(path, stored, loaded.transform, transform)


def _stored_model(metadata: dict[str, Any]) -> tuple[str | None, str | None, int | None]:
    """Spec, name of the weights file, and number of classes, as far as they are what they should be."""
    model = metadata.get("model")
    if not isinstance(model, dict):
        return None, None, None
    spec, weights, num_classes = (model.get(key) for key in ("spec", "weights", "num_classes"))
    return (
        spec if isinstance(spec, str) else None,
        # A bare name only: the file must not choose what else of this machine is read.
        weights
        if isinstance(weights, str) and weights not in ("", ".", "..") and weights == Path(weights).name
        else None,
        num_classes if type(num_classes) is int and 1 <= num_classes <= _MAX_CLASSES else None,
    )


def _stored_transform(
    path: Path, metadata: dict[str, Any], own: ImageTransform | None, given: str | None
) -> ImageTransform:
    from torch_grood.data import ImageTransform

    if "transform" in metadata:
        if given is not None:
            raise GroodError(
                f"{path} brings the preprocessing that it was fitted with, and scores mean nothing with another; "
                "leave --transform out, or fit again"
            )
        try:
            return ImageTransform.from_dict(metadata["transform"])
        except GroodError as error:
            raise GroodError(f"{path}: its transform cannot be used: {error}") from None
    if given is not None:
        return read_transform(given)
    if own is None:
        raise GroodError(
            f"{path} does not say how images are prepared for its model; add --transform NAME or --transform FILE.json"
        )
    return own
