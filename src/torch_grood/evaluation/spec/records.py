"""A benchmark as data: its image sets, and the archives that they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch_grood.data.transforms import ImageTransform

__all__ = ["Archive", "BenchmarkSpec", "SetSpec"]


@dataclass(frozen=True)
class Archive:
    """A ZIP file that fills one folder of the data root.

    Attributes:
        key: its name in the spec.
        title: for people.
        folder: what it unpacks to, relative to the data root.
        url: where it can be fetched, http(s); None if it may not.
        size: of the file in bytes, about; None if not known.
        sha256: of the file, in hex; None if nobody publishes one.
        manual: how to place the images by hand; always there without a url.
    """

    key: str
    title: str
    folder: str
    url: str | None = None
    size: int | None = None
    sha256: str | None = None
    manual: str | None = None


@dataclass(frozen=True)
class SetSpec:
    """An image set: a list or a folder, one of the two.

    Attributes:
        key: its name: train, val, test, val_ood, or what the spec calls an OOD set.
        title: for people.
        list: an image list, relative to the data root.
        root: what the list's paths are relative to, itself relative to the data root; None looks near the list.
        folder: a class folder, or for OOD sets any folder, relative to the data root.
        count: images it must have for figures to be comparable with others'; None if there is no such number.
        archives: keys of the archives that it needs.
        note: a peculiarity worth knowing.
    """

    key: str
    title: str
    list: str | None = None
    root: str | None = None
    folder: str | None = None
    count: int | None = None
    archives: tuple[str, ...] = ()
    note: str | None = None


@dataclass(frozen=True)
class BenchmarkSpec:
    """A benchmark, as its file describes it.

    Attributes:
        name: letters, digits, hyphens and underscores.
        title: for people.
        reference: where it comes from.
        transform: the preprocessing of all sets; None leaves it to the model.
        train: labelled ID images to fit on.
        val: labelled ID images to calibrate and choose on, or None.
        test: labelled ID images to measure with.
        val_ood: real outliers that a method may be fitted on, or None.
        near: OOD test sets that resemble the ID images.
        far: OOD test sets that do not.
        archives: where images come from.
        digest: SHA-256 of the file, in hex.
        origin: the file, for messages.
        home: the folder of a user's file; None if the spec is built in.
    """

    name: str
    title: str
    reference: str | None
    transform: ImageTransform | None
    train: SetSpec
    val: SetSpec | None
    test: SetSpec
    val_ood: SetSpec | None
    near: tuple[SetSpec, ...]
    far: tuple[SetSpec, ...]
    archives: tuple[Archive, ...]
    digest: str
    origin: str
    home: Path | None = None

    def sets(self) -> tuple[tuple[str, SetSpec], ...]:
        """All sets, each with its group: id, val_ood, near or far."""
        single = (("id", self.train), ("id", self.val), ("id", self.test), ("val_ood", self.val_ood))
        return (
            *((group, found) for group, found in single if found is not None),
            *(("near", found) for found in self.near),
            *(("far", found) for found in self.far),
        )

    def archive(self, key: str) -> Archive:
        """The archive of that key."""
        return next(archive for archive in self.archives if archive.key == key)
