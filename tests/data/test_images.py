from __future__ import annotations

import contextlib
import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torch_grood.data import BadImageError, decode_image, load_image
from torch_grood.errors import GroodError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def _pixels(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, ".png") for mode in ("L", "LA", "RGB", "RGBA", "P", "1")),
        *((mode, ".tif") for mode in ("L", "LA", "RGB", "RGBA", "P", "PA", "1", "CMYK")),
    ],
)
def test_every_mode_becomes_what_pillow_makes_of_it(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    Image.fromarray(RAMP).convert(mode).save(path)
    np.testing.assert_array_equal(_pixels(path), np.asarray(Image.open(path).convert("RGB")))


def test_alpha_is_dropped_not_composited(tmp_path: Path) -> None:
    path = tmp_path / "ghost.png"
    Image.new("RGBA", (4, 4), (200, 100, 50, 0)).save(path)
    assert _pixels(path)[0, 0].tolist() == [200, 100, 50]


def test_palette_with_transparency_bytes_gives_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    Image.fromarray(RAMP).convert("P").save(path, transparency=bytes(range(256)))
    np.testing.assert_array_equal(_pixels(path)[..., 0], RAMP)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    np.testing.assert_array_equal(_pixels(path)[..., 1], RAMP)


def test_big_endian_16_bit_tiff_and_pgm(tmp_path: Path) -> None:
    values = (RAMP.astype(np.uint16) * 257).astype(">u2")
    pgm = tmp_path / "deep.pgm"
    pgm.write_bytes(b"P5 16 16 65535\n" + values.tobytes())
    np.testing.assert_array_equal(_pixels(pgm)[..., 2], RAMP)
    tiff = tmp_path / "deep.tif"
    Image.frombytes("I;16B", (16, 16), values.tobytes()).save(tiff)
    np.testing.assert_array_equal(_pixels(tiff)[..., 2], RAMP)


@pytest.mark.parametrize(("dtype", "message"), [(np.int32, "beyond 16 bit"), (np.float32, "floating-point")])
def test_values_without_a_fixed_range_are_refused(tmp_path: Path, dtype: type, message: str) -> None:
    path = tmp_path / "wide.tif"
    Image.fromarray(np.full((4, 4), 100_000, dtype=dtype)).save(path)
    with pytest.raises(BadImageError, match=message):
        load_image(path)


def test_exif_orientation_is_left_as_stored(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(path, exif=exif)
    assert load_image(path).size == (20, 10)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    path = tmp_path / "moving.gif"
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert _pixels(path)[0, 0].tolist() == [255, 0, 0]


def _png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")


@pytest.mark.parametrize("side", [9_000, 10_000, 60_000])
def test_decompression_bombs_are_refused_from_their_header(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_header(side, side) + (0).to_bytes(4, "big") + b"IDAT" + bytes(4))
    with pytest.raises(BadImageError, match=r"bomb\.png: it declares .* limit of 64,000,000"):
        load_image(path)


def test_the_limit_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (10, 10)).save(path)
    assert load_image(path, max_pixels=100).size == (10, 10)
    with pytest.raises(BadImageError, match=r"10 × 10 pixels, beyond the limit of 99"):
        load_image(path, max_pixels=99)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".tif", ".bmp"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    data = whole.read_bytes()
    for share in (0.02, 0.3, 0.9):
        path = tmp_path / f"part{suffix}"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(BadImageError) as caught:
            load_image(path)
        assert str(path) in str(caught.value)


def test_flipped_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    noise = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for suffix in (".png", ".jpg", ".webp", ".gif", ".tif", ".bmp", ".ppm", ".jp2"):
        path = tmp_path / f"image{suffix}"
        Image.fromarray(noise).save(path)
        data = path.read_bytes()
        for _ in range(40):
            broken = bytearray(data)
            for position in generator.integers(0, len(data), 6):
                broken[position] = generator.integers(0, 256)
            path.write_bytes(broken)
            with contextlib.suppress(BadImageError):
                assert load_image(path).mode == "RGB"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"hello", "not an image"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image")],
)
def test_files_that_are_no_image(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.png"
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=message):
        load_image(path)


def test_missing_folder_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="no such file"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(BadImageError, match="not a regular file"):
        load_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadImageError, match="not a regular file"):
        load_image(tmp_path / "pipe.png")


def test_the_error_names_file_and_reason_and_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(BadImageError(Path("a/b.png"), "the file is empty")))
    assert isinstance(error, BadImageError)
    assert isinstance(error, GroodError)
    assert (error.path, error.reason, str(error)) == ("a/b.png", "the file is empty", "a/b.png: the file is empty")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_bytes_are_decoded_as_files_are(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tif"
    Image.fromarray(RAMP).convert(mode).save(path)
    np.testing.assert_array_equal(np.asarray(decode_image(path.read_bytes(), "upload")), _pixels(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"GIF89a", "damaged at its beginning"), (b"/etc/hostname", "not an image")],
)
def test_bytes_that_are_no_image_are_refused_by_their_name(content: bytes, message: str) -> None:
    with pytest.raises(BadImageError, match=f"upload 7: .*{message}"):
        decode_image(content, "upload 7")


def test_the_limit_of_pixels_holds_for_bytes(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (20, 10)).save(path)
    assert decode_image(path.read_bytes(), "a", max_pixels=200).size == (20, 10)
    with pytest.raises(BadImageError, match="declares 20 × 10 pixels, beyond the limit of 199"):
        decode_image(path.read_bytes(), "a", max_pixels=199)
