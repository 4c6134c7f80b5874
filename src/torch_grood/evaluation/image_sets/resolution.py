"""From what was found of each set to a benchmark that can be run, or an error that lists all that stands against it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch_grood.errors import GroodError
from torch_grood.evaluation.image_sets.overlaps import _judge_overlaps, _shorten
from torch_grood.evaluation.image_sets.reports import SetReport, survey
from torch_grood.evaluation.image_sets.resolved import ImageSet, ResolvedSets
from torch_grood.evaluation.spec import BenchmarkSpec

__all__ = ["resolve"]


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
