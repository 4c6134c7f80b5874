"""Images read by threads are those that the loader of tensors reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torch_grood.data import BadImageError, ImageTransform, image_loader, read_source
from torch_grood.data.pixels import PixelLoader
from torch_grood.errors import GroodError

TRANSFORM = ImageTransform((6, 5), None, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(23):
        Image.fromarray(generator.integers(0, 256, (8 + i % 3, 9, 3), np.uint8)).save(tmp_path / f"{i:02}.png")
    return tmp_path


@pytest.mark.parametrize("threads", [None, 0, 1, 5])
def test_the_pixels_are_those_of_the_other_loader(folder: Path, threads: int | None) -> None:
    source = read_source(folder)
    loader = PixelLoader(source, TRANSFORM, batch_size=4, threads=threads)
    expected = image_loader(source, TRANSFORM, batch_size=4, workers=0)
    # Both again, which reads the files again.
    for _ in range(2):
        for pixels, (images, _, _) in zip(loader, expected, strict=True):
            mean, std = (np.array(v, np.float32) for v in (TRANSFORM.mean, TRANSFORM.std))
            prepared = (pixels.astype(np.float32) / np.float32(255) - mean) / std
            np.testing.assert_array_equal(prepared.transpose(0, 3, 1, 2), images.numpy())
        assert loader.names() == expected.names()
    assert len(loader) == len(expected) == 6


def test_bad_files(folder: Path) -> None:
    for name in ("05.png", "06.png", "07.png", "04.png", "22.png"):
        (folder / name).write_bytes(b"no image")
    source = read_source(folder)
    with pytest.raises(BadImageError, match=r"04\.png: not an image.*--skip-bad"):
        list(PixelLoader(source, TRANSFORM, batch_size=4))
    loader = PixelLoader(source, TRANSFORM, batch_size=4, on_bad="skip")
    assert [len(pixels) for pixels in loader] == [4, 0, 4, 4, 4, 2]
    assert [Path(path).name for path, _ in loader.bad] == ["04.png", "05.png", "06.png", "07.png", "22.png"]
    assert len(loader.names()) == 18


def test_images_of_several_sizes_in_one_batch(folder: Path) -> None:
    free = ImageTransform(None, None, "bilinear", TRANSFORM.mean, TRANSFORM.std)
    message = r"00\.png is 9 × 8 and .*01\.png is 9 × 9 \(width × height\); give the transform a crop"
    with pytest.raises(GroodError, match=message):
        list(PixelLoader(read_source(folder), free, batch_size=4))
    with pytest.raises(GroodError, match=message):
        list(image_loader(read_source(folder), free, batch_size=4, workers=0))
    assert len(list(PixelLoader(read_source(folder), free, batch_size=1))) == 23


def test_a_pass_that_is_given_up_leaves_no_thread_waiting(folder: Path) -> None:
    loader = PixelLoader(read_source(folder), TRANSFORM, batch_size=2, threads=2)
    first = next(iter(loader))
    assert first.shape == (2, 6, 5, 3)
