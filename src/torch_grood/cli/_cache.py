"""The option ``--cache DIR``: where features are kept between runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torch_grood.cli._common import READING
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.data import FeatureCache

__all__ = ["CacheOption", "cache_of"]

CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Keep features here: a run that was interrupted goes on where it was, another run on the same images "
        "computes only what is new.",
        rich_help_panel=READING,
    ),
]


def cache_of(folder: Path | None, *images: str | None) -> FeatureCache | None:
    """The cache, if one is wanted.

    Raises:
        GroodError: if the folder cannot be made, or lies among the images, where it would count as one of the classes.
    """
    if folder is None:
        return None
    from torch_grood.data import FeatureCache

    for path in images:
        if path is not None and Path(path).is_dir() and folder.resolve().is_relative_to(Path(path).resolve()):
            raise GroodError(f"--cache {folder} lies in the folder of images {path}; choose a folder elsewhere")
    return FeatureCache(folder)
