"""Folders of images, here or at a URL: the same files in the same order.

The order is that of torchvision's ImageFolder. Hidden files and folders are left out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Protocol

from torch_grood.data.images import IMAGE_SUFFIXES
from torch_grood.data.urls import files_below, joined
from torch_grood.errors import GroodError

__all__ = ["PARQUET_SUFFIX", "Listing", "LocalTree", "Tree", "UrlTree"]

PARQUET_SUFFIX = ".parquet"


class Listing(NamedTuple):
    """What one folder holds, sorted.

    Attributes:
        images: paths or URLs.
        ignored: the number of its other files.
        folders: names.
    """

    images: list[str]
    ignored: int
    folders: list[str]


class Tree(Protocol):
    """A folder and all below it; `name` is that of a folder in it, "" for itself."""

    def __str__(self) -> str: ...

    def path(self, name: str) -> str:
        """Path or URL of a folder in it."""
        ...

    def look(self, name: str = "") -> Listing:
        """What one folder holds."""
        ...

    def walk(self, name: str = "") -> tuple[list[str], int]:
        """All images below a folder in ImageFolder's order, and the number of other files."""
        ...

    def parquet(self) -> list[str]:
        """All Parquet files, sorted."""
        ...


class LocalTree:
    """A folder of this machine.

    Args:
        folder: that exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def path(self, name: str) -> str:
        """See `Tree`."""
        return str(self.folder / name)

    def look(self, name: str = "") -> Listing:
        """See `Tree`."""
        return _list_folder(self.folder / name)

    def walk(self, name: str = "") -> tuple[list[str], int]:
        """See `Tree`; through symbolic links."""
        by_folder: dict[str, list[str]] = {}
        ignored = 0
        # A real folder is read once, however many links lead to it: a loop of links would not end.
        seen: set[tuple[int, int]] = set()
        pending = [self.folder / name]
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

    def parquet(self) -> list[str]:
        """See `Tree`."""
        found = (path for path in self.folder.rglob("*") if path.suffix.lower() == PARQUET_SUFFIX and path.is_file())
        return sorted(str(path) for path in found if not _is_hidden(path.relative_to(self.folder).as_posix()))


def _list_folder(folder: Path) -> Listing:
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
                elif _has_image_suffix(entry.name):
                    images.append(entry.path)
                else:
                    ignored += 1
    except OSError as error:
        raise GroodError(f"{folder} cannot be read: {error.strerror}") from None
    return Listing(sorted(images), ignored, sorted(folders))


class UrlTree:
    """A folder at a URL, listed once, when it is made.

    Args:
        url: of the folder.

    Attributes:
        stamps: see `stamps_of`, by URL.

    Raises:
        GroodError: if it cannot be listed.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        files, folders = files_below(url)
        self.stamps: dict[str, str] = {}
        # By the relative name of their folder; that of a folder without a file is there, too.
        self._files: dict[str, list[tuple[str, str]]] = {"": []}
        for name in folders:
            if not _is_hidden(name):
                self._files.setdefault(name, [])
        for name, (file, stamp) in files.items():
            if not _is_hidden(name):
                self.stamps[file] = stamp
                self._files.setdefault(name.rpartition("/")[0], []).append((name, file))
        for folder in list(self._files):
            while folder := folder.rpartition("/")[0]:
                self._files.setdefault(folder, [])

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        """See `Tree`."""
        return joined(self.url, name)

    def look(self, name: str = "") -> Listing:
        """See `Tree`."""
        start = f"{name}/" if name else ""
        below = (folder[len(start) :] for folder in self._files if folder.startswith(start) and folder != name)
        folders = sorted({folder.partition("/")[0] for folder in below})
        files = self._files.get(name, [])
        images = sorted(file for relative, file in files if _has_image_suffix(relative))
        return Listing(images, len(files) - len(images), folders)

    def walk(self, name: str = "") -> tuple[list[str], int]:
        """See `Tree`."""
        start = f"{name}/" if name else ""
        images: list[str] = []
        ignored = 0
        for folder in sorted(self._files):
            if folder == name or folder.startswith(start):
                files = self._files[folder]
                found = sorted(file for relative, file in files if _has_image_suffix(relative))
                images += found
                ignored += len(files) - len(found)
        return images, ignored

    def parquet(self) -> list[str]:
        """See `Tree`."""
        files = (entry for entries in self._files.values() for entry in entries)
        return sorted(file for name, file in files if name.lower().endswith(PARQUET_SUFFIX))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _has_image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - ten times faster
