"""Small pictures that lie in the page itself, as WebP in base64."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch_grood._optional import require
from torch_grood.data.images import BadImageError, load_image
from torch_grood.data.training_files import training_file

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PICTURE", "TILE", "Sheet", "data_uri", "sheet_of", "small", "training_picture"]

PICTURE, TILE = 112, 48
"""Sides of a picture in a gallery and of one in a sheet, in pixels; smaller images keep their own."""

_QUALITY, _SHEET_QUALITY = 82, 60
# WebP's own limit.
_LARGEST_SIDE = 16_383


class Sheet(NamedTuple):
    """Square tiles, row by row, in one picture.

    Attributes:
        uri: the picture; empty without a tile.
        side: of a tile, in pixels.
        columns: tiles in a row.
        width, height: of the picture.
    """

    uri: str
    side: int
    columns: int
    width: int
    height: int


def small(image: Image, side: int) -> Image:
    """An image that fits into a square, its sides in proportion; a smaller one is left as it is."""
    image = image.copy()
    image.thumbnail((side, side))
    return image


def data_uri(image: Image) -> str:
    """For the `src` of an HTML image."""
    return _uri(image, _QUALITY)


def training_picture(name: str | None, root: Path | None) -> str | None:
    """A training image by its stored name; None if it is not there, or cannot be read."""
    file = training_file(name, root)
    if file is None:
        return None
    try:
        return data_uri(small(load_image(file), PICTURE))
    except BadImageError:
        return None


def sheet_of(images: Sequence[Image]) -> Sheet:
    """All images as tiles of one size, what sticks out of a square cut off."""
    if not images:
        return Sheet("", 1, 1, 1, 1)
    pillow, operations = require("PIL.Image", extra="report"), require("PIL.ImageOps", extra="report")
    side = min(TILE, max(max(image.size) for image in images))
    columns = min(len(images), _LARGEST_SIDE // side, round(len(images) ** 0.5) + 1)
    rows = -(-len(images) // columns)
    sheet: Image = pillow.new("RGB", (columns * side, rows * side))
    for place, image in enumerate(images):
        tile = image if image.size == (side, side) else operations.fit(image, (side, side))
        sheet.paste(tile, (place % columns * side, place // columns * side))
    return Sheet(_uri(sheet, _SHEET_QUALITY), side, columns, *sheet.size)


def _uri(image: Image, quality: int) -> str:
    content = io.BytesIO()
    image.save(content, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
