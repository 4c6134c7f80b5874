"""The content-keyed feature store: what a model says of image files, kept in a folder between runs.

    DIR/<sha256 of the key>/key.json     the key, for people
                            probe.safetensors, features-….safetensors, content-….safetensors, sums-….safetensors

The key is all that the features depend on: the model's weights, head, dtype and kind of device, the classes left out,
the transform, the batch size, and each file's path below the folder that they have in common, its size, time and label
(for files at URLs: what the file system tells of them, as it was when they were listed; for rows: that of their file).
A changed key is another entry; nothing is ever taken from a wrong one. What the key cannot tell, the code of the model
and of the libraries, is probed: the features of the first image are computed anew in each run and compared.

Files are safetensors with checksums, written whole or not at all; names in the folder are hashes and numbers, and no
path that a file holds is opened. An entry may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_grood import container
from torch_grood._files import replacing
from torch_grood.data.cache_entry import CacheEntry
from torch_grood.data.dataset import ImageLoader
from torch_grood.data.journal import CONTAINER_VERSION, DAY
from torch_grood.data.parquet import ParquetRows
from torch_grood.data.sources import ImageSource
from torch_grood.data.urls import is_url
from torch_grood.errors import FormatError, GroodError
from torch_grood.features import Extraction

__all__ = ["FeatureCache"]

_log = logging.getLogger("torch_grood")

_FORMAT = 1
# Another machine or version of PyTorch rounds otherwise; another network is farther off.
_SAME_MODEL = 1e-2


@dataclass(frozen=True)
class FeatureCache:
    """Keeps features in a folder; `GROOD.fit` and `GROOD.calibrate` take it as `cache`.

    Several processes may use one folder at a time. What is killed loses the shard that was under way.

    Args:
        folder: made if it is absent.
        shard_images: a shard, one file, is written after this many images,
        shard_bytes: or with this many bytes of features,
        shard_seconds: or after this time.

    Raises:
        GroodError: if the folder cannot be made, or a number is out of range.
    """

    folder: str | os.PathLike[str]
    shard_images: int = 2048
    shard_bytes: int = 64 * 2**20
    shard_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("shard_images", "shard_bytes", "shard_seconds"):
            if not getattr(self, name) > 0:
                raise GroodError(f"{name} must be more than 0, got {getattr(self, name)!r}")
        _make_folder(Path(self.folder))

    def first_image(self, loader: Any) -> Tensor:
        """The first image that the loader will deliver, (1, 3, H, W).

        Raises:
            GroodError: if the loader does not know its files, or none can be read.
        """
        if not isinstance(loader, ImageLoader):
            raise GroodError(
                "a feature cache must know the files that images come from, to tell when they change: pass a loader of "
                f"torch_grood.data.image_loader, not {type(loader).__name__}, or leave the cache out"
            )
        return loader.first_image()

    def open(self, loader: ImageLoader, key: Mapping[str, Any], probe: Extraction) -> CacheEntry:
        """The entry of a loader's images under the given key; see `torch_grood.feature_store.FeatureStore`.

        Raises:
            GroodError: if it cannot be made, or is of a model that says something else of the first image.
        """
        key = {**key, **_key_of(loader, key.get("left_out", ()))}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        folder, shown = Path(self.folder) / name, {**key, "origin": loader.dataset.source.origin}
        if not folder.exists():
            _say_what_differs(Path(self.folder), shown)
        _make_folder(folder)
        _remove_litter(folder)
        if not (folder / "key.json").exists():
            with replacing(folder / "key.json") as temporary:
                temporary.write_text(json.dumps(shown, indent=1) + "\n", encoding="utf-8")
        _check_probe(folder, name, probe)
        return CacheEntry(folder, name, loader, self.shard_images, self.shard_bytes, self.shard_seconds)


def _key_of(loader: ImageLoader, left_out: Sequence[int]) -> dict[str, Any]:
    """What the features depend on in the loader; only labels that occur can be left out."""
    dataset = loader.dataset
    return {
        "format": _FORMAT,
        "transform": dataset.transform.to_dict(),
        "batch_size": loader.batch_size,
        "n_files": len(dataset),
        "files": _hash_of_files(dataset.source),
        "left_out": sorted(set(left_out) & set(dataset.source.labels or ())),
    }


def _hash_of_files(source: ImageSource) -> str:
    """SHA-256 of path, size, time of change and label of each file, in order; stamps stand for what is elsewhere."""
    if source.rows is not None:
        return _hash_of_rows(source.rows, source.labels)
    start = _common_folder(min(source.paths), max(source.paths))
    digest = hashlib.sha256()
    for position, path in enumerate(source.paths):
        stamp = None if source.stamps is None else source.stamps[position]
        if stamp is None:
            try:
                status = os.stat(path)  # noqa: PTH116 - a million Paths
                size, changed = status.st_size, status.st_mtime_ns
            except OSError:
                # To read it will be an error of its own.
                size = changed = -1
            stamp = f"{size}\0{changed}"
        label = "" if source.labels is None else source.labels[position]
        line = f"{path[start:]}\0{stamp}\0{label}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _hash_of_rows(rows: ParquetRows, labels: Sequence[int] | None) -> str:
    start = _common_folder(min(rows.files), max(rows.files))
    digest = hashlib.sha256(repr(("rows", rows.image, rows.start, rows.stop)).encode())
    for file, groups, stamp in zip(rows.files, rows.groups, rows.stamps, strict=True):
        digest.update(f"{file[start:]}\0{stamp}\0{sum(groups)}\n".encode("utf-8", "surrogateescape"))
    digest.update(repr(labels).encode())
    return digest.hexdigest()


def _common_folder(one: str, other: str) -> int:
    """Length of the folder's path, with its separator, that two files have in common."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    separator = "/" if is_url(one) else os.sep
    return one.rfind(separator, 0, same) + 1


