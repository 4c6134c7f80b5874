"""Which images, and with which labels: a class folder, a flat folder, an image list, or single files.

- A class folder is ``DIR/<class>/**``: torchvision's ImageFolder layout, with its order of classes and of images.
- A flat folder holds images and no folders: images without labels.
- An image list is a text file of OpenOOD's form, one ``relative/path label`` a line. The label is the last token, so
  paths may contain spaces; −1 stands for OOD. A list whose lines carry no labels is a list of paths.

Hidden files and folders are left out, and so are files without an image's suffix; those are counted. Everything that is
wrong is an error here, before a long run starts: a broken line, a missing file, an empty class.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch_grood.data.images import IMAGE_SUFFIXES
from torch_grood.errors import GroodError

__all__ = ["ImageSource", "Labels", "read_source"]

Labels = Literal["auto", "required", "none"]
PathLike = str | os.PathLike[str]

_SHOWN = 5
_MAX_LABEL = 2**31 - 1
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class ImageSource:
    """Image files in a fixed order.

    Attributes:
        paths: n files. Strings, because a million `Path` objects take half a gigabyte.
        labels: n class numbers, −1 for OOD, or None.
        classes: names of the classes by number, or None if only numbers are known.
        origin: what was read, for messages.
        ignored: how many files of a folder were left out because they have no image suffix.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None
    origin: str = "images"
    ignored: int = 0

    def __len__(self) -> int:
        return len(self.paths)


def read_source(
    path: PathLike | Sequence[PathLike], root: PathLike | None = None, labels: Labels = "auto"
) -> ImageSource:
    """Find the images that `path` stands for.

    Args:
        path: a class folder, a flat folder, an image list, an image file, or several of them (then without labels).
        root: the folder that a list's paths are relative to. By default the list's own folder and the three above it
            are tried, each with its ``images_classic/`` and ``images_largescale/`` as in OpenOOD's layout
            (``data/benchmark_imglist/cifar10/x.txt`` beside ``data/images_classic/``); the one that holds most of a
            sample of the listed files is taken, the nearest at a tie.
        labels: "auto" gives labels where there are some. "required" demands a class for every image. "none" wants no
            labels and searches folders of any depth.

    Raises:
        GroodError: if nothing is found, a line is broken, a listed file is missing, a class has no image, or labels
            are required and absent.
    """
    if not isinstance(path, (str, os.PathLike)):
        if len(path) != 1:
            return _several(path, root, labels)
        path = path[0]
    file = Path(path)
    if file.is_dir():
        if root is not None:
            raise GroodError(f"{path} is a folder; a root is only meant for image lists. Leave it out")
        return _folder(file, labels)
    if not file.exists():
        raise GroodError(f"{path}: no such file or folder")
    if not file.is_file():
        raise GroodError(f"{path}: neither a file nor a folder")
    if not _is_list(file):
        if labels == "required":
            raise GroodError(f"{path} is a single image, without a label; pass a class folder or an image list")
        return ImageSource((str(path),), origin=str(path))
    return _image_list(file, None if root is None else Path(root), labels)


def _several(paths: Sequence[PathLike], root: PathLike | None, labels: Labels) -> ImageSource:
    if not paths:
        raise GroodError("no images given; pass a folder, an image list, or image files")
    if labels == "required":
        raise GroodError(f"labels cannot be joined from {len(paths)} sources; pass one class folder or image list")
    sources = [read_source(path, root, "none") for path in paths]
    return ImageSource(
        paths=tuple(file for source in sources for file in source.paths),
        origin=f"{sources[0].origin} and {len(sources) - 1} more",
        ignored=sum(source.ignored for source in sources),
    )


def _folder(folder: Path, labels: Labels) -> ImageSource:
    if labels == "none":
        found, ignored = _walk(folder)
        if not found:
            raise _no_images(folder, ignored)
        return ImageSource(tuple(found), origin=str(folder), ignored=ignored)

    images, ignored, folders = _list_folder(folder)
    if images and folders:
        raise GroodError(
            f"{folder} has both images ({Path(images[0]).name}, …) and folders ({folders[0]}, …); a class folder "
            "has only folders, a flat one only images. Move one kind elsewhere"
        )
    if not folders:
        if not images:
            raise _no_images(folder, ignored)
        if labels == "required":
            raise GroodError(f"{folder} is a flat folder of images, without labels; expected one folder for each class")
        return ImageSource(tuple(images), origin=str(folder), ignored=ignored)

    if labels == "required":
        _check_no_splits(folder, folders)
    paths: list[str] = []
    numbers: list[int] = []
    empty: list[str] = []
    for number, name in enumerate(folders):
        found, left_out = _walk(folder / name)
        ignored += left_out
        paths += found
        numbers += [number] * len(found)
        if not found:
            empty.append(name)
    if not paths:
        raise _no_images(folder, ignored)
    if empty:
        raise GroodError(
            f"{folder}: no image in {len(empty)} of {len(folders)} class folders ({_shorten(empty)}); add images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folders"
        )
    return ImageSource(tuple(paths), tuple(numbers), tuple(folders), str(folder), ignored)


def _check_no_splits(folder: Path, folders: Sequence[str]) -> None:
    """DIR given in place of DIR/train would make classes "train" and "val" of it."""
    splits = [name for name in folders if name.lower() in _SPLITS]
    if splits and (len(splits) == len(folders) or not _list_folder(folder / splits[0])[0]):
        raise GroodError(
            f"{folder} holds {_shorten(splits)}, which look like splits, not classes; pass one of them: "
            f"{folder / splits[0]}"
        )


