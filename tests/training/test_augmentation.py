"""Augmentation is torchvision's, with draws that depend on nothing but (seed, epoch, position)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from torch_grood import GroodError
from torch_grood.data import ImageTransform
from torch_grood.training.augmentation import Augmentation, uniforms

transforms = pytest.importorskip("torchvision.transforms")
functional = pytest.importorskip("torchvision.transforms.functional")
stats = pytest.importorskip("scipy.stats")

MEAN = STD = (0.5, 0.5, 0.5)
# A law of chance that holds by chance fails once in 10,000 seeds, and the seeds are fixed.
UNLIKELY = 1e-4


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Recorder:
    """Stands for an image, and remembers which part of it was asked for."""

    mode = "RGB"

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = self.size = (width, height)
        self.boxes: list[tuple[int, int, int, int]] = []

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        self.boxes.append(box)
        return Image.new("RGB", (box[2] - box[0], box[3] - box[1]))


def windows(augmentation: Augmentation, width: int, height: int, n: int) -> NDArray[np.int64]:
    """Left, top, width and height of n draws, (n, 4)."""
    image = Recorder(width, height)
    for position in range(n):
        augmentation(image, 0, position)  # type: ignore[arg-type]
    boxes = np.array(image.boxes)
    assert boxes.shape == (n, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def test_draws_are_uniform_and_unrelated() -> None:
    draws = uniforms(0, 0, range(4000))
    assert draws.shape == (4000, 41)
    assert draws.dtype == np.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert stats.chisquare(np.histogram(column, 50, (0, 1))[0]).pvalue > UNLIKELY
    # Along positions, along the draws of a position, and all together.
    for a, b in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1]), (draws[2:, 3:], draws[:-2, :-3])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
    assert stats.chisquare(np.histogram(draws, 1000, (0, 1))[0]).pvalue > UNLIKELY
    assert len(np.unique(draws)) == draws.size


def test_draws_of_other_seeds_and_epochs_are_others() -> None:
    everything = [uniforms(seed, epoch, range(1000)) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 999_999)]
    joined = np.stack(everything)
    assert len(np.unique(joined)) == joined.size
    correlations = np.corrcoef(joined.reshape(len(everything), -1))
    assert np.abs(correlations - np.eye(len(everything))).max() < 4 / np.sqrt(joined[0].size)
    # One number of the seed must not do as another of the epoch.
    assert not np.array_equal(uniforms(1, 0, range(9)), uniforms(0, 1, range(9)))


@given(
    st.integers(0, 2**63 - 1),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 2**40) | st.integers(2**40, 2**50), max_size=20),
)
def test_a_draw_knows_no_neighbours(seed: int, epoch: int, positions: list[int]) -> None:
    together = uniforms(seed, epoch, positions)
    assert together.shape == (len(positions), 41)
    for position, own in zip(positions, together, strict=True):
        assert np.array_equal(uniforms(seed, epoch, [position])[0], own)
    assert np.array_equal(uniforms(seed, epoch, np.array(positions[::-1], dtype=np.int64)), together[::-1])


def test_draws_are_these_for_ever() -> None:
    """A run that goes on under another version of the library must see the same images."""
    assert uniforms(0, 0, [0, 1])[:, :3].tolist() == [
        [0.023278059725723055, 0.3999828085671886, 0.2350549191695227],
        [0.22067110570982107, 0.13583298963929147, 0.5437071282023712],
    ]


def splitmix64(state: int, n: int) -> list[float]:
    """The published generator, in Python's own integers."""
    found = []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        x = state
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(((x ^ (x >> 31)) >> 11) / 2**53)
    return found


def test_draws_are_one_stream_of_splitmix64() -> None:
    key = int(np.random.SeedSequence([5, 7]).generate_state(1, np.uint64)[0])
    assert uniforms(5, 7, range(100)).ravel().tolist() == splitmix64(key, 4100)


@pytest.mark.parametrize(("width", "height"), [(40, 36), (20, 50), (32, 32)])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_padded_crop_is_torchvisions(width: int, height: int, padding: int) -> None:
    transform = ImageTransform(30, (28, 24), "bilinear", MEAN, STD)
    augmentation = Augmentation(transform, "padded", padding, flip=True, seed=4)
    image = picture(width, height)
    seen = transforms.CenterCrop((28, 24))(transforms.Resize(30)(image))
    top, left, mirrored = augmentation.windows(2, range(40))
    assert len(set(zip(top, left, mirrored, strict=True))) > (1 if padding == 0 else 20)
    for position in range(40):
        expected = functional.crop(functional.pad(seen, padding), top[position], left[position], 28, 24)
        if mirrored[position]:
            expected = functional.hflip(expected)
        pixels = augmentation(image, 2, position)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert np.array_equal(pixels, np.array(expected))


