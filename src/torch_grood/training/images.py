"""Which images a training uses: a benchmark's lists, DIR/train and DIR/val, or class folders parted by the seed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from torch_grood.data.images import IMAGE_SUFFIXES
from torch_grood.data.sources import ImageSource, read_source
from torch_grood.errors import GroodError
from torch_grood.evaluation.image_sets import survey
from torch_grood.evaluation.spec import read_spec
from torch_grood.training.recipe import Recipe

__all__ = ["TrainingImages", "find_images"]

_TRAIN = ("train", "training")
_VALIDATION = ("val", "valid", "validation")
_HELD_OUT = 0.1
_LEAST_CLASSES = _LEAST_IMAGES = 2


@dataclass(frozen=True)
class TrainingImages:
    """Images to train on and images to watch the training by.

    Attributes:
        train: with labels 0 … C − 1, at least one of each.
        val: with labels of the same classes; nothing is chosen by them, so that they may calibrate a detector.
        n_classes: C.
        digest: of names and labels, to know them again.
        notes: what the user should hear of.
    """

    train: ImageSource
    val: ImageSource
    n_classes: int
    digest: str
    notes: tuple[str, ...] = ()


def find_images(recipe: Recipe, data: str | Path) -> TrainingImages:
    """Find the images of a recipe.

    Args:
        recipe: whose benchmark's lists are taken, if it has one and `data` holds them.
        data: the benchmark's folder; or a folder with class folders in train/ and val/; or class folders, of which a
            tenth of each class is then held out by the recipe's seed.

    Raises:
        GroodError: if images are missing, or classes have none.
    """
    # Absolute: the same images are the same run, from whatever folder it is started.
    folder = Path(os.path.abspath(data))  # noqa: PTH100 - Path.resolve follows links
    if not folder.is_dir():
        raise GroodError(f"{folder}: no such folder; --data takes a folder of images")
    notes: list[str] = []
    train_folder, val_folder = (_split(folder, names) for names in (_TRAIN, _VALIDATION))
    if recipe.benchmark is not None and train_folder is None:
        train, val, notes = _of_benchmark(recipe.benchmark, folder)
    elif train_folder is not None and val_folder is not None:
        train, val = (read_source(path, labels="required") for path in (train_folder, val_folder))
        _check_same_classes(train, val)
    else:
        whole = read_source(train_folder or folder, labels="required")
        _check_files(whole)
        train, val = _parted(whole, recipe.seed)
        notes.append(
            f"no {folder / 'val'}: {len(val):,} of {len(whole):,} images are held out for validation, by the seed"
        )
    _check_files(train, val)
    _check_names(train, val)
    n_classes = _count_classes(train, val)
    ignored = train.ignored + val.ignored
    if ignored:
        notes.append(f"files that are left out, as their names do not end as an image's: {ignored:,}")
    return TrainingImages(train, val, n_classes, _digest(folder, train, val), tuple(notes))


def _split(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of these folders that is there; not one of images alone: "train" is also a class, beside "bus"."""
    return next((folder / name for name in names if (folder / name).is_dir() and not _is_class(folder / name)), None)


def _is_class(folder: Path) -> bool:
    try:
        entries = list(folder.iterdir())
    except OSError:
        # To be told by whoever reads it.
        return False
    return any(_is_image(entry) for entry in entries) and not any(entry.is_dir() for entry in entries)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _of_benchmark(name: str, folder: Path) -> tuple[ImageSource, ImageSource, list[str]]:
    spec = read_spec(name)
    reports = {report.spec.key: report for report in survey(spec, folder, ["train", "val"]) if report.group == "id"}
    bad = [report for report in reports.values() if report.status not in ("complete", "incomplete")]
    if bad:
        listed = "".join(f"\n  {report.spec.key}: {report}" for report in bad)
        raise GroodError(
            f"{folder} lacks images of {spec.title}:{listed}\n  see what is needed, and where it comes from: "
            f"grood data {name} --root {folder}\n  or give class folders in {folder / 'train'} and {folder / 'val'}"
        )
    train, val = (reports[key].source for key in ("train", "val"))
    assert train is not None
    assert val is not None
    return train, val, [f"{one.spec.title}: {one}" for one in reports.values() if one.status == "incomplete"]


def _parted(whole: ImageSource, seed: int) -> tuple[ImageSource, ImageSource]:
    """A tenth of every class, at least one image of it, apart from the rest."""
    labels = np.array(whole.labels)
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(whole), dtype=bool)
    for label in np.unique(labels):
        (own,) = np.nonzero(labels == label)
        if len(own) < _LEAST_IMAGES:
            name = whole.classes[label] if whole.classes else label
            raise GroodError(
                f"{whole.origin}: the class {name} has one image, and training and validation need one each; add images"
            )
        held_out[generator.permutation(own)[: max(1, round(_HELD_OUT * len(own)))]] = True
    train, val = (_subset(whole, np.nonzero(chosen)[0].tolist()) for chosen in (~held_out, held_out))
    return train, replace(val, ignored=0)


def _subset(source: ImageSource, positions: Sequence[int]) -> ImageSource:
    assert source.labels is not None
    paths = tuple(source.paths[position] for position in positions)
    return replace(source, paths=paths, labels=tuple(source.labels[position] for position in positions))


def _check_same_classes(train: ImageSource, val: ImageSource) -> None:
    if train.classes != val.classes:
        only = sorted(set(train.classes or ()) ^ set(val.classes or ()))
        raise GroodError(
            f"{train.origin} and {val.origin} must have the same class folders; only one of them has: "
            f"{', '.join(only[:5])}{', …' if len(only) > 5 else ''}"
        )


def _count_classes(train: ImageSource, val: ImageSource) -> int:
    assert train.labels is not None
    assert val.labels is not None
    present = set(train.labels)
    n_classes = max(present) + 1
    if n_classes < _LEAST_CLASSES:
        raise GroodError(f"{train.origin} has one class; a classifier needs at least {_LEAST_CLASSES}")
    n_missing = n_classes - len(present)
    if n_missing:
        # Not a list of all: a label may be any number.
        first = next(label for label in range(n_classes) if label not in present)
        raise GroodError(
            f"{train.origin}: no image of {n_missing:,} of {n_classes:,} classes (the first is {first}); number them "
            "without gaps"
        )
    unknown = sorted(set(val.labels) - present)
    if unknown:
        raise GroodError(f"{val.origin} has images of classes that {train.origin} has none of: {unknown[:5]}")
    return n_classes


def _check_files(*sources: ImageSource) -> None:
    for source in sources:
        if source.rows is not None:
            raise GroodError(f"{source.origin} holds Parquet files; to train takes image files, in class folders")


def _check_names(*sources: ImageSource) -> None:
    """Before hours of training, after which a detector is fitted on the lists of these files."""
    for source in sources:
        for path in source.paths:
            if "\n" in path or "\r" in path or (not path.isascii() and _is_no_text(path)):
                raise GroodError(
                    f"{path!r}: no image list can hold this name (a line break, or bytes that are no UTF-8); rename it"
                )


def _is_no_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return True
    return False


def _digest(folder: Path, *sources: ImageSource) -> str:
    """By names within the folder, which may be moved."""
    digest = hashlib.sha256()
    above = f"{folder}{os.sep}"
    for source in sources:
        for path, label in zip(source.paths, source.labels or (), strict=True):
            digest.update(f"{path.removeprefix(above)}\0{label}\n".encode())
        digest.update(b"\0")
    return digest.hexdigest()
