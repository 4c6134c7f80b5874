"""Batches from memory and from files are the same pixels, and those that evaluation sees are evaluation's."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from torch_grood.data import BadImageError, ImageSource, ImageTransform, load_image, read_source
from torch_grood.training.augmentation import Augmentation
from torch_grood.training.loading import ImageFiles, ImagesInMemory, Wanted, open_images

PLENTY = 2**30
TRANSFORM = ImageTransform(12, (10, 8), "bilinear", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
WANTED = [Wanted(0, (3, 1, 0)), Wanted(0, range(20)), Wanted(7, [5]), Wanted(1, (19, 19, 2)), Wanted(0, (3, 1, 0))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """20 images of several sizes and modes in two classes."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(20):
        shape = (int(generator.integers(9, 30)), int(generator.integers(9, 30)))
        pixels = generator.integers(0, 256, shape if i % 5 == 0 else (*shape, 3), dtype=np.uint8)
        target = folder / "ab"[i % 3 == 0]
        target.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(target / f"{i:02}.png")
    return read_source(folder, labels="required")


def open_here(source: ImageSource, augmentation: Augmentation, memory: int = PLENTY, workers: int = 0) -> Any:
    return open_images(source, augmentation, memory=memory, workers=workers, progress=False)


def check_batches(found: Iterable[Tensor], source: ImageSource, augmentation: Augmentation) -> None:
    n = 0
    for batch, (epoch, positions) in zip(found, WANTED, strict=True):
        n += 1
        assert batch.shape == (len(positions), 3, 10, 8)
        assert batch.dtype == torch.uint8
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for pixels, position in zip(batch, positions, strict=True):
            expected = augmentation(load_image(source.paths[position]), epoch, position)
            assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)
    assert n == len(WANTED)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation(TRANSFORM),
        Augmentation(TRANSFORM, "none", flip=True, seed=1),
        Augmentation(TRANSFORM, "padded", 0, flip=True, seed=2),
        Augmentation(TRANSFORM, "padded", 3, flip=True, seed=3),
        Augmentation(TRANSFORM, "resized", flip=True, seed=4),
    ],
    ids=lambda augmentation: f"{augmentation.crop}-{augmentation.padding}-{augmentation.flip}",
)
def test_memory_and_files_give_the_augmented_pixels(
    source: ImageSource, augmentation: Augmentation, workers: int
) -> None:
    files = open_here(source, augmentation, memory=0, workers=workers)
    assert isinstance(files, ImageFiles)
    check_batches(files.batches(WANTED), source, augmentation)
    opened = open_here(source, augmentation, workers=workers)
    assert isinstance(opened, ImagesInMemory) == (augmentation.crop != "resized")
    check_batches(opened.batches(iter(WANTED)), source, augmentation)
    for images in (files, opened):
        assert len(images) == 20
        assert images.labels.dtype == torch.int64
        assert tuple(images.labels.tolist()) == source.labels


@pytest.mark.parametrize("memory", [0, PLENTY])
def test_what_evaluation_sees_is_the_transforms_own(source: ImageSource, memory: int) -> None:
    images = open_here(source, Augmentation(TRANSFORM), memory)
    (batch,) = images.batches([Wanted(0, range(20))])
    expected = torch.stack([TRANSFORM(load_image(path)) for path in source.paths])
    found = TRANSFORM.normalise(batch)
    assert found.dtype == torch.float32
    # Bit for bit, in whatever memory order.
    assert torch.equal(found, expected)
    assert torch.equal(found.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))


def test_normalising_is_torchvisions(source: ImageSource) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    (batch,) = open_here(source, Augmentation(TRANSFORM)).batches([Wanted(0, range(20))])
    expected = functional.normalize(batch.contiguous().float() / 255, TRANSFORM.mean, TRANSFORM.std)
    assert torch.equal(TRANSFORM.normalise(batch), expected)


def test_the_margin_counts_in_the_memory(source: ImageSource) -> None:
    for padding in (0, 3):
        augmentation = Augmentation(TRANSFORM, "padded", padding)
        needed = 20 * (10 + 2 * padding) * (8 + 2 * padding) * 3
        assert isinstance(open_here(source, augmentation, needed), ImagesInMemory)
        assert isinstance(open_here(source, augmentation, needed - 1), ImageFiles)


