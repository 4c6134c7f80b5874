"""Which images a training uses: three layouts, and what can be wrong with each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torch_grood import GroodError
from torch_grood.data import ImageSource
from torch_grood.training import Recipe, read_recipe
from torch_grood.training.images import TrainingImages, find_images

RECIPE = Recipe("mine", "nets.py:net")


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)
    return path


def write_classes(folder: Path, **counts: int) -> Path:
    """DIR/<class>/NNN.png."""
    for name, n in counts.items():
        for i in range(n):
            write(folder / name / f"{i:03}.png")
    return folder


def labels_of(source: ImageSource) -> tuple[int, ...]:
    assert source.labels is not None
    return source.labels


def names(source: ImageSource, folder: Path) -> set[str]:
    return {Path(path).relative_to(folder).as_posix() for path in source.paths}


def test_class_folders_are_parted(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "data", bus=40, car=25, dog=2, eel=3, fly=14)
    (folder / "bus" / "notes.txt").touch()
    found = find_images(RECIPE, folder)
    assert found.n_classes == 5
    assert found.train.classes == found.val.classes == ("bus", "car", "dog", "eel", "fly")
    # A tenth of each class, and one at least.
    assert Counter(labels_of(found.val)) == {0: 4, 1: 2, 2: 1, 3: 1, 4: 1}
    assert Counter(labels_of(found.train)) == {0: 36, 1: 23, 2: 1, 3: 2, 4: 13}
    train, val = names(found.train, folder), names(found.val, folder)
    assert not train & val
    assert len(train | val) == 84
    for source in (found.train, found.val):
        folders = [Path(path).parent.name for path in source.paths]
        assert folders == [("bus", "car", "dog", "eel", "fly")[label] for label in labels_of(source)]
    assert found.notes == (
        f"no {folder / 'val'}: 9 of 84 images are held out for validation, by the seed",
        "files that are left out, as their names do not end as an image's: 1",
    )


def test_the_parting_follows_from_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_classes(tmp_path / "data", bus=30, car=30)

    def parted(seed: int, data: str | Path = folder) -> TrainingImages:
        return find_images(replace(RECIPE, seed=seed), data)

    assert parted(0) == parted(0) == parted(0, str(folder))
    held_out = {frozenset(names(parted(seed).val, folder)) for seed in range(5)}
    assert len(held_out) == 5
    assert len({parted(seed).digest for seed in range(5)}) == 5
    # From wherever it is called, it is the same run.
    monkeypatch.chdir(folder)
    assert parted(0, ".") == parted(0)
    assert parted(0, "../data/") == parted(0)


def test_every_image_is_held_out_by_some_seed(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, bus=5, car=3)
    seen: Counter[str] = Counter()
    for seed in range(60):
        seen.update(names(find_images(replace(RECIPE, seed=seed), folder).val, folder))
    assert len(seen) == 8
    assert min(seen.values()) > 3


def test_the_digest_knows_names_and_labels(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, bus=5, car=3)
    digests = {find_images(RECIPE, folder).digest}
    write(folder / "bus" / "new.png")
    digests.add(find_images(RECIPE, folder).digest)
    (folder / "car").rename(folder / "art")
    digests.add(find_images(RECIPE, folder).digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("train", "val"), [("train", "val"), ("training", "validation"), ("train", "valid"), ("train", "validation")]
)
def test_train_and_val_are_taken_as_they_are(tmp_path: Path, train: str, val: str) -> None:
    write_classes(tmp_path / train, bus=4, car=3)
    write_classes(tmp_path / val, bus=1, car=2)
    write_classes(tmp_path / "test", bus=9, car=9)
    found = find_images(RECIPE, tmp_path)
    assert labels_of(found.train) == (0, 0, 0, 0, 1, 1, 1)
    assert labels_of(found.val) == (0, 1, 1)
    assert names(found.val, tmp_path) == {f"{val}/bus/000.png", f"{val}/car/000.png", f"{val}/car/001.png"}
    assert found.notes == ()
    # A recipe of a benchmark takes what is given too.
    assert find_images(read_recipe("cifar10-resnet18"), tmp_path) == found


def test_train_alone_is_parted(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", bus=10, car=20)
    write_classes(tmp_path / "test", bus=9, car=9)
    found = find_images(RECIPE, tmp_path)
    assert (len(found.train), len(found.val)) == (27, 3)
    assert all(name.startswith("train/") for name in names(found.train, tmp_path) | names(found.val, tmp_path))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    found = find_images(RECIPE, write_classes(tmp_path, bus=10, train=10, val=2))
    assert found.train.classes == ("bus", "train", "val")
    assert (len(found.train), len(found.val)) == (19, 3)


SPEC = """\
name = "tiny"
title = "Tiny"
reference = "nobody"
[transform]
resize = 8
crop = 8
interpolation = "bilinear"
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
[id.train]
title = "Tiny train"
list = "lists/train.txt"
root = "images"
count = 4
[id.val]
title = "Tiny validation"
list = "lists/val.txt"
root = "images"
[id.test]
title = "Tiny test"
list = "lists/test.txt"
root = "images"
[val_ood]
title = "a"
folder = "a"
[near.b]
title = "b"
folder = "b"
[far.c]
title = "c"
folder = "c"
"""


@pytest.fixture
def benchmark(tmp_path: Path) -> tuple[Recipe, Path]:
    (tmp_path / "tiny.toml").write_text(SPEC)
    root = tmp_path / "data"
    (root / "lists").mkdir(parents=True)
    for name, n in (("train", 4), ("val", 3)):
        lines = [f"{name}/{i}.png {i % 2}" for i in range(n)]
        (root / "lists" / f"{name}.txt").write_text("\n".join(lines))
        for i in range(n):
            write(root / "images" / name / f"{i}.png")
    return replace(RECIPE, benchmark=str(tmp_path / "tiny.toml")), root


def test_a_benchmarks_lists_are_used(benchmark: tuple[Recipe, Path]) -> None:
    recipe, root = benchmark
    found = find_images(recipe, root)
    assert found.n_classes == 2
    assert found.train.paths == tuple(str(root / "images" / "train" / f"{i}.png") for i in range(4))
    assert labels_of(found.train) == (0, 1, 0, 1)
    assert labels_of(found.val) == (0, 1, 0)
    assert found.notes == ()


def test_an_incomplete_benchmark_is_told(benchmark: tuple[Recipe, Path]) -> None:
    recipe, root = benchmark
    lines = (root / "lists" / "train.txt").read_text().splitlines()
    (root / "lists" / "train.txt").write_text("\n".join(lines[:3]))
    assert find_images(recipe, root).notes == ("Tiny train: incomplete (3 of 4)",)


def test_an_absent_benchmark_is_told(benchmark: tuple[Recipe, Path]) -> None:
    recipe, root = benchmark
    (root / "images" / "train" / "2.png").unlink()
    (root / "lists" / "val.txt").unlink()
    with pytest.raises(GroodError) as caught:
        find_images(recipe, root)
    message = str(caught.value)
    assert message.startswith(f"{root} lacks images of Tiny:\n  train: broken (")
    assert f"line 3: {root / 'images' / 'train' / '2.png'}" in message
    assert f"\n  val: absent (no list {root / 'lists' / 'val.txt'})" in message
    assert f"give class folders in {root / 'train'} and {root / 'val'}" in message
    with pytest.raises(GroodError, match="lacks images of CIFAR-10"):
        find_images(read_recipe("cifar10-resnet18"), root)


def test_labels_need_no_gaps(benchmark: tuple[Recipe, Path]) -> None:
    recipe, root = benchmark
    lists = root / "lists"

    def message(train: list[int], val: list[int]) -> str:
        for name, labels in (("train", train), ("val", val)):
            (lists / f"{name}.txt").write_text("".join(f"{name}/{i}.png {k}\n" for i, k in enumerate(labels)))
        with pytest.raises(GroodError) as caught:
            find_images(recipe, root)
        return str(caught.value)

    assert "train.txt: no image of 1 of 3 classes (the first is 1)" in message([0, 2, 2, 0], [0])
    assert "val.txt has images of classes that" in message([0, 1, 1, 0], [0, 2])
    assert "train.txt has one class; a classifier needs at least 2" in message([0, 0, 0, 0], [0])
    # A label of a file is a number of anybody's choice; nothing is made as long as it is large.
    assert "no image of 2,147,483,646 of 2,147,483,648 classes (the first is 1)" in message([0, 2**31 - 1], [0])


@pytest.mark.parametrize(
    ("train", "val", "match"),
    [
        ({"bus": 3}, {"bus": 1}, "has one class; a classifier needs at least 2"),
        ({"bus": 3, "car": 3}, {"bus": 1}, "must have the same class folders; only one of them has: car"),
        ({"bus": 3, "car": 3}, {"bus": 1, "cat": 1}, "only one of them has: car, cat"),
    ],
)
def test_unequal_splits_are_refused(tmp_path: Path, train: dict[str, int], val: dict[str, int], match: str) -> None:
    write_classes(tmp_path / "train", **train)
    write_classes(tmp_path / "val", **val)
    with pytest.raises(GroodError, match=match):
        find_images(RECIPE, tmp_path)


def test_folders_that_will_not_do(tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        with pytest.raises(GroodError) as caught:
            find_images(RECIPE, folder)
        return str(caught.value)

    assert message(tmp_path / "no") == f"{tmp_path / 'no'}: no such folder; --data takes a folder of images"
    assert "no such folder" in message(write(tmp_path / "file.png"))
    (tmp_path / "empty").mkdir()
    assert "empty holds no image" in message(tmp_path / "empty")
    folder = write_classes(tmp_path / "gap", bus=3, car=3)
    (folder / "dog").mkdir()
    (folder / "dog" / "readme.txt").touch()
    assert "no image in 1 of 3 class folders (dog); add images" in message(folder)
    assert "the class car has one image" in message(write_classes(tmp_path / "few", bus=3, car=1))
    assert "has one class" in message(write_classes(tmp_path / "one", bus=3))
    flat = tmp_path / "flat"
    write(flat / "1.png")
    assert "is a flat folder of images, without labels" in message(flat)
    write(flat / "bus" / "1.png")
    assert "has both images" in message(flat)
    mixed = write_classes(tmp_path / "mixed" / "train", bus=3, car=3)
    write(mixed / "stray.png")
    assert f"{mixed} has both images (stray.png, …) and folders (bus, …)" in message(tmp_path / "mixed")
    # Splits without classes.
    assert "look like splits, not classes" in message(write_classes(tmp_path / "splits", train=3, val=3))
    (tmp_path / "hollow" / "train").mkdir(parents=True)
    (tmp_path / "hollow" / "val").mkdir()
    assert "train holds no image" in message(tmp_path / "hollow")


def test_numbers_of_images_follow_numpys_own_labels(tmp_path: Path) -> None:
    """Labels are plain numbers: they go into JSON, lists and tensors."""
    found = find_images(RECIPE, write_classes(tmp_path, bus=11, car=12))
    assert {type(label) for label in labels_of(found.train) + labels_of(found.val)} == {int}
    assert not isinstance(found.n_classes, np.integer)
