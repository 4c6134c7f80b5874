"""Small pictures in the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torch_grood.report.pictures import PICTURE, TILE, data_uri, sheet_of, small, training_picture

PREFIX = "data:image/webp;base64,"


def decoded(uri: str) -> Image.Image:
    assert uri.startswith(PREFIX)
    image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix(PREFIX), validate=True)))
    image.load()
    assert image.format == "WEBP"
    return image


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


COLOURS = [(40 * (i % 6) + 20, 60 * (i // 6) + 20, 200 - 20 * (i % 9)) for i in range(23)]


@pytest.mark.parametrize("n", [1, 2, 5, 23])
@pytest.mark.parametrize("size", [(32, 32), (112, 112), (112, 60), (5, 48)])
def test_tiles_are_where_the_script_looks(n: int, size: tuple[int, int]) -> None:
    found = sheet_of([plain(colour, size) for colour in COLOURS[:n]])
    image = decoded(found.uri)
    assert image.size == (found.width, found.height)
    assert found.side == min(TILE, max(size))
    for i, colour in enumerate(COLOURS[:n]):
        # As report.js has it.
        column, row = i % found.columns, i // found.columns
        tile = image.crop((column * found.side, row * found.side, (column + 1) * found.side, (row + 1) * found.side))
        middle = np.asarray(tile.convert("RGB"))[2:-2, 2:-2].reshape(-1, 3).mean(0)
        np.testing.assert_allclose(middle, colour, atol=14)


def test_small_images_keep_their_pixels_and_large_ones_their_middle() -> None:
    image = plain((0, 0, 0), (8, 8))
    image.putpixel((3, 4), (255, 255, 255))
    found = sheet_of([image])
    assert (found.side, found.width, found.height) == (8, 8, 8)
    wide = Image.new("RGB", (100, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (40, 0, 60, 20))
    tile = np.asarray(decoded(sheet_of([wide]).uri).convert("RGB")).astype(int)
    assert tile[:, :, 2].mean() > tile[:, :, 0].mean() + 150


def test_many_tiles_fit_into_one_picture() -> None:
    found = sheet_of([plain((9, 9, 9), (48, 48))] * 3000)
    assert found.columns * (found.height // found.side) >= 3000
    # About square: 20,000 are far from the sides that WebP can have.
    assert abs(found.width - found.height) <= 4 * found.side
    assert found.width == found.columns * found.side


def test_no_tile_is_no_picture() -> None:
    assert sheet_of([]).uri == ""
    assert sheet_of([]).side > 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [((4000, 3000), (112, 84)), ((3000, 2), (112, 1)), ((1, 900), (1, 112)), ((1, 1), (1, 1)), ((112, 30), (112, 30))],
)
def test_pictures_fit_into_a_square(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = plain((1, 2, 3), size)
    found = small(image, PICTURE)
    assert found.size == expected
    assert image.size == size
    assert decoded(data_uri(found)).size == expected


def test_a_picture_looks_as_it_did() -> None:
    random = np.random.default_rng(0)
    pixels = np.kron(random.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    found = np.asarray(decoded(data_uri(Image.fromarray(pixels))).convert("RGB")).astype(float)
    assert np.abs(found - pixels).mean() < 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    (folder / "cat").mkdir(parents=True)
    plain((200, 10, 10)).save(folder / "cat" / "1.png")
    (folder / "cat" / "broken.png").write_bytes(b"\x89PNG no")
    plain((10, 10, 200)).save(tmp_path / "secret.png")
    return folder


@pytest.mark.parametrize("name", ["cat/1.png", "/once/there/train/cat/1.png", "C/cat/1.png"])
def test_a_training_image_is_found_below_the_root(root: Path, name: str) -> None:
    found = training_picture(name, root)
    assert found is not None
    assert np.asarray(decoded(found).convert("RGB"))[16, 16, 0] > 150


@pytest.mark.parametrize(
    "name",
    [
        None,
        "cat/2.png",
        "cat/broken.png",
        "cat",
        "",
        "../secret.png",
        "cat/../../secret.png",
        "a\0b",
        "x" * 5000,
        "\udc80",
    ],
)
def test_what_is_no_training_image_is_none(root: Path, name: str | None) -> None:
    assert training_picture(name, root) is None


def test_without_a_root_the_name_is_a_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert training_picture("cat/1.png", None) is not None
    assert training_picture("train/cat/1.png", None) is None
