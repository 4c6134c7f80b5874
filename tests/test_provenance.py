"""What a detector remembers of its training images: hashes that tell images apart, names, and how they are erased."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset

from format_file import place_of, read_by_hand
from models import batches, patterns, taught_cnn
from torch_grood import GROOD, ClassSample, GroodError, KCenterCoreset, PrototypeMean, provenance
from torch_grood.provenance import Names, content_hashes, digest_of, names_of

GOLDEN = Path(__file__).parent / "golden"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Hashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 5, 7), (1, 28, 28), (3, 32, 32), (3, 90, 90), (16_385,)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64]
)
def test_equal_images_have_equal_hashes_in_any_batch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    images = (40 * noise(6, *shape)).to(dtype)
    hashes = content_hashes(images)
    assert (hashes.dtype, hashes.shape) == (torch.int64, (6,))
    assert torch.equal(torch.cat([content_hashes(image[None]) for image in images]), hashes)
    assert torch.equal(content_hashes(images.flip(0)), hashes.flip(0))
    # However they lie in memory.
    padded = torch.zeros(12, *[2 * size for size in shape], dtype=dtype)
    view = padded[(slice(1, None, 2), *(slice(None, None, 2) for _ in shape))]
    view.copy_(images)
    assert torch.equal(content_hashes(view), hashes)
    if len(shape) == 3:
        assert torch.equal(content_hashes(images.contiguous(memory_format=torch.channels_last)), hashes)
    if dtype.is_floating_point:
        assert torch.equal(content_hashes(images.requires_grad_()), hashes)


def test_a_hundred_thousand_images_have_as_many_hashes() -> None:
    for images in (noise(100_000, 12), torch.arange(100_000, dtype=torch.int32)[:, None], noise(100_000, 3) > 0):
        distinct = len(torch.unique(images, dim=0)) if images.dtype == torch.bool else len(images)
        assert len(content_hashes(images).unique()) == distinct


def variants(image: Tensor) -> Iterator[Tensor]:
    """The image shifted, turned and permuted, and with a few pixels changed, exchanged or negated."""
    yield image
    for shift in range(1, image.shape[-1]):
        yield image.roll(shift, -1)
        yield image.roll(shift, -2)
        yield image.roll((shift, shift), (-1, -2))
    for axes in ([0], [1], [2], [1, 2]):
        yield image.flip(axes)
    yield image.mT
    yield image.roll(1, 0)
    yield -image
    yield -image.flip(0)
    flat, n = image.flatten(), image.numel()
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        one, other = torch.randint(n, (2,), generator=generator).tolist()
        for distance in (0, 1, 256, 512, 1024, 2048):
            second = other if distance == 0 else (one + distance) % n
            exchanged, negated = flat.clone(), flat.clone()
            exchanged[[one, second]] = flat[[second, one]]
            negated[[one, second]] *= -1
            yield exchanged.view_as(image)
            yield negated.view_as(image)
    yield flat[torch.randperm(n, generator=generator)].view_as(image)
    yield flat.sort().values.view_as(image)
    yield flat.roll(256).view_as(image)


SKETCH = (noise(3, 32, 32, seed=5) > 0.7).float()
DISC = ((torch.arange(28)[:, None] - 11) ** 2 + (torch.arange(28) - 9) ** 2 < 30).float()[None]
IMAGES = {
    "noise": noise(3, 32, 32),
    "black and white": SKETCH,
    "minus one and one": 2 * SKETCH - 1,
    "nothing and two": 2 * SKETCH,
    "a disc of minus one and one": 2 * DISC - 1,
    "eighths": (8 * noise(1, 28, 28)).round() / 8,
    "bytes": (255 * SKETCH).to(torch.uint8),
    "half precision": (2 * SKETCH - 1).half(),
    "double precision": (2 * SKETCH - 1).double(),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_shifted_and_permuted_images_are_other_images(kind: str) -> None:
    """Images of few values too, such as sketches and digits, whose numbers differ in few bits."""
    images = torch.stack([one.contiguous() for one in variants(IMAGES[kind])])
    rows = images.flatten(1).view(torch.uint8)
    contents = {bytes(row.tolist()): number for number, row in enumerate(rows)}
    assert len(contents) > 100
    kept = images[list(contents.values())]
    assert len(content_hashes(kept).unique()) == len(kept)


@pytest.mark.parametrize("step", [1, 2**22, 2**23, 2**31 - 1])
def test_one_changed_pixel_is_another_image(step: int) -> None:
    """The least bit of the pixel, or another one, everywhere in the image."""
    image = noise(3, 16, 16)
    words = image.view(torch.int32).flatten()
    changed = words.repeat(len(words) + 1, 1)
    changed[range(len(words)), range(len(words))] ^= step
    assert len(content_hashes(changed.view(torch.float32).view(-1, 3, 16, 16)).unique()) == len(words) + 1


def test_the_dtype_and_the_size_are_of_the_image() -> None:
    image = (noise(1, 3, 8, 8) * 4).round()
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int8]
    hashes = [int(content_hashes(image.to(dtype))) for dtype in dtypes]
    assert len(set(hashes)) == len(hashes)
    black = [int(content_hashes(torch.zeros(1, size))) for size in (1, 2, 255, 256, 257, 1024, 16_384, 40_000)]
    assert len(set(black)) == len(black)


@pytest.mark.parametrize("shape", [(3, 73, 73), (128, 128), (16_384,)])
def test_all_of_an_image_of_65536_bytes_is_looked_at(shape: tuple[int, ...]) -> None:
    image = noise(*shape).flatten()[:16_384]
    for place in (0, 1, 8191, len(image) - 2, len(image) - 1):
        other = image.clone()
        other[place] += 1
        assert content_hashes(other[None]) != content_hashes(image[None])


@pytest.mark.parametrize(("numbers", "step"), [(16_385, 2), (150_528, 10), (3_000_000, 184)])
def test_of_larger_images_every_kth_number_is_looked_at(numbers: int, step: int) -> None:
    image = noise(numbers)
    for place in (0, step, 7 * step, (numbers - 1) // step * step):
        other = image.clone()
        other[place] += 1
        assert content_hashes(other[None]) != content_hashes(image[None]), place
    other = image.clone()
    other[[place for place in range(1000) if place % step]] += 1
    assert content_hashes(other[None]) == content_hashes(image[None])


def test_no_image_and_the_hash_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert content_hashes(torch.empty(0, 3, 4, 4)).shape == (0,)

    class Zeros:
        def digest(self) -> bytes:
            return bytes(8)

    monkeypatch.setattr(provenance.hashlib, "blake2b", lambda *_, **__: Zeros())
    # 0 stands for a sample that is not there.
    assert content_hashes(torch.ones(2, 3)).tolist() == [1, 1]


def test_the_digest_is_of_the_set_in_any_order() -> None:
    hashes = content_hashes(noise(50, 4))
    by_hand = hashlib.sha256(b"".join(struct.pack("<q", number) for number in sorted(hashes.tolist()))).hexdigest()
    assert digest_of(hashes) == by_hand
    assert digest_of(hashes[torch.randperm(50)]) == by_hand
    assert digest_of(hashes[1:]) != by_hand
    assert digest_of(hashes[:0]) == hashlib.sha256(b"").hexdigest()


# --- Names --------------------------------------------------------------------------------------------------------

STRANGE = ["a b.png", "line\nbreak", "naïve/犬/💥", os.fsdecode(b"caf\xe9"), "\0", "a" * 5000, " ", "\ud800 alone", "x"]


def test_names_come_back() -> None:
    names = Names.of(["", *STRANGE, None, "last", ""])
    assert len(names) == len(STRANGE) + 4
    # A surrogate that stands for no byte has no UTF-8: something else may come back, but a name.
    expected = [None, *STRANGE, None, "last", None]
    for position, name in enumerate(expected):
        if name == "\ud800 alone":
            assert isinstance(names[position], str)
        else:
            assert names[position] == name
    assert [Names.of([]).text.tolist(), len(Names.of([]))] == [[], 0]
    assert [Names.of([None, ""])[0], Names.of([None, ""])[1]] == [None, None]


def test_names_are_joined_and_erased() -> None:
    first, second = Names.of(["one", "two", None]), Names.of(["three"])
    joined = first + second
    assert [joined[i] for i in range(4)] == ["one", "two", None, "three"]
    left = joined.without(torch.tensor([1, 3]))
    assert [left[i] for i in range(4)] == ["one", None, None, None]
    assert bytes(left.text.tolist()) == b"one"
    assert [joined[i] for i in range(4)] == ["one", "two", None, "three"]


@pytest.mark.parametrize("ends", [[3, 2, 8], [9, 9, 9], [-1, 3, 8], [3, 2**62, 8], [3, -(2**63), 8]])
def test_ends_that_are_none(ends: list[int]) -> None:
    names = Names(torch.zeros(8, dtype=torch.uint8), torch.tensor(ends))
    with pytest.raises(GroodError, match="the names of the training samples were altered"):
        [names[i] for i in range(3)]


class Folder(Dataset[tuple[Tensor, int]]):
    """As torchvision's ImageFolder: `samples` are pairs (path, label)."""

    def __init__(self, inputs: Tensor, labels: Tensor, samples: Any = None) -> None:
        self.inputs, self.labels = inputs, labels
        self.samples = [(f"{int(y)}/{i}.png", int(y)) for i, y in enumerate(labels)] if samples is None else samples

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.inputs[position], int(self.labels[position])


