"""Files of specs: those of the package, and anybody's own."""

from __future__ import annotations

import hashlib
import re
import tomllib
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from torch_grood.data.transforms import PRESETS, ImageTransform
from torch_grood.errors import GroodError
from torch_grood.evaluation.spec._toml import _Table
from torch_grood.evaluation.spec.records import Archive, BenchmarkSpec, SetSpec

__all__ = ["read_spec", "spec_names"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1_000_000

# As group names of their own, they would be taken for the sets of that name.
_RESERVED = frozenset({"train", "val", "test", "val_ood", "id", "near", "far"})


def spec_names() -> tuple[str, ...]:
    """The built-in benchmarks."""
    return tuple(sorted(file.name.removesuffix(".toml") for file in _built_in().iterdir() if file.name[-5:] == ".toml"))


def read_spec(name_or_path: str | Path) -> BenchmarkSpec:
    """A built-in benchmark by name, or a TOML file.

    Raises:
        GroodError: if it is neither, or the file is not a valid spec; file, table and key are named.
    """
    name = str(name_or_path)
    if name in spec_names():
        return _parse((_built_in() / f"{name}.toml").read_bytes(), f"the built-in spec {name}", None)
    path = Path(name_or_path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is no such file"
        raise GroodError(
            f"{name}: there {kind}, and no built-in benchmark of that name; give a TOML file, or one of "
            f"{', '.join(spec_names())}"
        )
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise GroodError(f"{path} cannot be read: {error.strerror}") from None
    return _parse(content, str(path), path.absolute().parent)


def _built_in() -> Any:
    return resources.files("torch_grood.evaluation") / "specs"


def _parse(content: bytes, origin: str, home: Path | None) -> BenchmarkSpec:
    if len(content) > _MAX_BYTES:
        raise GroodError(f"{origin} is larger than {_MAX_BYTES:,} bytes; a benchmark's spec is a short TOML file")
    try:
        # Editors on Windows put a byte order mark first, which TOML 1.0 does not know.
        data = tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise GroodError(f"{origin} is no UTF-8 text (byte {error.start}); expected a TOML file") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise GroodError(f"{origin} is no valid TOML: {error}") from None
    top = _Table(data, origin, "")
    top.check_keys("name", "title", "reference", "transform", "id", "val_ood", "near", "far", "archives")

    name = top.name("name")
    archives = tuple(_archive(table) for table in top.tables("archives"))
    keys = frozenset(archive.key for archive in archives)
    known = top.table("id", needed=True)
    known.check_keys("train", "val", "test")
    train, test = (_set(known.table(key, needed=True), key, keys) for key in ("train", "test"))
    val, val_ood = (
        _set(table.table(key), key, keys) if key in table else None for table, key in ((known, "val"), (top, "val_ood"))
    )
    near, far = (tuple(_set(table, table.key, keys) for table in top.tables(group)) for group in ("near", "far"))
    _check_ood_names(near, far, origin)
    return BenchmarkSpec(
        name=name,
        title=top.text("title") or name,
        reference=top.text("reference"),
        transform=_transform(top),
        train=train,
        val=val,
        test=test,
        val_ood=val_ood,
        near=near,
        far=far,
        archives=archives,
        digest=hashlib.sha256(content).hexdigest(),
        origin=origin,
        home=home,
    )


def _check_ood_names(near: tuple[SetSpec, ...], far: tuple[SetSpec, ...], origin: str) -> None:
    if not near and not far:
        raise GroodError(
            f"{origin}: no OOD set to test with; add a table such as [near.NAME] or [far.NAME] with a list or a folder"
        )
    for group, found in (("near", near), ("far", far)):
        for one in found:
            if one.key in _RESERVED:
                raise GroodError(f"{origin}: [{group}.{one.key}]: {one.key} is the name of another set; rename it")
    if twice := sorted({one.key for one in near} & {one.key for one in far}):
        raise GroodError(
            f"{origin}: the name {twice[0]} stands for two sets, [near.{twice[0]}] and [far.{twice[0]}]; rename one"
        )


def _transform(top: _Table) -> ImageTransform | None:
    given = top.data.get("transform")
    if given is None:
        return None
    if isinstance(given, str):
        if given not in PRESETS:
            raise top.wrong("transform", f"one of {', '.join(PRESETS)}, or a table [transform]")
        return PRESETS[given]
    fields = top.table("transform").data
    # TOML has no null: a size that is left out stays as the image's own.
    try:
        return ImageTransform.from_dict({"resize": None, "crop": None, **fields})
    except GroodError as error:
        raise GroodError(f"{top.origin}: [transform]: {error}") from None


def _set(table: _Table, key: str, archives: frozenset[str]) -> SetSpec:
    table.check_keys("title", "list", "root", "folder", "count", "archives", "note")
    image_list, folder = table.text("list"), table.text("folder")
    if (image_list is None) == (folder is None):
        got = "both" if folder else "neither"
        raise table.error(f"a set is a list or a folder, this one has {got}; give it one of the keys list and folder")
    if folder is not None and "root" in table:
        raise table.error("root is what a list's paths are relative to; a folder has none. Leave it out")
    needed = table.data.get("archives", [])
    if not isinstance(needed, list) or not all(isinstance(one, str) for one in needed):
        raise table.wrong("archives", "names of archives in brackets")
    if unknown := [one for one in needed if one not in archives]:
        raise table.error(
            f"archives names {unknown[0]!r:.80}, but there is no table [archives.{unknown[0]:.80}]; add it, or leave "
            "the name out"
        )
    return SetSpec(
        key=key,
        title=table.text("title") or key,
        list=image_list,
        root=table.text("root"),
        folder=folder,
        count=table.integer("count"),
        archives=tuple(needed),
        note=table.text("note"),
    )


def _archive(table: _Table) -> Archive:
    table.check_keys("title", "folder", "url", "size", "sha256", "manual")
    folder, url, sha256, manual = table.text("folder"), table.text("url"), table.text("sha256"), table.text("manual")
    if folder is None:
        raise table.error("the key folder is missing; expected what the archive unpacks to, relative to the data root")
    # What was downloaded is moved there, so it must lie under the data root, whoever wrote the spec.
    if not _is_inside(folder):
        raise table.wrong("folder", "a folder under the data root, such as images/flowers, without ..")
    if url is not None and not _is_web(url):
        raise table.wrong("url", "an address that starts with https:// or http://")
    if url is None and manual is None:
        raise table.error(
            "neither url nor manual; give the address of a ZIP file, or tell how its images are placed by hand"
        )
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise table.wrong("sha256", "64 hexadecimal digits in lower case")
    return Archive(table.key, table.text("title") or table.key, folder, url, table.integer("size"), sha256, manual)


def _is_inside(path: str) -> bool:
    """Whether a path stays under the folder that it is relative to, on any system, and is not that folder."""
    parts = PurePosixPath(path).parts
    return bool(parts) and ".." not in parts and "\\" not in path and not _is_rooted(path) and parts[0] != ".downloads"


def _is_rooted(path: str) -> bool:
    return PurePosixPath(path).is_absolute() or bool(PureWindowsPath(path).anchor)


def _is_web(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)