def _check_probe(folder: Path, name: str, probe: Extraction) -> None:
    """Compare what the model says of the first image with what it said when the entry was made.

    Raises:
        GroodError: if that is something else.
    """
    path, now = folder / "probe.safetensors", {"features": probe.features.cpu(), "logits": probe.logits.cpu()}
    try:
        found = container.read(path, CONTAINER_VERSION)
        if found.header.get("entry") != name:
            raise FormatError("it belongs to another entry")
        then = found.tensors
    except FormatError:
        container.write(path, {"format_version": CONTAINER_VERSION, "entry": name}, now)
        return
    if all(name in then and torch.equal(then[name], tensor) for name, tensor in now.items()):
        return
    differences = [_relative_difference(then.get(name), tensor) for name, tensor in now.items()]
    if not max(differences) <= _SAME_MODEL:
        raise GroodError(
            f"{folder} holds features of the same weights and files, but of the first image the model now has others "
            f"(relative difference {max(differences):.2g}): its code, or how images are read, has changed. Choose "
            "another cache folder, or delete this one."
        )
    _log.warning(
        "the features in %s were computed with another rounding (another machine, number of threads or version of "
        "PyTorch): what is computed from them may differ in the last digits from a run without interruption",
        folder,
    )


def _relative_difference(then: Tensor | None, now: Tensor) -> float:
    if then is None or then.shape != now.shape:
        return math.inf
    return float((then.double() - now.double()).norm() / now.double().norm().clamp(min=1e-300))


def _say_what_differs(cache: Path, key: Mapping[str, Any]) -> None:
    """Tell of entries that differ in one thing only, perhaps by mistake."""
    for path in sorted(cache.glob("*/key.json")):
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name, value in key.items() if other.get(name) != value]
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if len(differing) == 1:
            name = differing[0]
            what = "" if name in ("weights", "files") else f": {other.get(name)!r:.60}, now {key[name]!r:.60}"
            _log.info("the cache has an entry that differs in %s only%s; it is not used", name, what)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GroodError(
            f"the cache folder {folder} cannot be made: {error.strerror or error}; choose another"
        ) from None


def _remove_litter(folder: Path) -> None:
    """Delete temporary files that a killed run left; those of runs under way are younger."""
    for path in folder.glob(".*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > DAY:
                path.unlink()