def found_names(loader: Any, n: int = 12) -> list[str | None] | None:
    found = names_of(loader, n)
    return None if found is None else [found[i] for i in range(len(found))]


def test_names_of_image_folders() -> None:
    folder = Folder(*patterns(12))
    expected = [path for path, _ in folder.samples]
    assert found_names(DataLoader(folder, batch_size=5)) == expected
    assert found_names(DataLoader(folder)) == expected
    assert found_names(DataLoader(folder, batch_size=None)) == expected
    in_order = BatchSampler(SequentialSampler(folder), 5, drop_last=False)
    assert found_names(DataLoader(folder, batch_sampler=in_order)) in (expected, None)
    # Fewer than there are.
    assert names_of(DataLoader(folder, batch_size=5), 11) is None
    assert names_of(DataLoader(Subset(folder, range(5, 12))), 7) is None


class Backwards:
    """Batches of the positions in another order."""

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[11, 10, 9], [8, 7, 6], [5, 4, 3], [2, 1, 0]])


def test_no_names_where_the_order_is_not_that_of_the_folder() -> None:
    folder = Folder(*patterns(12))
    assert names_of(DataLoader(folder, batch_size=5, shuffle=True), 12) is None
    assert names_of(DataLoader(folder, sampler=list(range(11, -1, -1))), 12) is None
    assert names_of(DataLoader(folder, batch_sampler=Backwards()), 12) is None  # type: ignore[arg-type]
    assert names_of(DataLoader(folder, batch_size=5, drop_last=True), 10) is None
    assert names_of([(folder.inputs, folder.labels)], 12) is None


