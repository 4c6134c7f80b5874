"""Image lists: text files of OpenOOD's form, one ``relative/path label`` a line, here or at a URL."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from torch_grood._text import shorten
from torch_grood.data.images import IMAGE_SUFFIXES
from torch_grood.data.urls import is_url, joined, opened, parent_of, stamps_of
from torch_grood.errors import GroodError

__all__ = ["MAX_LABEL", "ImageList", "Labels", "is_list", "read_list"]

Labels = Literal["auto", "required", "none"]

MAX_LABEL = 2**31 - 1
_INTEGER = re.compile(r"[+-]?[0-9]+")


class ImageList(NamedTuple):
    """What a list names.

    Attributes:
        paths: n files or URLs.
        labels: n class numbers, or None.
        stamps: see `torch_grood.data.ImageSource`.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...] | None
    stamps: tuple[str | None, ...] | None


def is_list(file: str) -> bool:
    """Whether a file is text. One with an unknown suffix and binary content is left to `load_image` to judge."""
    if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122 - of a URL, too
        return False
    with _readable(file), opened(file) as stream:
        return b"\0" not in stream.read(4096)


def read_list(file: str, root: str | None, labels: Labels, follow_urls: bool) -> ImageList:
    """The images that a list names; see `torch_grood.data.read_source`.

    Raises:
        GroodError: if a line is broken, or a file is missing.
    """
    with _readable(file), opened(file) as stream:
        text = stream.read().decode("utf-8-sig")
    # Not splitlines(): it also splits at characters that file names may contain.
    entries = [
        _parse_line(line.strip(), file, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()
    ]
    if not entries:
        raise GroodError(f"{file} lists no image; expected lines of the form: relative/path.png 3")
    _check_labels(entries, file, labels)

    names = [path for path, _, _ in entries]
    urls = {name for name in names if is_url(name)}
    if urls and not follow_urls:
        number = next(entry[2] for entry in entries if entry[0] in urls)
        raise GroodError(f"{file}, line {number}: a URL; this list may name files of its folder only")
    base = _find_root([name for name in names if name not in urls], file) if root is None else root
    paths = tuple(name if name in urls else _below(base, name) for name in names)
    stamps = _stamps(paths)
    missing = [
        position
        for position, path in enumerate(paths)
        if not (os.path.isfile(path) if not is_url(path) else stamps and stamps[position])  # noqa: PTH113
    ]
    if missing:
        shown = [f"line {entries[position][2]}: {paths[position]}" for position in missing]
        where = base if is_url(base) else Path(base).absolute()
        raise GroodError(
            f"{file}: {len(missing)} of {len(paths)} listed files are missing under {where} "
            f"({shorten(shown, '; ')}); pass the folder that the paths are relative to as root (--root)"
        )
    numbers = [label for _, label, _ in entries if label is not None]
    found = tuple(numbers) if numbers and labels != "none" else None
    return ImageList(paths, found, stamps)


def _below(base: str, name: str) -> str:
    if is_url(base) and not os.path.isabs(name):  # noqa: PTH117 - a million Paths
        return joined(base, name)
    return os.path.join(base, name)  # noqa: PTH118 - a million Paths


def _stamps(paths: Sequence[str]) -> tuple[str | None, ...] | None:
    """Of what lies at URLs."""
    positions = [position for position, path in enumerate(paths) if is_url(path)]
    if not positions:
        return None
    found: list[str | None] = [None] * len(paths)
    for position, stamp in zip(positions, stamps_of([paths[position] for position in positions]), strict=True):
        found[position] = stamp
    return tuple(found)


def _parse_line(line: str, file: str, number: int) -> tuple[str, int | None, int]:
    """(path, label or None, line number)."""
    if "\0" in line:
        raise GroodError(f"{file}, line {number}: a NUL character; this is not an image list")
    path, _, last = line.replace("\t", " ").rpartition(" ")
    if not _INTEGER.fullmatch(last):
        return line, None, number
    if not path.strip():
        raise GroodError(f"{file}, line {number}: a label but no path: {line!r:.100}; expected: relative/path.png 3")
    if len(last) > len(str(MAX_LABEL)) or not -1 <= int(last) <= MAX_LABEL:
        raise GroodError(f"{file}, line {number}: {last:.30} is no class; expected 0, 1, 2, … or −1 for OOD")
    return line[: len(path)].rstrip(), int(last), number


def _check_labels(entries: Sequence[tuple[str, int | None, int]], file: str, labels: Labels) -> None:
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


def _find_root(relative: Sequence[str], file: str) -> str:
    sample = relative[:: max(1, len(relative) // 20)]
    best, most = "", -1
    for base in _candidate_roots(file):
        paths = [_below(base, path) for path in sample]
        hits = sum(map(bool, stamps_of(paths))) if is_url(base) else sum(map(os.path.isfile, paths))
        # The first of equals is the nearest.
        if hits > most:
            best, most = base, hits
        if hits == len(sample):
            break
    return best


def _candidate_roots(file: str) -> Iterator[str]:
    if is_url(file):
        folders = [parent_of(file)]
        for _ in range(3):
            folders.append(parent_of(folders[-1]))
        for folder in dict.fromkeys(folders):
            yield from (folder, joined(folder, "images_classic"), joined(folder, "images_largescale"))
        return
    here = Path(file).parent
    for base in (here, *here.absolute().parents[:3]):
        yield from (str(base), str(base / "images_classic"), str(base / "images_largescale"))


@contextmanager
def _readable(file: str) -> Iterator[None]:
    """Turns what can go wrong in reading a file into a `GroodError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise GroodError(f"{file} is no UTF-8 text (byte {error.start}); save the image list as UTF-8") from None
    except OSError as error:
        raise GroodError(f"{file} cannot be read: {error.strerror or error}") from None
