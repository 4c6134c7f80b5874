"""Which images, and with which labels: a class folder, a flat folder, an image list, Parquet files, or single files.

- A class folder is ``DIR/<class>/**``: torchvision's ImageFolder layout, with its order of classes and of images.
- A flat folder holds images and no folders: images without labels.
- An image list is a text file of OpenOOD's form, one ``relative/path label`` a line. The label is the last token, so
  paths may contain spaces; −1 stands for OOD. A list whose lines carry no labels is a list of paths.
- Parquet files have image files in a column, one a row, and perhaps labels and names in others.

All of them may lie at URLs, where fsspec finds them, and the lines of a list may be URLs.

Hidden files and folders are left out, and so are files without an image's suffix; those are counted. Everything that is
wrong is an error here, before a long run starts: a broken line, a missing file, an empty class.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch_grood._text import shorten
from torch_grood.data.image_lists import Labels, is_list, read_list
from torch_grood.data.images import IMAGE_SUFFIXES, BadImageError, decode_image, load_image
from torch_grood.data.parquet import ParquetColumns, ParquetRows, named_parquet, open_rows
from torch_grood.data.parquet_labels import read_labels
from torch_grood.data.trees import LocalTree, Tree, UrlTree
from torch_grood.data.urls import content_of, is_url, kind_of, stamps_of
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageSource", "Labels", "read_source"]

PathLike = str | os.PathLike[str]

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


@dataclass(frozen=True)
class ImageSource:
    """Images in a fixed order.

    Attributes:
        paths: n files or URLs, or names of rows. Strings, because a million `Path` objects take half a gigabyte.
        labels: n class numbers, −1 for OOD, or None.
        classes: names of the classes by number, or None if only numbers are known.
        origin: what was read, for messages.
        ignored: how many files of a folder were left out because they have no image suffix.
        stamps: what tells whether a file at a URL is still the same, by position; None for a file here. None: there is
            no URL.
        rows: the n rows of Parquet files that the images are, or None.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] | None = None
    origin: str = "images"
    ignored: int = 0
    stamps: tuple[str | None, ...] | None = None
    rows: ParquetRows | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, position: int) -> Image:
        """Read one image as 8-bit RGB; several threads may do so.

        Raises:
            BadImageError: if it cannot be used; see `load_image`.
            GroodError: if a file system fails, or a Parquet file has changed.
        """
        path = self.paths[position]
        if self.rows is not None:
            place = self.rows.place(position)
            try:
                return decode_image(self.rows.content(position), path)
            except BadImageError as error:
                reason = error.reason if path == place else f"{error.reason} ({place})"
                raise BadImageError(path, reason) from None
        return decode_image(content_of(path), path) if is_url(path) else load_image(path)

    def places(self) -> Iterator[str]:
        """What each image is, however it is named: a path from the root, a URL, or file and row."""
        if self.rows is not None:
            rows = self.rows.absolute()
            yield from map(rows.place, range(len(rows)))
        else:
            yield from map(_absolute, self.paths)

    def absolute(self) -> ImageSource:
        """With the paths of files here from the root; the names of rows stay."""
        if self.rows is not None:
            return replace(self, rows=self.rows.absolute())
        return replace(self, paths=tuple(map(_absolute, self.paths)))


def read_source(
    path: PathLike | Sequence[PathLike],
    root: PathLike | None = None,
    labels: Labels = "auto",
    *,
    columns: ParquetColumns | None = None,
    follow_urls: bool = True,
) -> ImageSource:
    """Find the images that `path` stands for.

    Args:
        path: a class folder, a flat folder, an image list, an image file, a Parquet file (or a pattern of names, or a
            folder of such files), or several of them (then without labels). A string may be a URL that fsspec knows.
        root: the folder, or URL, that a list's paths are relative to. By default the list's own folder and the three
            above it are tried, each with its ``images_classic/`` and ``images_largescale/`` as in OpenOOD's layout
            (``data/benchmark_imglist/cifar10/x.txt`` beside ``data/images_classic/``); the one that holds most of a
            sample of the listed files is taken, the nearest at a tie.
        labels: "auto" gives labels where there are some. "required" demands a class for every image. "none" wants no
            labels and searches folders of any depth.
        columns: which columns of Parquet files hold images, labels and names; other sources have none.
        follow_urls: whether lines of an image list may be URLs; False for a list that somebody else wrote.

    Raises:
        GroodError: if nothing is found, a line is broken, a listed file is missing, a class has no image, or labels
            are required and absent.
    """
    if not isinstance(path, (str, os.PathLike)):
        if len(path) != 1:
            return _several(path, root, labels, columns, follow_urls)
        path = path[0]
    text = os.fspath(path)
    if files := named_parquet(text):
        return _parquet(files, text, labels, columns)
    kind = kind_of(text) if is_url(text) else _kind_of_path(Path(path))
    if kind == "folder":
        if root is not None:
            raise GroodError(f"{path} is a folder; a root is only meant for image lists. Leave it out")
        tree: Tree = UrlTree(text) if is_url(text) else LocalTree(Path(path))
        try:
            return _folder(tree, labels)
        except _NoImageError:
            if not (files := tree.parquet()):
                raise
        if labels == "required":
            _check_one_split(tree, files)
        return _parquet(files, text, labels, columns)
    if kind is None:
        raise GroodError(f"{path}: no such file or folder")
    if not is_list(text):
        if labels == "required":
            raise GroodError(f"{path} is a single image, without a label; pass a class folder or an image list")
        return ImageSource((text,), origin=text, stamps=tuple(stamps_of([text])) if is_url(text) else None)
    listed = read_list(text, None if root is None else os.fspath(root), labels, follow_urls)
    return ImageSource(listed.paths, listed.labels, origin=text, stamps=listed.stamps)


