"""The image sets of a benchmark on this disk: which are there, whether they are what the benchmark means, and no leaks.

`survey` looks at each set by itself and says what it found. `resolve` goes on only with a benchmark that can be run:
figures of another set than the one that everybody else measures with look just as good, so whatever is missing or has
another number of images is an error, or, where that was allowed, stays marked.

A validation image that is also a test image would be measured with after it was chosen with. `find_overlaps` compares
contents, not names: sizes first, and a hash (BLAKE2b) of those files only whose size occurs on both sides.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch_grood.data.sources import ImageSource, read_source
from torch_grood.errors import GroodError
from torch_grood.evaluation.spec import BenchmarkSpec, SetSpec

__all__ = [
    "Group",
    "ImageSet",
    "Overlap",
    "ResolvedSets",
    "SetReport",
    "data_root",
    "find_overlaps",
    "resolve",
    "survey",
]

Group = Literal["id", "val_ood", "near", "far"]
Status = Literal["complete", "incomplete", "absent", "broken"]

_SHOWN = 5
_BLOCK = 1 << 20


@dataclass(frozen=True)
class SetReport:
    """What is there of a set.

    Attributes:
        spec: what should be there.
        group: id, val_ood, near or far.
        source: the images; None if there are none to be used.
        status: "complete": all that the spec asks for; "incomplete": another number of images; "absent": nothing;
            "broken": something, but not in order, such as a list of which some files are missing.
        reason: why it is absent or broken.
    """

    spec: SetSpec
    group: Group
    source: ImageSource | None
    status: Status
    reason: str = ""

    def __str__(self) -> str:
        """The status, with the numbers or the reason."""
        if self.status == "incomplete":
            assert self.source is not None
            assert self.spec.count is not None
            return f"incomplete ({len(self.source):,} of {self.spec.count:,})"
        return f"{self.status} ({self.reason})" if self.reason else self.status


@dataclass(frozen=True)
class ImageSet:
    """A set to work with.

    Attributes:
        spec: what the benchmark says of it.
        group: id, val_ood, near or far.
        source: its images; with labels in group id, without in the others.
    """

    spec: SetSpec
    group: Group
    source: ImageSource

    @property
    def key(self) -> str:
        """Its name in the spec."""
        return self.spec.key

    @property
    def is_complete(self) -> bool:
        """Whether it has as many images as the benchmark asks for, if it asks."""
        return self.spec.count in (None, len(self.source))

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class ResolvedSets:
    """The image sets of a benchmark, ready for use.

    Attributes:
        spec: the benchmark.
        root: what its paths were relative to.
        train: with labels.
        val: with labels, or None if the benchmark has none.
        test: with labels.
        val_ood: None if the benchmark has none, or it was left out.
        near: those that are there.
        far: those that are there.
        left_out: sets that the benchmark has and this disk has not.
        warnings: what a report should say beside the figures.
    """

    spec: BenchmarkSpec
    root: Path
    train: ImageSet
    val: ImageSet | None
    test: ImageSet
    val_ood: ImageSet | None
    near: tuple[ImageSet, ...]
    far: tuple[ImageSet, ...]
    left_out: tuple[SetReport, ...] = ()
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[ImageSet]:
        """All sets, in the order of the spec."""
        single = (self.train, self.val, self.test, self.val_ood)
        yield from (found for found in single if found is not None)
        yield from (*self.near, *self.far)


@dataclass(frozen=True)
class Overlap:
    """An image that stands in two sets, or twice in one.

    Attributes:
        first: a file.
        second: the same file, or one of the same content.
        sets: keys of the sets that they stand in.
    """

    first: str
    second: str
    sets: tuple[str, str]

    def __str__(self) -> str:
        where = f"twice in {self.sets[0]}" if self.sets[0] == self.sets[1] else f"in {self.sets[0]} and {self.sets[1]}"
        return f"{self.first} {where}" + ("" if self.first == self.second else f", there as {self.second}")


def data_root(spec: BenchmarkSpec, given: str | Path | None = None) -> Path:
    """Where the images lie: what was given; else a user's spec stands among its data, and built-in ones have
    $GROOD_DATA or ./data.
    """
    if given is not None:
        return Path(given)
    return spec.home or Path(os.environ.get("GROOD_DATA") or "data").expanduser()


def survey(spec: BenchmarkSpec, root: str | Path, keys: Iterable[str] | None = None) -> tuple[SetReport, ...]:
    """What is there of each set, in the order of the spec.

    Args:
        spec: the benchmark.
        root: what its paths are relative to.
        keys: look at these sets only.

    Raises:
        GroodError: if the benchmark has no set of one of these names.
    """
    sets = spec.sets()
    if keys is not None:
        wanted = set(keys)
        names = [found.key for _, found in sets]
        if unknown := sorted(wanted - set(names)):
            raise GroodError(f"{spec.name} has no set {unknown[0]!r}; it has {', '.join(names)}")
        sets = tuple((group, found) for group, found in sets if found.key in wanted)
    return tuple(_look_at(found, group, Path(root)) for group, found in sets)  # type: ignore[arg-type]


def _look_at(spec: SetSpec, group: Group, root: Path) -> SetReport:
    """What is there of one set."""
    path = root / (spec.list or spec.folder or "")
    base = None if spec.root is None else root / spec.root
    try:
        source = read_source(path, base, "required" if group == "id" else "none")
        if spec.list is not None:
            _check_list(spec, source, base)
    except GroodError as error:
        if spec.list is not None:
            absent = "" if _any_listed(path, base) else _absence(path, base)
        else:
            absent = "" if any(files for _, _, files in os.walk(path)) else f"nothing in {path}"
        return SetReport(spec, group, None, "absent" if absent else "broken", absent or str(error))
    return SetReport(spec, group, source, "complete" if spec.count in (None, len(source)) else "incomplete")


def _absence(path: Path, base: Path | None) -> str:
    if not path.is_file():
        return f"no list {path}"
    return f"none of the images that {path} lists" + (f" in {base}" if base else "")


def _any_listed(path: Path, base: Path | None) -> bool:
    """Whether some image of a list is there, however the list is written: then a missing one is no absent set."""
    if not path.is_file():
        return False
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return True
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    folder = str(path.parent if base is None else base)
    # A line without a label is a path as a whole.
    return not lines or any(
        "\0" not in line and (os.path.isfile(os.path.join(folder, name)))  # noqa: PTH113, PTH118 - a million lines
        for line in lines
        for name in (line.replace("\t", " ").rpartition(" ")[0].rstrip(), line)
        if name
    )


def _check_list(spec: SetSpec, source: ImageSource, base: Path | None) -> None:
    """A list that came from the network has no business outside the folder of its images."""
    if not spec.archives or base is None:
        return
    prefix = os.path.join(base, "")  # noqa: PTH118 - with a slash at the end
    for path in source.paths:
        if not path.startswith(prefix) or ".." in path[len(prefix) :].replace("\\", "/").split("/"):
            raise GroodError(f"{source.origin} lists {path!r:.200}, which does not lie under {base}; get the list anew")


def resolve(spec: BenchmarkSpec, root: str | Path, allow_missing: bool = False) -> ResolvedSets:
    """The image sets of a benchmark, checked.

    Args:
        spec: the benchmark.
        root: what its paths are relative to.
        allow_missing: go on without OOD sets that are not there, and with sets of another number of images; both stay
            marked. ID sets must be there in any case, and nothing may be broken.

    Raises:
        GroodError: if sets are missing, broken, or have another number of images; all are listed. If the class folders
            of the ID sets differ, or a validation image is a test image.
    """
    root = Path(root)
    reports = survey(spec, root)
    bad = [report for report in reports if not _may_pass(report, allow_missing)]
    if bad:
        listed = "".join(f"\n  {report.spec.key} ({report.group}): {report}" for report in bad)
        rest = "" if allow_missing else _allow_hint(bad)
        raise GroodError(
            f"{spec.name}: {len(bad)} of {len(reports)} image sets under {root} cannot be used as they are:{listed}\n  "
            f"see what is needed, and where it comes from: {_command(spec, root)}{rest}"
        )
    found = {
        (report.group, report.spec.key): ImageSet(report.spec, report.group, report.source)
        for report in reports
        if report.source is not None
    }
    warnings = [
        f"{report.spec.key} has {len(report.source or ()):,} images instead of {report.spec.count:,}: its figures "
        "cannot be compared with published ones"
        for report in reports
        if report.status == "incomplete"
    ]
    left_out = tuple(report for report in reports if report.source is None)
    if left_out:
        keys = ", ".join(report.spec.key for report in left_out)
        warnings.append(f"left out, because they are not there: {keys}; means of their groups are not comparable")
    resolved = ResolvedSets(
        spec=spec,
        root=root,
        train=found["id", "train"],
        val=found.get(("id", "val")),
        test=found["id", "test"],
        val_ood=found.get(("val_ood", "val_ood")),
        near=tuple(one for (group, _), one in found.items() if group == "near"),
        far=tuple(one for (group, _), one in found.items() if group == "far"),
        left_out=left_out,
    )
    if not resolved.near and not resolved.far:
        raise GroodError(f"{spec.name}: none of its OOD test sets is under {root}; see {_command(spec, root)}")
    _check_class_names(resolved)
    return replace(resolved, warnings=(*warnings, *_judge_overlaps(resolved)))


def _may_pass(report: SetReport, allow_missing: bool) -> bool:
    if report.status == "complete":
        return True
    return allow_missing and (report.status == "incomplete" or (report.status == "absent" and report.group != "id"))


def _allow_hint(bad: Sequence[SetReport]) -> str:
    """That one can go on without, if one can."""
    if all(_may_pass(report, True) for report in bad):
        return "; or go on with what is there (allow_missing, --allow-missing), and get figures that are not comparable"
    return ""


def _command(spec: BenchmarkSpec, root: Path) -> str:
    name = spec.name if spec.home is None else spec.origin
    return f"grood data {shlex.quote(name)} --root {shlex.quote(str(root))}"


def _check_class_names(resolved: ResolvedSets) -> None:
    """The same number must mean the same class in all ID sets."""
    classes = resolved.train.source.classes
    for other in (resolved.val, resolved.test):
        if other is None or classes is None or other.source.classes in (None, classes):
            continue
        theirs = other.source.classes or ()
        only = sorted(set(classes) ^ set(theirs))
        raise GroodError(
            f"{resolved.spec.name}: the class folders of train and {other.key} differ: {_shorten(only)} only in one of "
            f"{resolved.train.source.origin} and {other.source.origin}; give both the same classes, or use image lists"
        )


def _judge_overlaps(resolved: ResolvedSets) -> list[str]:
    """Raise on images that would leak from validation into testing; words for what need not stop a benchmark."""
    overlaps = find_overlaps(resolved)
    across = [overlap for overlap in overlaps if overlap.sets[0] != overlap.sets[1]]
    twice = [overlap for overlap in overlaps if overlap.sets[0] == overlap.sets[1]]
    # A published benchmark stays what it is: CIFAR-100's test images hold a few pairs of equal ones, and OpenOOD cuts
    # its validation images out of them. The same file in both lists is no such accident.
    leaks = [overlap for overlap in across if resolved.spec.home is not None or overlap.first == overlap.second]
    if leaks:
        listed = "".join(f"\n  {overlap}" for overlap in leaks[:_SHOWN])
        raise GroodError(
            f"{resolved.spec.name}: {len(leaks)} validation images are also test images:{listed}"
            f"{chr(10) + '  …' if len(leaks) > _SHOWN else ''}\n  "
            "what a method was chosen with must not measure it; take them out of one of the sets"
        )
    warnings = []
    if across:
        warnings.append(
            f"{len(across)} test images equal a validation image, as the benchmark has it: "
            f"{_shorten([str(one) for one in across], '; ')}"
        )
    for key in dict.fromkeys(overlap.sets[0] for overlap in twice):
        images = [overlap.first for overlap in twice if overlap.sets[0] == key]
        warnings.append(f"{key} lists {len(images)} images more than once: {_shorten(images)}")
    return warnings


def find_overlaps(resolved: ResolvedSets) -> tuple[Overlap, ...]:
    """Test images that are also validation images, byte for byte, and images that a list names twice.

    Raises:
        GroodError: if a file cannot be read.
    """
    found = [Overlap(path, path, (one.key, one.key)) for one in resolved for path in _named_twice(one.source.paths)]
    validation = [one for one in (resolved.val, resolved.val_ood) if one is not None]
    tests = [resolved.test, *resolved.near, *resolved.far]
    by_size: dict[int, list[tuple[str, str]]] = {}
    for one in validation:
        for path in dict.fromkeys(one.source.paths):
            by_size.setdefault(_size(path), []).append((path, one.key))
    # Hashes of validation images of a size, once a test image has it.
    hashes: dict[int, dict[bytes, tuple[str, str]]] = {}
    for one in tests:
        for path in dict.fromkeys(one.source.paths):
            size = _size(path)
            # Empty files are broken downloads, not images that leak.
            if size == 0 or size not in by_size:
                continue
            if size not in hashes:
                hashes[size] = {_hash(first): (first, key) for first, key in reversed(by_size[size])}
            match = hashes[size].get(_hash(path))
            if match is not None:
                found.append(Overlap(match[0], path, (match[1], one.key)))
    return tuple(found)


def _named_twice(paths: Sequence[str]) -> list[str]:
    if len(set(paths)) == len(paths):
        return []
    seen: set[str] = set()
    twice = [path for path in paths if path in seen or seen.add(path)]  # type: ignore[func-returns-value]
    return list(dict.fromkeys(twice))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a million Paths
    except OSError as error:
        raise GroodError(f"{path} cannot be read: {error.strerror}") from None


def _hash(path: str) -> bytes:
    state = hashlib.blake2b(digest_size=32)
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a million Paths
            while block := file.read(_BLOCK):
                state.update(block)
    except OSError as error:
        raise GroodError(f"{path} cannot be read: {error.strerror}") from None
    return state.digest()


def _shorten(items: Sequence[str], separator: str = ", ") -> str:
    return separator.join(items[:_SHOWN]) + (f"{separator}…" if len(items) > _SHOWN else "")
