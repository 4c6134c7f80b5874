"""Any image file as an RGB image, or an error that names the file.

The conversions are those of torchvision's `default_loader`, which nearly every pretrained network saw in training
(``Image.open(path).convert("RGB")``), with one exception: 16-bit grey is scaled to 8 bit, where Pillow clips it.

- Alpha is dropped, not composited: the colours that lie under transparent pixels reach the network as in training.
- EXIF orientation is not applied: the pixels stay as stored, as in training.
- The first frame of an animation is the image.

Files come from anywhere, so the declared size is checked before a pixel is decoded, and only raster formats with a
decoder inside Pillow are tried (its EPS reader, for one, starts another program).
"""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torch_grood._optional import require
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    import os

    from PIL.Image import Image

__all__ = ["IMAGE_SUFFIXES", "MAX_PIXELS", "BadImageError", "decode_image", "load_image"]

# torchvision's IMG_EXTENSIONS: the same folder gives the same samples in the same order.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})

MAX_PIXELS = 64_000_000

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

# warnings.catch_warnings swaps a table of the whole process; two threads that interleave would leave it swapped.
_warning_filters = threading.Lock()


class BadImageError(GroodError):
    """A file that cannot be used as an image.

    Attributes:
        path: the file as it was given.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(str(path), reason)
        self.path = str(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def load_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image:
    """Read an image file as 8-bit RGB.

    Args:
        path: a JPEG, PNG, WebP, BMP, GIF, TIFF, PPM/PGM or JPEG 2000 file of any colour mode but float.
        max_pixels: width · height that the file may declare; beyond it nothing is decoded.

    Raises:
        BadImageError: if the file is missing, empty, truncated, corrupt, too large, or no image.
    """
    file = Path(path)
    # Not exists(): opening a named pipe would wait for ever.
    if not file.is_file():
        raise BadImageError(path, "no such file" if not file.exists() else "not a regular file")
    try:
        empty = file.stat().st_size == 0
    except OSError as error:
        raise BadImageError(path, error.strerror or type(error).__name__) from None
    if empty:
        raise BadImageError(path, "the file is empty")
    return _decoded(file, path, max_pixels)


def decode_image(content: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image:
    """As `load_image`, from the bytes of a file that goes by `name` in an error."""
    if not content:
        raise BadImageError(name, "the file is empty")
    return _decoded(io.BytesIO(content), name, max_pixels)


def _decoded(file: Path | io.BytesIO, path: str | os.PathLike[str], max_pixels: int) -> Image:
    image_module = require("PIL.Image", extra="vision")
    try:
        with _warning_filters, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = image_module.open(file, formats=_FORMATS)
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImageError(
                    path, f"it declares {width} × {height} pixels, beyond the limit of {max_pixels:,}; make it smaller"
                )
            image.load()
            return _to_rgb(image, path)
    except BadImageError:
        raise
    except image_module.UnidentifiedImageError:
        raise BadImageError(path, "not an image, or damaged at its beginning") from None
    except image_module.DecompressionBombError:
        raise BadImageError(
            path, f"it declares more pixels than the limit of {max_pixels:,}; make it smaller"
        ) from None
    # Pillow's parsers let many types through on hostile bytes: OSError, SyntaxError, struct.error, zlib.error, …
    except Exception as error:
        raise BadImageError(path, f"cannot be decoded ({str(error).rstrip('.') or type(error).__name__})") from None


def _to_rgb(image: Image, path: str | os.PathLike[str]) -> Image:
    # Pillow would otherwise warn about, and look for, a colour that marks transparency.
    image.info.pop("transparency", None)
    if image.mode.startswith("I"):
        return _from_16_bit(image, path).convert("RGB")
    if image.mode == "F":
        raise BadImageError(path, "floating-point pixels have no fixed range; convert the file to 8 or 16 bit")
    return image.convert("RGB")


def _from_16_bit(image: Image, path: str | os.PathLike[str]) -> Image:
    """The high byte of each value: what Pillow itself does for 16-bit colour, and exact for v·257 and v·256 alike."""
    values = np.asarray(image)
    # Mode I is 32 bit, but older Pillow versions put 16-bit PNG and PGM there.
    if values.min() < 0 or values.max() > 0xFFFF:
        raise BadImageError(path, "values beyond 16 bit have no fixed range; convert the file to 8 or 16 bit")
    grey: Image = require("PIL.Image", extra="vision").fromarray((values >> 8).astype(np.uint8))
    return grey