@pytest.mark.parametrize("samples", [5, "abc", [1] * 12, [()] * 12, [(1, 2)] * 12, [[None, 0]] * 12, {}])
def test_samples_that_are_no_pairs_of_path_and_label(samples: Any) -> None:
    assert names_of(DataLoader(Folder(*patterns(12), samples=samples)), 12) is None


class Photographs:
    """A loader of our own kind: it tells the names of what it delivered last."""

    def __init__(self, inputs: Tensor, labels: Any, names: Sequence[Any]) -> None:
        self.batches, self.own = batches(inputs, labels, 7), names

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        return iter(self.batches)

    def names(self) -> Sequence[Any]:
        return self.own


def test_names_that_a_loader_tells() -> None:
    inputs, labels = patterns(12)
    names = [*STRANGE, "y", "", "z"]
    expected = [name or None for name in names]
    found = found_names(Photographs(inputs, labels, names))
    assert found is not None
    assert [b for a, b in zip(expected, found, strict=True) if a != "\ud800 alone"] == [
        a for a in expected if a != "\ud800 alone"
    ]
    assert names_of(Photographs(inputs, labels, names[1:]), 12) is None
    assert names_of(Photographs(inputs, labels, [Path("x")] * 12), 12) is None
    assert names_of(Photographs(inputs, labels, [None] * 12), 12) is None