def _no_images(folder: Path, ignored: int) -> GroodError:
    others = f"; its {ignored} other files are left out" if ignored else ""
    return GroodError(f"{folder} holds no image (a file that ends in {', '.join(sorted(IMAGE_SUFFIXES))}){others}")


def _list_folder(folder: Path) -> tuple[list[str], int, list[str]]:
    """Images of a folder, the number of its other files, and the names of its folders; sorted, without hidden ones."""
    images: list[str] = []
    folders: list[str] = []
    ignored = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122 - ten times faster
                    images.append(entry.path)
                else:
                    ignored += 1
    except OSError as error:
        raise GroodError(f"{folder} cannot be read: {error.strerror}") from None
    return sorted(images), ignored, sorted(folders)


def _walk(folder: Path) -> tuple[list[str], int]:
    """All images below a folder, through symbolic links, in ImageFolder's order, and the number of other files."""
    by_folder: dict[str, list[str]] = {}
    ignored = 0
    # A real folder is read once, however many links lead to it: a loop of links would not end.
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        here = pending.pop()
        status = here.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            continue
        seen.add(identity)
        images, left_out, folders = _list_folder(here)
        by_folder[str(here)] = images
        ignored += left_out
        # Popped from the end: sorted order decides which of two links counts.
        pending += [here / name for name in reversed(folders)]
    return [image for name in sorted(by_folder) for image in by_folder[name]], ignored


def _is_list(file: Path) -> bool:
    """Whether a file is text. One with an unknown suffix and binary content is left to `load_image` to judge."""
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return False
    with _readable(file), file.open("rb") as stream:
        return b"\0" not in stream.read(4096)


def _image_list(file: Path, root: Path | None, labels: Labels) -> ImageSource:
    with _readable(file):
        text = file.read_text(encoding="utf-8-sig")
    # Not splitlines(): it also splits at characters that file names may contain.
    entries = [
        _parse_line(line.strip(), file, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()
    ]
    if not entries:
        raise GroodError(f"{file} lists no image; expected lines of the form: relative/path.png 3")
    _check_labels(entries, file, labels)

    relative = [path for path, _, _ in entries]
    base = _find_root(relative, file) if root is None else root
    paths = tuple(os.path.join(base, path) for path in relative)  # noqa: PTH118 - a million Paths
    missing = [position for position, path in enumerate(paths) if not os.path.isfile(path)]  # noqa: PTH113
    if missing:
        shown = [f"line {entries[position][2]}: {paths[position]}" for position in missing]
        raise GroodError(
            f"{file}: {len(missing)} of {len(paths)} listed files are missing under {base.absolute()} "
            f"({_shorten(shown, '; ')}); pass the folder that the paths are relative to as root (--root)"
        )
    numbers = [label for _, label, _ in entries if label is not None]
    return ImageSource(paths, tuple(numbers) if numbers and labels != "none" else None, origin=str(file))


def _parse_line(line: str, file: Path, number: int) -> tuple[str, int | None, int]:
    """(path, label or None, line number)."""
    if "\0" in line:
        raise GroodError(f"{file}, line {number}: a NUL character; this is not an image list")
    path, _, last = line.replace("\t", " ").rpartition(" ")
    if not _INTEGER.fullmatch(last):
        return line, None, number
    if not path.strip():
        raise GroodError(f"{file}, line {number}: a label but no path: {line!r:.100}; expected: relative/path.png 3")
    if len(last) > len(str(_MAX_LABEL)) or not -1 <= int(last) <= _MAX_LABEL:
        raise GroodError(f"{file}, line {number}: {last:.30} is no class; expected 0, 1, 2, … or −1 for OOD")
    return line[: len(path)].rstrip(), int(last), number


def _check_labels(entries: Sequence[tuple[str, int | None, int]], file: Path, labels: Labels) -> None:
    unlabelled = next((entry for entry in entries if entry[1] is None), None)
    labelled = next((entry for entry in entries if entry[1] is not None), None)
    if unlabelled and (labelled or labels == "required"):
        other = f", unlike line {labelled[2]}" if labelled else ""
        raise GroodError(
            f"{file}, line {unlabelled[2]}: no label at the end of {unlabelled[0]!r:.100}{other}; "
            "expected: relative/path.png 3"
        )
    ood = next((entry for entry in entries if entry[1] == -1), None)
    if ood and labels == "required":
        raise GroodError(
            f"{file}, line {ood[2]}: label −1 stands for OOD; here every image must have a class 0, 1, 2, …"
        )


def _find_root(relative: Sequence[str], file: Path) -> Path:
    sample = relative[:: max(1, len(relative) // 20)]

    def hits(base: Path) -> int:
        return sum((base / path).is_file() for path in sample)

    # max() keeps the first of equals, so the nearest.
    return max(_candidate_roots(file), key=hits)


def _candidate_roots(file: Path) -> Iterator[Path]:
    folder = file.parent
    above = folder.absolute().parents[:3]
    for base in (folder, *above):
        yield from (base, base / "images_classic", base / "images_largescale")


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turns what can go wrong in reading a file into a `GroodError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise GroodError(f"{file} is no UTF-8 text (byte {error.start}); save the image list as UTF-8") from None
    except OSError as error:
        raise GroodError(f"{file} cannot be read: {error.strerror}") from None


def _shorten(names: Sequence[str], separator: str = ", ") -> str:
    return separator.join(names[:_SHOWN]) + (f"{separator}…" if len(names) > _SHOWN else "")
