"""The preprocessing on the command line: a preset or a file, or its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torch_grood.cli._common import MODEL, read_transform
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.data import ImageTransform
    from torch_grood.models import LoadedModel

__all__ = ["CropOption", "MeanOption", "ResizeOption", "StdOption", "TransformOption", "transform_of"]

TransformOption = Annotated[
    str | None,
    typer.Option(
        "--transform",
        metavar="NAME|FILE",
        help="The model's preprocessing: cifar10, cifar100, imagenet or a .json file. torchvision's and timm's "
        "models bring their own.",
        rich_help_panel=MODEL,
    ),
]
ResizeOption = Annotated[
    int | None, typer.Option("--resize", min=1, help="Of it: the shorter side.", rich_help_panel=MODEL)
]
CropOption = Annotated[int | None, typer.Option("--crop", min=1, help="Of it: the centre crop.", rich_help_panel=MODEL)]
MeanOption = Annotated[
    str | None, typer.Option("--mean", metavar="R,G,B", help="Of it: in 0 … 1.", rich_help_panel=MODEL)
]
StdOption = Annotated[
    str | None, typer.Option("--std", metavar="R,G,B", help="Of it: in 0 … 1.", rich_help_panel=MODEL)
]


def transform_of(
    loaded: LoadedModel,
    name: str | None,
    resize: int | None,
    crop: int | None,
    mean: str | None,
    std: str | None,
    fallback: ImageTransform | None = None,
) -> ImageTransform:
    """The user's preprocessing, else the model's own, else a benchmark's; a guess would give scores that mean nothing.

    Raises:
        GroodError: if there is none.
    """
    from torch_grood.data import PRESETS, ImageTransform

    base = (loaded.transform or fallback) if name is None else read_transform(name)
    changes: dict[str, Any] = {
        key: value
        for key, value in {
            "resize": resize,
            "crop": crop,
            "mean": None if mean is None else _triple("--mean", mean),
            "std": None if std is None else _triple("--std", std),
        }.items()
        if value is not None
    }
    if base is not None:
        return replace(base, **changes)
    if mean is None or std is None:
        raise GroodError(
            f"{loaded.spec} does not say how its images are prepared; add --transform ({', '.join(PRESETS)} or a .json "
            "file), or --resize, --crop, --mean and --std, as in the model's training"
        )
    return ImageTransform(resize, crop, "bilinear", changes["mean"], changes["std"])


def _triple(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise GroodError(f"{option} must be three numbers such as 0.485,0.456,0.406; got {text!r}") from None
