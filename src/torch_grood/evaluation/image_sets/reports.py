"""What is there of each image set, and why not, where it is absent or broken.

Each set is looked at by itself. Whether a benchmark can be run with what was found is for `resolution` to say.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch_grood.data.sources import ImageSource, read_source
from torch_grood.errors import GroodError
from torch_grood.evaluation.spec import BenchmarkSpec, SetSpec

__all__ = ["Group", "SetReport", "data_root", "survey"]

Group = Literal["id", "val_ood", "near", "far"]
Status = Literal["complete", "incomplete", "absent", "broken"]


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
        source = read_source(path, base, "required" if group == "id" else "none", follow_urls=False)
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
