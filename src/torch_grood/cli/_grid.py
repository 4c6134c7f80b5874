"""A picture of decisions: a row for each image, with the training images whose gradients are nearest.

Drawn by Pillow, with the font that it brings: the same on every machine, and there in any case where images are read.
What the font has no glyph for is written in the letters that it has. Files come from anywhere, and their names, too:
they are read by `load_image` only, one at a time, and what is not there becomes a grey tile.
"""

from __future__ import annotations

import bisect
import functools
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_grood._files import replacing
from torch_grood._optional import require
from torch_grood._text import plain
from torch_grood.cli._explain import decision_word, explanation_of, power
from torch_grood.cli._results import Results, Row
from torch_grood.data.training_files import training_file
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["GRID_FORMATS", "GRID_NEIGHBORS", "GRID_ROWS", "GRID_ROWS_ALL", "write_grid"]

GRID_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# WebP ends at 16,383 pixels a side; nobody looks at more.
GRID_ROWS, GRID_ROWS_ALL, GRID_NEIGHBORS = 20, 80, 12

_TILE, _GAP, _CARD, _LINE = 128, 14, 216, 19
_HEADER, _ROW = 78, _TILE + 2 * _LINE + 2 * _GAP
_INK, _FAINT, _RULE, _MISSING = "#1d1d1f", "#6a6a6f", "#dcdce0", "#ececef"
# Of Okabe and Ito, which the colour-blind can tell apart; the word says the same.
_COLOURS = {"OOD": "#d55e00", "ID": "#0072b2", "no decision": "#6a6a6f"}
# Of a name no more is looked at: a file name may have 255 bytes, and one from a detector's file any number.
_LONGEST = 120


def write_grid(file: Path, results: Results, positions: Sequence[int], root: Path | None) -> None:
    """Draw the images at the given positions, which are explained, and write the picture in place of `file`.

    Args:
        file: its ending says the format, one of `GRID_FORMATS`.
        results: what is known of them.
        positions: one a row.
        root: folder of the training images; None: their names as they were stored, from the current folder.

    Raises:
        GroodError: if the picture cannot be written, or would overwrite one of its own images.
    """
    picture = _draw(results, positions, root, file)
    kind = GRID_FORMATS[file.suffix.lower()]
    with replacing(file) as temporary:
        picture.save(temporary, format=kind, **({} if kind == "PNG" else {"quality": 92}))


def _draw(results: Results, positions: Sequence[int], root: Path | None, target: Path) -> Image:
    assert results.explanation is not None
    k = min(results.explanation.neighbor.shape[1], GRID_NEIGHBORS)
    width = 4 * _GAP + _TILE + _CARD + k * (_TILE + _GAP)
    picture = _new(width, _HEADER + len(positions) * _ROW, "white")
    draw = require("PIL.ImageDraw", extra="cli").Draw(picture)
    first = 3 * _GAP + _TILE + _CARD
    n, shown = len(results), len(positions)
    _text(draw, (_GAP, 16), "Most OOD first", first, size=20)
    _text(draw, (_GAP, 48), f"{shown} of {n:,} images and what was decided", first, faint=True)
    _text(draw, (first, 22), "Training images with the nearest gradients", width - first - _GAP, size=15)
    _text(draw, (first, 48), "below each: distance of the gradients, angle", width - first - _GAP, faint=True)
    for place, position in enumerate(positions):
        top = _HEADER + place * _ROW
        draw.line([(_GAP, top), (width - _GAP, top)], fill=_RULE)
        top += _GAP
        path = Path(results.paths[position])
        _show(picture, _tile(path, path.name, target), (_GAP, top))
        row, why = results.row(position), explanation_of(results, position)
        _card(picture, (2 * _GAP + _TILE, top), row, why)
        # The names as they are, not as they are shown.
        names = results.sample_names(results.explanation_at(position).neighbor)
        for column, (name, neighbor) in enumerate(zip(names[:k], why["neighbors"][:k], strict=True)):
            x, y = first + column * (_TILE + _GAP), top + _TILE + 4
            label = f"training image {neighbor['sample']}" if name is None else _last_parts(name)
            _show(picture, _tile(training_file(name, root), label, target), (x, top))
            _text(draw, (x, y), label, _TILE, size=13)
            distance = f"{power(neighbor['log_distance'])}   {neighbor['angle_degrees']:.1f}°"
            _text(draw, (x, y + _LINE - 2), distance, _TILE, size=13, faint=True)
    return picture