def test_images_beyond_one_piece_of_decoding_stay_in_order(tmp_path: Path) -> None:
    n = 600
    for i in range(n):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.new("RGB", (1, 1), (i % 256, i // 256, 7)).save(tmp_path / str(i % 2) / f"{i:03}.ppm")
    own = read_source(tmp_path)
    images = open_here(own, Augmentation(ImageTransform(None, 1, "nearest", (0.5,) * 3, (0.5,) * 3)))
    assert isinstance(images, ImagesInMemory)
    (batch,) = images.batches([Wanted(0, range(n))])
    numbers = batch[:, 0, 0, 0].long() + 256 * batch[:, 1, 0, 0].long()
    assert numbers.tolist() == [int(Path(path).stem) for path in own.paths]
    assert (batch[:, 2] == 7).all()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("memory", [0, PLENTY])
@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_a_bad_file_is_named(source: ImageSource, tmp_path: Path, workers: int, memory: int, content: bytes) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    with_bad = ImageSource((*source.paths[:5], str(bad)), (0,) * 6)

    def read_all() -> list[Tensor]:
        images = open_here(with_bad, Augmentation(TRANSFORM), memory, workers)
        return list(images.batches([Wanted(0, (0, 1)), Wanted(0, (4, 5))]))

    with pytest.raises(BadImageError) as caught:
        read_all()
    assert caught.value.path == str(bad)
    assert str(caught.value).startswith(f"{bad}: ")
    assert str(caught.value).endswith("; replace or remove the file, and run again")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_transformed_is_named(source: ImageSource, tmp_path: Path) -> None:
    Image.new("RGB", (20_000, 1)).save(tmp_path / "long.png")
    own = ImageSource((str(tmp_path / "long.png"),), (0,))
    files = open_here(own, Augmentation(ImageTransform(224, 224, "bilinear", (0.5,) * 3, (0.5,) * 3)), memory=0)
    with pytest.raises(BadImageError, match=r"long\.png: the image is 20000 × 1"):
        next(iter(files.batches([Wanted(0, [0])])))


def test_batches_are_read_when_they_are_wanted(source: ImageSource) -> None:
    """The list of steps of a long training is never made as a whole."""

    def endless() -> Iterable[Wanted]:
        epoch = 0
        while True:
            yield Wanted(epoch, (0, 1))
            epoch += 1

    for memory in (0, PLENTY):
        batches = open_here(source, Augmentation(TRANSFORM, "padded", 3), memory).batches(endless())
        first, second = next(batches), next(batches)
        assert not torch.equal(first, second)
    workers = open_here(source, Augmentation(TRANSFORM, "padded", 3), 0, workers=2).batches(endless())
    assert torch.equal(next(workers), first)
    assert torch.equal(next(workers), second)
    del workers


def test_workers_leave_ctrl_c_to_the_main_process(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def report(self: ImageFiles, items: object) -> Any:
        from torch_grood.training.loading import _Read

        return _Read(
            torch.full((1, 1, 1, 3), int(signal.getsignal(signal.SIGINT) is signal.SIG_IGN), dtype=torch.uint8)
        )

    monkeypatch.setattr(ImageFiles, "_read", report)
    files = ImageFiles(source, Augmentation(TRANSFORM), workers=1)
    assert next(iter(files.batches([Wanted(0, [0])]))).tolist() == [[[[1]], [[1]], [[1]]]]
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_what_a_worker_sends_can_be_pinned(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """DataLoader pins what it finds in tuples, and silently leaves other classes in slow memory."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned: list[tuple[int, ...]] = []

    def pin(self: Tensor, *_: object) -> Tensor:
        pinned.append(tuple(self.shape))
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    files = ImageFiles(source, Augmentation(TRANSFORM), workers=0)
    read = files._read([(0, 0), (0, 1)])
    assert pin_memory(read).bad is None
    assert pinned == [(2, 10, 8, 3)]


def test_what_lies_in_memory_can_be_pinned(source: ImageSource, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: (pinned.append(tuple(self.shape)), self)[1])
    images = open_images(source, Augmentation(TRANSFORM), memory=2**30, workers=0, pin=True, progress=False)
    (batch,) = images.batches([Wanted(0, [0, 1])])
    assert batch.shape == (2, 3, 10, 8)
    assert pinned == [(2, 10, 8, 3)]