def test_every_window_and_both_sides_occur_alike_often() -> None:
    transform = ImageTransform(None, 8, "bilinear", MEAN, STD)
    top, left, mirrored = Augmentation(transform, "padded", 2, flip=True, seed=1).windows(0, range(10_000))
    counts = np.bincount((top * 5 + left) * 2 + mirrored, minlength=50)
    assert len(counts) == 50
    assert stats.chisquare(counts).pvalue > UNLIKELY
    unflipped = Augmentation(transform, "padded", 2, flip=False, seed=1).windows(0, range(10_000))
    assert not unflipped[2].any()
    assert np.array_equal(unflipped[0], top)
    assert np.array_equal(unflipped[1], left)


def test_without_a_crop_an_image_is_as_in_evaluation_or_its_mirror() -> None:
    transform = ImageTransform(10, 8, "bicubic", MEAN, STD)
    image = picture(12, 17)
    plain = transform.pixels(image)
    assert np.array_equal(Augmentation(transform)(image, 3, 5), plain)
    found = [Augmentation(transform, "none", padding=4, flip=True)(image, 0, position) for position in range(60)]
    mirrored = [np.array_equal(pixels, plain[:, ::-1]) for pixels in found]
    assert all(own or np.array_equal(pixels, plain) for own, pixels in zip(mirrored, found, strict=True))
    assert 15 < sum(mirrored) < 45


@pytest.mark.parametrize("min_area", [0.08, 0.5])
def test_resized_windows_are_distributed_as_torchvisions(min_area: float) -> None:
    width, height, n = 300, 200, 4000
    augmentation = Augmentation(ImageTransform(None, 4, "bilinear", MEAN, STD), "resized", min_area=min_area)
    ours = windows(augmentation, width, height, n)
    image = picture(width, height)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [transforms.RandomResizedCrop.get_params(image, (min_area, 1), (3 / 4, 4 / 3)) for _ in range(n)]
    theirs = np.array(drawn)[:, [1, 0, 3, 2]]

    def described(boxes: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        left, top, w, h = boxes.T.astype(float)
        # Where in its room a window lies: a window of the whole width has one place only.
        across, down = left / np.maximum(width - w, 1), top / np.maximum(height - h, 1)
        return {"area": w * h, "ratio": w / h, "width": w, "height": h, "left": left, "across": across, "down": down}

    for name, values in described(ours).items():
        assert stats.ks_2samp(values, described(theirs)[name]).pvalue > UNLIKELY, name
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= width).all()
    assert (ours[:, 1] + ours[:, 3] <= height).all()
    # Corners are reached: an off-by-one at the far side would never show them.
    assert (ours[:, 0] + ours[:, 2] == width).any()
    assert (ours[:, 1] + ours[:, 3] == height).any()


@pytest.mark.parametrize(("width", "height"), [(1, 1000), (1000, 1), (1, 1), (2, 1), (10, 1000), (1000, 10), (3, 5)])
def test_the_longest_and_smallest_images_have_windows(width: int, height: int) -> None:
    augmentation = Augmentation(ImageTransform(None, 4, "bilinear", MEAN, STD), "resized", flip=True)
    ours = windows(augmentation, width, height, 200)
    assert (ours >= [0, 0, 1, 1]).all()
    assert (ours[:, :2] + ours[:, 2:] <= [width, height]).all()
    if max(width, height) >= 1000:
        # No window of the allowed ratios and areas fits, so torchvision takes the one in the middle too.
        top, left, h, w = transforms.RandomResizedCrop.get_params(picture(width, height), (0.08, 1), (3 / 4, 4 / 3))
        assert (ours == [left, top, w, h]).all()
    assert augmentation(picture(width, height), 0, 0).shape == (4, 4, 3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("min_area", [0.08, 1.0])
def test_a_resized_window_is_torchvisions_resized_crop(interpolation: str, min_area: float) -> None:
    transform = ImageTransform(9, (7, 8), interpolation, MEAN, STD)
    augmentation = Augmentation(transform, "resized", min_area=min_area, flip=True, seed=2)
    image = picture(41, 37)
    boxes = windows(augmentation, 41, 37, 30)
    mode = transforms.InterpolationMode(interpolation)
    n_mirrored = 0
    for position, (left, top, w, h) in enumerate(boxes.tolist()):
        expected = np.array(functional.resized_crop(image, top, left, h, w, (7, 8), mode))
        pixels = augmentation(image, 0, position)
        assert pixels.flags.c_contiguous
        if not np.array_equal(pixels, expected):
            n_mirrored += 1
            expected = expected[:, ::-1]
        assert np.array_equal(pixels, expected)
    assert 5 < n_mirrored < 25


def test_epochs_show_other_windows() -> None:
    image = picture(40, 40)
    for crop in ("padded", "resized"):
        augmentation = Augmentation(ImageTransform(None, 32, "bilinear", MEAN, STD), crop, 4, flip=True)
        epochs = [augmentation(image, epoch, 3).tobytes() for epoch in range(8)]
        assert len(set(epochs)) == 8
        assert augmentation(image, 2, 3).tobytes() == epochs[2]


def test_a_transform_without_a_size_is_refused() -> None:
    with pytest.raises(GroodError, match="training needs images of one size, and the preprocessing leaves it open"):
        Augmentation(ImageTransform(256, None, "bilinear", MEAN, STD))