def _card(picture: Image, corner: tuple[int, int], row: Row, why: Row) -> None:
    """What there is to say of one image."""
    x, y = corner
    draw = require("PIL.ImageDraw", extra="cli").Draw(picture)
    word, font = decision_word(row), _font(15)
    pill = _pill(round(font.getlength(word)) + 20, 26)
    picture.paste(_COLOURS[word], (x, y), pill)
    draw.text((x + 10, y + 13), word, fill="white", font=font, anchor="lm")
    _text(draw, (x, y + 35), _last_parts(row["path"]), _CARD, size=15)
    lines = [f"class {row['label']}"]
    if row["prototype_label"] != row["label"]:
        lines.append(f"nearest prototype {row['prototype_label']}")
    lines.append(f"score {power(why['log_score'])}")
    if row["p_value"] is not None:
        lines.append(f"p-value {row['p_value']:.3g}")
    lines.append(f"{round(100 * why['direction_share'])} % of the square by direction")
    for number, line in enumerate(lines):
        _text(draw, (x, y + 58 + number * _LINE), line, _CARD, faint=True)


def _tile(file: Path | None, label: str, target: Path) -> Image:
    """A square with the image in its middle, or a grey one that says why not.

    Raises:
        GroodError: if the file is the one that the picture will be written to.
    """
    from torch_grood.data import BadImageError, load_image

    reason = "not found:"
    if file is not None and file.exists():
        if target.exists() and target.samefile(file):
            raise GroodError(f"--grid {target} would overwrite an image that it shows; give another name")
        try:
            return _fitted(load_image(file))
        except BadImageError:
            reason = "cannot be read:"
    tile = _new(_TILE, _TILE, _MISSING)
    draw = require("PIL.ImageDraw", extra="cli").Draw(tile)
    _text(draw, (8, _TILE // 2 - 20), reason, _TILE - 16, size=13, faint=True)
    _text(draw, (8, _TILE // 2), label, _TILE - 16, size=13, faint=True)
    return tile


def _fitted(image: Image) -> Image:
    """The whole image, as large as a tile allows."""
    scale = _TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, require("PIL.Image", extra="cli").Resampling.BICUBIC, reducing_gap=3.0)
    tile = _new(_TILE, _TILE, "white")
    tile.paste(image, ((_TILE - image.width) // 2, (_TILE - image.height) // 2))
    return tile


def _last_parts(name: str) -> str:
    return "/".join(re.split(r"[\\/]", name[-_LONGEST:])[-2:])


def _show(picture: Image, tile: Image, corner: tuple[int, int]) -> None:
    """With a thin frame, so that a white image has an edge."""
    picture.paste(tile, corner)
    x, y = corner
    frame = [x - 1, y - 1, x + _TILE, y + _TILE]
    require("PIL.ImageDraw", extra="cli").Draw(picture).rectangle(frame, outline=_RULE)


def _pill(width: int, height: int) -> Image:
    """A rectangle with round corners, as a mask; drawn larger, since Pillow draws edges in steps."""
    image = require("PIL.Image", extra="cli")
    large = image.new("L", (4 * width, 4 * height), 0)
    box = [0, 0, 4 * width - 1, 4 * height - 1]
    require("PIL.ImageDraw", extra="cli").Draw(large).rounded_rectangle(box, radius=28, fill=255)
    mask: Image = large.resize((width, height), image.Resampling.BOX)
    return mask


def _new(width: int, height: int, colour: str) -> Image:
    image: Image = require("PIL.Image", extra="cli").new("RGB", (width, height), colour)
    return image


def _text(draw: Any, corner: tuple[int, int], text: str, width: float, *, size: int = 14, faint: bool = False) -> None:
    """One line of at most `width` pixels; a longer one loses its middle, since the end of a path tells most."""
    font, line = _font(size), _drawable(text if len(text) <= _LONGEST else text[: _LONGEST // 3] + text[-_LONGEST:])

    def shortened(kept: int) -> str:
        return f"{line[: kept // 3]}…{line[len(line) - (kept - kept // 3) :]}"

    if font.getlength(line) > width:
        too_long = bisect.bisect_left(range(len(line)), width, key=lambda kept: font.getlength(shortened(kept)))
        line = shortened(max(0, too_long - 1))
    draw.text(corner, line, fill=_FAINT if faint else _INK, font=font)


def _drawable(text: str) -> str:
    """Text in glyphs of the font: é without its accent where it has none, other letters by their number."""

    def shown(char: str) -> str:
        if _has_glyph(char):
            return char
        base = "".join(c for c in unicodedata.normalize("NFKD", char) if not unicodedata.combining(c))
        if base and all(map(_has_glyph, base)):
            return base
        return char.encode("ascii", "backslashreplace").decode()

    return "".join(map(shown, plain(text)))


@functools.cache
def _font(size: int) -> Any:
    module = require("PIL.ImageFont", extra="cli")
    try:
        return module.load_default(size)
    except ImportError:
        raise GroodError(
            "Pillow is built without FreeType here, which the text of a picture needs; install its wheel: "
            "pip install --force-reinstall pillow"
        ) from None


@functools.lru_cache(maxsize=4096)
def _has_glyph(char: str) -> bool:
    """Whether the font draws something else than its box for characters that it lacks."""
    font = _font(14)
    found, missing = (font.getmask(c) for c in (char, "\U0010fffd"))
    return char == " " or bool(found.size != missing.size or bytes(found) != bytes(missing))
