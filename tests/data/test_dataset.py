from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from torch_grood.data import BadImageError, ImageDataset, ImageSource, ImageTransform, image_loader, read_source
from torch_grood.data.dataset import default_workers
from torch_grood.errors import GroodError

UNIT = ImageTransform(None, 8, "bilinear", (0, 0, 0), (1, 1, 1))
WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    """Ten grey images, two classes; image i has the value i."""
    for i in range(10):
        folder = tmp_path / "ab"[i // 5]
        folder.mkdir(exist_ok=True)
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    return read_source(tmp_path)


def _break(source: ImageSource, *positions: int) -> None:
    for position in positions:
        Path(source.paths[position]).write_bytes(b"broken")


def _join(batches: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    images, labels, positions = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return images, labels, positions


@WORKERS
def test_batches_in_order_and_again(source: ImageSource, workers: int) -> None:
    loader = image_loader(source, UNIT, batch_size=4, workers=workers)
    assert len(loader) == 3
    assert loader.dataset.classes == ("a", "b")
    for _ in range(2):
        batches = list(loader)
        assert [len(batch[0]) for batch in batches] == [4, 4, 2]
        images, labels, positions = _join(batches)
        assert (images.dtype, labels.dtype, positions.dtype) == (torch.float32, torch.int64, torch.int64)
        assert images.shape == (10, 3, 8, 8)
        assert (images[:, 0, 0, 0] * 255).round().tolist() == list(range(10))
        assert labels.tolist() == [0] * 5 + [1] * 5
        assert positions.tolist() == loader.kept == list(range(10))
        assert loader.bad == []


@WORKERS
def test_bad_images_are_left_out_and_listed(source: ImageSource, workers: int) -> None:
    _break(source, 1, 4, 5, 6, 7)
    loader = image_loader(source, UNIT, batch_size=4, workers=workers, on_bad="skip")
    for _ in range(2):
        batches = list(loader)
        assert [tuple(batch[0].shape) for batch in batches] == [(3, 3, 8, 8), (0, 3, 8, 8), (2, 3, 8, 8)]
        assert [batch[1].dtype for batch in batches] == [torch.int64] * 3
        assert loader.kept == [0, 2, 3, 8, 9]
        assert [path for path, _ in loader.bad] == [source.paths[i] for i in (1, 4, 5, 6, 7)]
        assert all("not an image" in reason for _, reason in loader.bad)


@WORKERS
def test_a_bad_image_stops_with_one_line(source: ImageSource, workers: int) -> None:
    _break(source, 6)
    with pytest.raises(BadImageError, match=r"b/6\.png: not an image") as caught:
        list(image_loader(source, UNIT, batch_size=4, workers=workers))
    assert "\n" not in str(caught.value)


@WORKERS
def test_different_sizes_are_named(source: ImageSource, workers: int) -> None:
    Image.new("L", (9, 7)).save(source.paths[2])
    loader = image_loader(source, replace(UNIT, crop=None), batch_size=4, workers=workers)
    with pytest.raises(GroodError, match=r"a/0\.png is 8 × 8 and .*a/2\.png is 9 × 7 .* give the transform a crop"):
        list(loader)


def test_all_bad_without_a_known_size(source: ImageSource) -> None:
    _break(source, *range(10))
    batches = list(image_loader(source, replace(UNIT, crop=None), on_bad="skip"))
    assert [batch[0].shape[:2] for batch in batches] == [(0, 3)]


def test_dataset_items(source: ImageSource) -> None:
    dataset = ImageDataset(source, UNIT)
    image, label, position = dataset[7]
    assert (image.shape, label, position, len(dataset)) == ((3, 8, 8), 1, 7, 10)
    assert ImageDataset(replace(source, labels=None), UNIT)[7][1] == -1
    _break(source, 7)
    with pytest.raises(BadImageError, match=r"7\.png"):
        dataset[7]


def test_an_image_that_the_transform_refuses_counts_as_bad(source: ImageSource) -> None:
    Image.new("L", (1, 30_000)).save(source.paths[0])
    loader = image_loader(source, replace(UNIT, resize=256), on_bad="skip")
    list(loader)
    assert loader.bad[0][0] == source.paths[0]
    assert "beyond the limit" in loader.bad[0][1]


def test_options_are_checked(source: ImageSource) -> None:
    for options, message in (
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"workers": -1}, "workers must be 0"),
        ({"on_bad": "ignore"}, "on_bad must be 'raise' or 'skip', not 'ignore'"),
    ):
        with pytest.raises(GroodError, match=message):
            image_loader(source, UNIT, **options)


def test_small_sources_are_read_in_this_process() -> None:
    assert default_workers(10) == 0
    assert 1 <= default_workers(1_000_000) <= 8


@WORKERS
def test_a_pass_of_parts_is_the_pass(source: ImageSource, workers: int) -> None:
    _break(source, 1, 4, 9)
    whole = image_loader(source, UNIT, batch_size=4, workers=workers, on_bad="skip")
    expected = list(whole)
    parts = image_loader(source, UNIT, batch_size=4, workers=workers, on_bad="skip")
    list(parts)
    for first, end in ((0, 1), (1, 3), (2, 2), (0, 3), (2, 3)):
        parts.restart()
        for batch in range(first):
            reasons = [reason for path, reason in whole.bad if source.paths.index(path) // 4 == batch]
            assert parts.recall(batch, expected[batch][2], reasons).tolist() == expected[batch][1].tolist()
        found = list(parts.read(first, end))
        assert all(
            torch.equal(a, b)
            for one, two in zip(found, expected[first:end], strict=True)
            for a, b in zip(one, two, strict=True)
        )
        kept = [position for batch in expected[:end] for position in batch[2].tolist()]
        assert (parts.kept, parts.names()) == (kept, [source.paths[position] for position in kept])
        assert parts.bad == [entry for entry in whole.bad if source.paths.index(entry[0]) < 4 * end]
    assert parts.positions(2) == range(8, 10)


def test_recalled_labels_without_labels(source: ImageSource) -> None:
    loader = image_loader(replace(source, labels=None), UNIT, batch_size=4)
    assert loader.recall(1, torch.tensor([4, 5, 6, 7]), []).tolist() == [-1] * 4


def test_a_recalled_bad_image_is_refused_like_a_read_one(source: ImageSource) -> None:
    loader = image_loader(source, UNIT, batch_size=4)
    with pytest.raises(BadImageError, match=r"0\.png: empty; on_bad='skip' \(--skip-bad\) leaves such files out"):
        loader.recall(0, torch.tensor([1, 2, 3]), ["empty"])


@WORKERS
def test_single_images(source: ImageSource, workers: int) -> None:
    loader = image_loader(source, UNIT, batch_size=4, workers=workers, on_bad="skip")
    images = torch.cat([batch[0] for batch in loader])
    kept = list(loader.kept)
    found = loader.images([7, 0, 7])
    assert all(torch.equal(image, images[position]) for image, position in zip(found, [7, 0, 7], strict=True))
    assert torch.equal(loader.first_image(), images[:1])
    assert loader.kept == kept, "beside any pass"
    _break(source, 0, 1)
    assert torch.equal(loader.first_image(), images[2:3])
    with pytest.raises(BadImageError, match=r"1\.png: not an image.*; it could be read before"):
        loader.images([3, 1])
    with pytest.raises(BadImageError, match=r"0\.png: not an image.*--skip-bad"):
        image_loader(source, UNIT).first_image()
    _break(source, *range(10))
    with pytest.raises(GroodError, match=r"none of the 10 images of .* can be read"):
        loader.first_image()