def _absolute(path: str) -> str:
    return path if is_url(path) else str(Path(path).absolute())


def _kind_of_path(path: Path) -> Literal["file", "folder"] | None:
    if path.is_dir():
        return "folder"
    if path.exists() and not path.is_file():
        raise GroodError(f"{path}: neither a file nor a folder")
    return "file" if path.exists() else None


def _several(
    paths: Sequence[PathLike], root: PathLike | None, labels: Labels, columns: ParquetColumns | None, follow_urls: bool
) -> ImageSource:
    if not paths:
        raise GroodError("no images given; pass a folder, an image list, or image files")
    if labels == "required":
        raise GroodError(f"labels cannot be joined from {len(paths)} sources; pass one class folder or image list")
    sources = [read_source(path, root, "none", columns=columns, follow_urls=follow_urls) for path in paths]
    origin = f"{sources[0].origin} and {len(sources) - 1} more"
    tables = [source.rows for source in sources]
    if any(tables):
        files = [file for rows in tables if rows is not None for file in rows.files]
        if not all(tables):
            other = next(source for source in sources if source.rows is None)
            raise GroodError(f"{files[0]} is Parquet, and {other.origin} is not; take one after the other")
        return replace(_parquet(files, "", "none", columns), origin=origin)
    stamped = any(source.stamps is not None for source in sources)
    return ImageSource(
        paths=tuple(file for source in sources for file in source.paths),
        origin=origin,
        ignored=sum(source.ignored for source in sources),
        stamps=tuple(stamp for source in sources for stamp in source.stamps or [None] * len(source))
        if stamped
        else None,
    )


def _parquet(files: Sequence[str], origin: str, labels: Labels, columns: ParquetColumns | None) -> ImageSource:
    columns = columns or ParquetColumns()
    rows = open_rows(files, columns)
    found = None if labels == "none" else read_labels(files, columns.label)
    if labels == "required":
        if found is None:
            raise GroodError(f"{files[0]} has no column called label; name the one with the classes: --label-column")
        if -1 in found.numbers:
            raise GroodError(
                f"{rows.place(found.numbers.index(-1))}: label −1 stands for OOD; here every image must have a class "
                "0, 1, 2, …"
            )
    source = ImageSource(tuple(rows.names()), origin=origin, rows=rows)
    return source if found is None else replace(source, labels=found.numbers, classes=found.classes)


def _check_one_split(tree: Tree, files: Sequence[str]) -> None:
    """Hugging Face's data sets have train-00000-of-00002.parquet and test-… in one folder."""
    kinds = {file: re.split(r"[-_.]", file.rpartition("/")[2].lower())[0] for file in files}
    splits = sorted(set(kinds.values()) & _SPLITS)
    if len(splits) > 1:
        raise GroodError(
            f"{tree} holds Parquet files of {shorten(splits)}; pass those of one: {tree.path(f'{splits[0]}*.parquet')}"
        )


class _NoImageError(GroodError):
    """A folder without an image."""


def _folder(tree: Tree, labels: Labels) -> ImageSource:
    if labels == "none":
        found, ignored = tree.walk()
        if not found:
            raise _no_images(tree, ignored)
        return _of_tree(tree, found, ignored)

    images, ignored, folders = tree.look()
    if images and folders:
        raise GroodError(
            f"{tree} has both images ({Path(images[0]).name}, …) and folders ({folders[0]}, …); a class folder "
            "has only folders, a flat one only images. Move one kind elsewhere"
        )
    if not folders:
        if not images:
            raise _no_images(tree, ignored)
        if labels == "required":
            raise GroodError(f"{tree} is a flat folder of images, without labels; expected one folder for each class")
        return _of_tree(tree, images, ignored)

    if labels == "required":
        _check_no_splits(tree, folders)
    paths: list[str] = []
    numbers: list[int] = []
    empty: list[str] = []
    for number, name in enumerate(folders):
        found, left_out = tree.walk(name)
        ignored += left_out
        paths += found
        numbers += [number] * len(found)
        if not found:
            empty.append(name)
    if not paths:
        raise _no_images(tree, ignored)
    if empty:
        raise GroodError(
            f"{tree}: no image in {len(empty)} of {len(folders)} class folders ({shorten(empty)}); add images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folders"
        )
    return replace(_of_tree(tree, paths, ignored), labels=tuple(numbers), classes=tuple(folders))


def _of_tree(tree: Tree, paths: Sequence[str], ignored: int) -> ImageSource:
    stamps = tuple(map(tree.stamps.__getitem__, paths)) if isinstance(tree, UrlTree) else None
    return ImageSource(tuple(paths), origin=str(tree), ignored=ignored, stamps=stamps)


def _check_no_splits(tree: Tree, folders: Sequence[str]) -> None:
    """DIR given in place of DIR/train would make classes "train" and "val" of it."""
    splits = [name for name in folders if name.lower() in _SPLITS]
    if splits and (len(splits) == len(folders) or not tree.look(splits[0]).images):
        raise GroodError(
            f"{tree} holds {shorten(splits)}, which look like splits, not classes; pass one of them: "
            f"{tree.path(splits[0])}"
        )


def _no_images(tree: Tree, ignored: int) -> GroodError:
    others = f"; its {ignored} other files are left out" if ignored else ""
    suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
    return _NoImageError(f"{tree} holds no image (a file that ends in {suffixes}) and no Parquet file{others}")