def test_names_of_images_on_disk(tmp_path: Path) -> None:
    pillow, numpy = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    from torch_grood.data import ImageTransform, image_loader, read_source

    for name in ("cat/a b.png", "cat/ü.png", "dog/c.png", "dog/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pillow.fromarray(numpy.full((8, 8, 3), len(name), numpy.uint8)).save(tmp_path / name)
    (tmp_path / "dog" / "broken.png").write_bytes(b"no image")
    transform = ImageTransform(None, None, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    loader = image_loader(read_source(tmp_path), transform, batch_size=3, workers=0, on_bad="skip")
    n = sum(len(batch[0]) for batch in loader)
    assert n == 4
    expected = [str(tmp_path / name) for name in ("cat/a b.png", "cat/ü.png", "dog/c.png", "dog/d.png")]
    assert sorted(filter(None, found_names(loader, 4) or [])) == sorted(expected)


# --- A detector on images -----------------------------------------------------------------------------------------

NAMES = [f"secret-{i:03}-portrait.png" for i in range(60)]
MODEL = taught_cnn(width=16)


def photographs(n: int = 60, seed: int = 0, start: int = 0) -> Photographs:
    inputs, labels = patterns(n, seed=seed)
    return Photographs(inputs, labels, [f"secret-{start + i:03}-portrait.png" for i in range(n)])


def fitted(loader: Any = None, **arguments: Any) -> GROOD:
    return GROOD(MODEL, outliers=PrototypeMean(), **arguments).fit(photographs() if loader is None else loader)


def image(position: int) -> Tensor:
    return patterns(60)[0][position : position + 1]


def hash_bytes(images: Tensor) -> bytes:
    return struct.pack("<q", int(content_hashes(images)))


def test_what_fit_remembers() -> None:
    detector = fitted()
    record = detector.training_
    assert record is not None
    assert torch.equal(record.hashes, content_hashes(patterns(60)[0]))
    assert detector.sample_names(range(60)) == NAMES
    assert detector.sample_names([59, 0]) == [NAMES[59], NAMES[0]]
    assert record.digest() == digest_of(content_hashes(patterns(60)[0]))
    # The names are those of the neighbours.
    found = detector.assess(image(17))
    assert detector.sample_names(found.neighbor) == [NAMES[17]]
    # In other batches, and without names.
    inputs, labels = patterns(60)
    other = fitted(batches(inputs, labels, 60))
    assert torch.equal(other.training_.hashes, record.hashes)  # type: ignore[union-attr]
    assert other.sample_names([0, 1]) == [None, None]


def test_the_digest_does_not_depend_on_the_order_of_the_images() -> None:
    inputs, labels = patterns(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    one, other = fitted(batches(inputs, labels, 9)), fitted(batches(inputs[order], labels[order], 20))
    assert one.training_.digest() == other.training_.digest()  # type: ignore[union-attr]
    fewer = fitted(batches(inputs[1:], labels[1:], 9))
    assert fewer.training_.digest() != one.training_.digest()  # type: ignore[union-attr]


def test_the_file_tells_what_was_remembered(tmp_path: Path) -> None:
    detector = fitted()
    detector.calibrate(patterns(40, seed=5)[0], fpr=0.1)
    detector.save(tmp_path / "x")
    header, tensors = read_by_hand(tmp_path / "x")
    hashes = struct.pack("<60q", *content_hashes(patterns(60)[0]).tolist())
    assert tensors["training_hashes"] == ("I64", [60], hashes)
    assert tensors["training_names"][2] == "".join(NAMES).encode()
    ends = [23 * (i + 1) for i in range(60)]
    assert tensors["training_name_ends"] == ("I64", [60], struct.pack("<60q", *ends))
    assert header["training"] == {"n": 60, "digest": digest_of(content_hashes(patterns(60)[0]))}
    held_out = digest_of(content_hashes(patterns(40, seed=5)[0]))
    assert header["calibration"] == {"n": 40, "n_left_out": 0, "digest": held_out}
    loaded = GROOD.load(tmp_path / "x", MODEL)
    assert loaded.sample_names(range(60)) == NAMES
    assert loaded.training_.digest() == header["training"]["digest"]  # type: ignore[union-attr]
    assert loaded.calibration_ == detector.calibration_


def test_strange_names_survive_the_file(tmp_path: Path) -> None:
    inputs, labels = patterns(12)
    names = [*STRANGE, "y", "", "z"]
    detector = fitted(Photographs(inputs, labels, names))
    detector.save(tmp_path / "x")
    assert GROOD.load(tmp_path / "x").sample_names(range(12)) == detector.sample_names(range(12))
    assert detector.sample_names([0, 1, 2, 3]) == STRANGE[:4]


@pytest.mark.parametrize("kind", ["stored", "misclassified", "not in the subset", "added"])
def test_a_removed_image_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    """No byte of its hash or its name is in the file."""
    inputs, labels = patterns(60)
    position = 17
    if kind == "misclassified":
        labels = torch.where(torch.arange(60) == position, (labels + 1) % 3, labels)
    detector = fitted(Photographs(inputs, labels, NAMES), subset=ClassSample(n=4) if "subset" in kind else None)
    if kind == "not in the subset":
        stored = set(detector._need_state().sample_ids.tolist())
        position = next(i for i in range(1, 60) if i not in stored)
    gone = image(position)
    if kind == "added":
        detector.add(photographs(9, seed=3, start=60))
        position, gone = 63, patterns(9, seed=3)[0][3:4]
    name = f"secret-{position:03}-portrait".encode()
    detector.save(tmp_path / "before")
    for traces in (name, hash_bytes(gone)):
        assert (tmp_path / "before").read_bytes().count(traces) == 1
    digest = detector.training_.digest()  # type: ignore[union-attr]
    for which, one in (("fitted", detector), ("loaded", GROOD.load(tmp_path / "before"))):
        assert one.remove([position]) == (kind in ("stored", "added"))
        one.save(tmp_path / which)
        content = (tmp_path / which).read_bytes()
        assert name not in content
        assert hash_bytes(gone) not in content
        assert one.sample_names([position, position - 1]) == [None, f"secret-{position - 1:03}-portrait.png"]
        assert content.count(b"secret-") == detector.fit_info_.n_read - 1
        assert one.training_.digest() != digest  # type: ignore[union-attr]
        assert GROOD.load(tmp_path / which).sample_names([position]) == [None]
    assert (tmp_path / "fitted").read_bytes() == (tmp_path / "loaded").read_bytes()
    # It is a training image no more.
    one = GROOD.load(tmp_path / "fitted", MODEL)
    one.calibrate(torch.cat([gone, patterns(40, seed=5)[0]]), fpr=0.1)
    assert one.calibration_ is not None
    assert (one.calibration_.n, one.calibration_.n_left_out) == (41, 0)


def test_added_images_are_remembered_too(tmp_path: Path) -> None:
    detector = fitted()
    detector.add(photographs(9, seed=3, start=60))
    more = patterns(9, seed=3)[0]
    assert torch.equal(detector.training_.hashes, content_hashes(torch.cat([patterns(60)[0], more])))  # type: ignore[union-attr]
    assert detector.sample_names([59, 60, 68]) == [NAMES[59], "secret-060-portrait.png", "secret-068-portrait.png"]
    with pytest.raises(GroodError, match="1 of 41 calibration samples are training samples"):
        detector.calibrate(torch.cat([more[:1], patterns(40, seed=5)[0]]), fpr=0.1)
    detector.save(tmp_path / "x")
    assert GROOD.load(tmp_path / "x").sample_names(range(69)) == detector.sample_names(range(69))


@pytest.mark.parametrize("named", ["first", "second", "neither"])
def test_some_have_names_and_some_have_none(named: str) -> None:
    inputs, labels = patterns(60)
    more, more_labels = patterns(9, seed=3)
    detector = fitted(photographs() if named == "first" else batches(inputs, labels, 9))
    detector.add(photographs(9, seed=3, start=60) if named == "second" else batches(more, more_labels, 4))
    expected = [NAMES[59] if named == "first" else None, "secret-060-portrait.png" if named == "second" else None]
    assert detector.sample_names([59, 60]) == expected
    assert (detector.training_.names is None) == (named == "neither")  # type: ignore[union-attr]
    assert detector.remove([59, 60]) == 2
    assert detector.sample_names([59, 60]) == [None, None]


def test_classes_that_were_left_out_are_not_remembered() -> None:
    inputs, labels = patterns(60)
    detector = GROOD(MODEL, outliers=PrototypeMean()).fit(photographs(), classes=[0, 2])
    hashes = detector.training_.hashes  # type: ignore[union-attr]
    assert torch.equal(hashes == 0, labels == 1)
    assert torch.equal(hashes[labels != 1], content_hashes(inputs[labels != 1]))
    detector.add(photographs(9, seed=3, start=60))
    hashes = detector.training_.hashes[60:]  # type: ignore[union-attr]
    assert torch.equal(hashes == 0, torch.arange(9) % 3 == 1)
    assert detector.sample_names([60, 61]) == ["secret-060-portrait.png", None]


def test_files_of_old_formats_remember_nothing(tmp_path: Path) -> None:
    for name in ("format-1.grood", "format-2.grood"):
        detector = GROOD.load(GOLDEN / name)
        assert detector.training_ is None
        n = detector.fit_info_.n_read
        assert detector.sample_names([0, n - 1]) == [None, None]
        detector.add_features(torch.zeros(3, 6), [0, 1, 2], None) if detector.classes_ == (0, 1, 2) else None
        detector.remove([int(detector._need_state().sample_ids[0])])
        detector.save(tmp_path / name)
        assert GROOD.load(tmp_path / name).training_ is None


def test_names_of_samples_that_do_not_exist() -> None:
    detector = fitted()
    for ids in ([60], [-1]):
        with pytest.raises(GroodError, match="sample ids are positions from 0 to 59"):
            detector.sample_names(ids)
    assert detector.sample_names([]) == []


# --- Calibration --------------------------------------------------------------------------------------------------


def held_out_with(images: Tensor) -> Tensor:
    held_out = patterns(40, seed=5)[0]
    return torch.cat([held_out[:7], images, held_out[7:]])


@pytest.mark.parametrize("kind", ["misclassified", "sample", "coreset"])
def test_a_training_image_without_a_stored_gradient_is_known_by_its_content(kind: str, tmp_path: Path) -> None:
    inputs, labels = patterns(60)
    subsets: dict[str, Any] = {"sample": ClassSample(n=3), "coreset": KCenterCoreset(n=6)}
    if kind == "misclassified":
        labels = torch.where(torch.arange(60) % 7 == 5, (labels + 1) % 3, labels)
    fit = GROOD(MODEL, outliers=PrototypeMean(), subset=subsets.get(kind)).fit(batches(inputs, labels, 11))
    fit.save(tmp_path / "x")
    stored = set(fit._need_state().sample_ids.tolist())
    known = next(i for i in range(60) if i not in stored)
    for detector in (fit, GROOD.load(tmp_path / "x", MODEL)):
        # By its score it is none of the stored ones.
        assert float(detector.score(image(known))) > 1e-4 * float(detector.explain(image(known)).log_magnitude.exp())
        with pytest.raises(GroodError, match=r"1 of 41 calibration samples are training samples \([a-z]+ 7\b"):
            detector.calibrate(held_out_with(image(known)), fpr=0.1)
        assert detector.calibration_ is None
        detector.calibrate(batches(held_out_with(image(known)), torch.zeros(41), 6), fpr=0.1, on_training="drop")
        assert detector.calibration_ is not None
        assert (detector.calibration_.n, detector.calibration_.n_left_out) == (40, 1)
        assert detector.calibration_.digest == digest_of(content_hashes(patterns(40, seed=5)[0]))
        assert detector.threshold_ is not None
        assert torch.equal(detector.threshold_.log_scores, detector.log_score(patterns(40, seed=5)[0]).sort().values)


@pytest.mark.parametrize("per_class", [False, True])
def test_training_images_are_dropped_and_counted(per_class: bool) -> None:
    detector, plain = fitted(), fitted()
    mixed = held_out_with(patterns(60)[0][5:15])
    with pytest.raises(GroodError, match=r"10 of 50 .*\([a-z]+ 7, .*11, ….*on_training='drop'"):
        detector.calibrate(mixed, fpr=0.2, per_class=per_class)
    detector.calibrate(mixed, fpr=0.2, per_class=per_class, on_training="drop")
    plain.calibrate(patterns(40, seed=5)[0], fpr=0.2, per_class=per_class)
    assert detector.calibration_ is not None
    assert plain.calibration_ is not None
    assert (detector.calibration_.n_left_out, plain.calibration_.n_left_out) == (10, 0)
    assert detector.calibration_.digest == plain.calibration_.digest
    # As far as the network gives the same features in another batch.
    assert detector.threshold_ is not None
    assert plain.threshold_ is not None
    torch.testing.assert_close(detector.threshold_.log_scores, plain.threshold_.log_scores, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_where_all_are_training_images() -> None:
    with pytest.raises(GroodError, match="there is no calibration sample"):
        fitted().calibrate(patterns(60)[0], fpr=0.2, on_training="drop")


def test_features_are_known_by_their_content_too() -> None:
    features, labels = noise(40, 5), torch.arange(40) % 4
    predictions = torch.where(torch.arange(40) == 9, (labels + 1) % 4, labels)
    detector = GROOD(None).fit_features(features, labels, predictions)
    with pytest.raises(GroodError, match=r"1 of 31 calibration samples are training samples \([a-z]+ 0\b"):
        detector.calibrate_features(torch.cat([features[9:10], noise(30, 5, seed=2)]), fpr=0.1)


@pytest.mark.parametrize("change", [lambda x: x + 1e-6, lambda x: x.flip(-1), lambda x: x.double()])
def test_another_image_is_no_training_image_by_its_hash(change: Callable[[Tensor], Tensor]) -> None:
    record = fitted().training_
    assert record is not None
    assert record.contains(content_hashes(patterns(60)[0])).all()
    assert not record.contains(content_hashes(change(patterns(60)[0]))).any()
    # What stands for nothing is no image.
    assert not record.without(torch.arange(60)).contains(torch.tensor([0, 1])).any()


def test_names_lie_in_the_file_once(tmp_path: Path) -> None:
    fitted().save(tmp_path / "x")
    assert len(place_of(tmp_path / "x", "training_names")) == len("".join(NAMES).encode())
