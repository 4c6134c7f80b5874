"""Published figures, as TOML, and how far a benchmark's results are from them.

A file says whose figures they are and of which checkpoints, and has a table for each method, AUROC in per cent as it
was printed (the number of decimals counts):

    name = "openood-v1.5-cifar10"
    benchmark = "cifar10"                   # the spec's name
    source = "OpenOOD v1.5 leaderboard"
    checkpoints = "ResNet-18, 100 epochs, three seeds"
    id_accuracy = "95.06 ± 0.30"
    tolerance = 0.05                        # points, beyond rounding; 0 if left out
    within_std = 4.3                        # a difference of so many published std is none; 2 if left out

    [sets]
    near = { cifar100 = 9000, tin = 7793 }  # images; 0 if not known

    [figures.knn]
    near = "90.64 ± 0.20"
    far = 92.96
    sets = { tin = "91.56 ± 0.26" }

A method's table may also have `method` and `config`, where its key is not a method's name or only some hyper-parameters
are meant, and `source`, `checkpoints`, `id_accuracy` and `note` of its own. `weights_sha256` names the checkpoints
beyond doubt; without it the ID accuracy must agree, since figures of another network say nothing about an
implementation. What cannot be compared is never called off, and never called right.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch_grood.errors import GroodError
from torch_grood.evaluation.results import (
    GROUPS,
    BenchmarkResults,
    Group,
    MethodSummary,
    Spread,
    accuracy_summary,
    summary,
)
from torch_grood.evaluation.tables import Cell, Grid

__all__ = [
    "Deviation",
    "Figure",
    "Published",
    "PublishedMethod",
    "Verdict",
    "deviations_grid",
    "published_names",
    "read_published",
    "verdict",
    "verify",
]

Finding = Literal["agrees", "within tolerance", "within std", "off", "not comparable", "missing"]

_LARGEST = 1 << 20
_PRINTED = re.compile(r"\s*(\d{1,3}(?:\.\d{1,6})?)\s*(?:(?:±|\+-|\+/-)\s*(\d{1,3}(?:\.\d{1,6})?))?\s*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_EPSILON = 1e-9
_NONE = "–"
_NOT_RUN = "not among the methods of the results"


class Figure(NamedTuple):
    """A figure as it was printed, in per cent.

    Attributes:
        value: the mean.
        std: standard deviation over runs, or None.
        decimals: of the value.
    """

    value: float
    std: float | None
    decimals: int

    @property
    def rounding(self) -> float:
        """The largest difference that rounding makes."""
        return 0.5 * 10.0**-self.decimals

    def __str__(self) -> str:
        """As it was printed."""
        std = "" if self.std is None else f" ± {self.std:.{self.decimals}f}"
        return f"{self.value:.{self.decimals}f}{std}"


@dataclass(frozen=True)
class PublishedMethod:
    """The published figures of one method.

    Attributes:
        key: of its table.
        method: name on the command line.
        config: hyper-parameters that a result must have to be held against these figures.
        groups: AUROC of "near" and "far".
        sets: AUROC by key of the set.
        source: whose figures.
        checkpoints: of which networks.
        id_accuracy: of these networks' own labels, or None.
        note: what else is to be known.
    """

    key: str
    method: str
    config: Mapping[str, Any]
    groups: Mapping[Group, Figure]
    sets: Mapping[str, Figure]
    source: str
    checkpoints: str
    id_accuracy: Figure | None = None
    note: str | None = None


@dataclass(frozen=True)
class Published:
    """A file of published figures.

    Attributes:
        name: of the file's figures.
        benchmark: name of the spec.
        source: whose figures.
        checkpoints: of which networks.
        methods: by key of the table.
        tolerance: points that a figure may differ beyond rounding.
        within_std: published standard deviations that a figure may differ.
        id_accuracy: of the networks, or None.
        sets: number of images by group and key of the set, 0 where it is not known; empty: nothing is known.
        weights_sha256: of the checkpoints; empty: not known.
    """

    name: str
    benchmark: str
    source: str
    checkpoints: str
    methods: Mapping[str, PublishedMethod]
    tolerance: float = 0.0
    within_std: float = 2.0
    id_accuracy: Figure | None = None
    sets: Mapping[Group, Mapping[str, int]] = field(default_factory=dict)
    weights_sha256: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Deviation:
    """One published figure beside ours.

    Attributes:
        method: label of our row; the published method's name if we have none.
        scope: "group" or "set".
        where: the group, or the key of the set.
        theirs: the figure as published, in per cent.
        ours: mean and population std over our runs, in per cent; None if there is none.
        finding: "agrees" (to the last printed digit), "within tolerance", "within std", "off", "not comparable" or
            "missing" (on our side).
        reason: why not comparable or missing; what was allowed otherwise.
        source: whose figure.
    """

    method: str
    scope: Literal["group", "set"]
    where: str
    theirs: Figure
    ours: Spread | None
    finding: Finding
    reason: str
    source: str

    @property
    def difference(self) -> float | None:
        """Ours − theirs in points, also where they are not comparable; None if ours is missing."""
        return None if self.ours is None else self.ours.mean - self.theirs.value


class Verdict(NamedTuple):
    """What comes of a verification.

    Attributes:
        is_confirmed: whether something was comparable, and nothing comparable is off.
        text: a line that says so.
    """

    is_confirmed: bool
    text: str


def published_names() -> list[str]:
    """The files that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def read_published(path_or_name: str | os.PathLike[str]) -> Published:
    """Read published figures.

    Args:
        path_or_name: one of `published_names`, or a TOML file.

    Raises:
        GroodError: if there is no such file, or something in it is not as it should be; the place is named.
    """
    if isinstance(path_or_name, str) and path_or_name in published_names():
        content = (_folder() / f"{path_or_name}.toml").read_bytes()
    else:
        content = _content(path_or_name)
    try:
        data = tomllib.loads(content.decode("utf-8"), parse_float=Decimal)
    except (ValueError, RecursionError) as error:
        raise GroodError(f"{path_or_name} is no TOML file: {error or 'nested too deep'}") from None
    return _published(_Table(data, str(path_or_name)))


def verify(results: BenchmarkResults, published: Published) -> list[Deviation]:
    """Hold each published figure against ours.

    Ours is the mean over the runs, in per cent. The difference may be the largest of: what rounding makes; that and
    `tolerance`; `within_std` published standard deviations. Of several methods of ours that a published figure fits,
    the first as given is judged.

    Raises:
        GroodError: if the figures are of another benchmark.
    """
    if results.spec.name != published.benchmark:
        raise GroodError(
            f"{published.name} has figures of the benchmark {published.benchmark}, and the results are of "
            f"{results.spec.name}; give figures of the same benchmark"
        )
    rows = summary(results)
    found: list[Deviation] = []
    for method in published.methods.values():
        ours: list[MethodSummary | None] = [row for row in rows if _is_same(row, method)]
        for place, row in enumerate(ours or [None]):
            # Which of several variants a figure without hyper-parameters means is not known; the best may not choose.
            other = "" if place == 0 or row is None or ours[0] is None else ours[0].label
            found += _deviations(results, published, method, row, other)
    return found


def verdict(deviations: Sequence[Deviation]) -> Verdict:
    """Whether the published figures are confirmed: one at least was comparable, and none of these is off."""
    compared = [one for one in deviations if one.finding not in ("not comparable", "missing")]
    off = [one for one in compared if one.finding == "off"]
    not_run = sum(one.reason == _NOT_RUN for one in deviations)
    others = len(deviations) - len(compared) - not_run
    rest = f"; {others} could not be compared" if others else ""
    rest += f"; {not_run} are of methods that were not run" if not_run else ""
    if not compared:
        reason = next((f": {one.reason}" for one in deviations if one.finding == "not comparable"), "")
        return Verdict(False, f"nothing could be compared{reason}{rest}")
    if not off:
        return Verdict(True, f"all {len(compared)} comparable figures agree{rest}")
    worst = max(off, key=lambda one: abs(one.difference or 0.0))
    text = f"{len(off)} of {len(compared)} comparable figures are off, most of all {worst.method} {worst.where} by "
    return Verdict(False, f"{text}{worst.difference:+.2f}{rest}")


def deviations_grid(deviations: Sequence[Deviation], title: str = "Held against published AUROC, in %") -> Grid:
    """A table, to be printed (`Grid.to_rich`) or written (`Grid.to_markdown`); what is off is bold.

    Published methods that were not run have no row; `verdict` counts them.
    """
    rows = []
    for one in deviations:
        if one.reason == _NOT_RUN:
            continue
        ours, difference = _NONE, _NONE
        if one.ours is not None and one.difference is not None:
            std = "" if one.ours.std is None else f" ± {one.ours.std:.2f}"
            # Of a digit more than printed there, or a difference within rounding could not be seen.
            ours = f"{one.ours.mean:.{max(2, one.theirs.decimals)}f}{std}"
            difference = f"{one.difference:+.{max(2, one.theirs.decimals) + 1}f}"
        bold = one.finding == "off"
        finding = f"{one.finding}: {one.reason}" if one.reason else one.finding
        texts = (one.method, one.where, ours, str(one.theirs), difference, finding)
        rows.append(tuple(Cell(text, bold) for text in texts))
    return Grid(title, ("method", "OOD", "ours", "published", "difference", "finding"), tuple(rows), n_texts=1)


def _is_same(row: MethodSummary, method: PublishedMethod) -> bool:
    """Whether ours has that name and, in all runs, that configuration."""
    return all(
        one.name == method.method
        and all(key in one.config and one.config[key] == value for key, value in method.config.items())
        for one in row.results
    )


def _deviations(
    results: BenchmarkResults,
    published: Published,
    method: PublishedMethod,
    row: MethodSummary | None,
    judged: str,
) -> Iterator[Deviation]:
    other = _other_checkpoints(results, published, method)
    if judged:
        other = f"{judged} is judged, given before this one; to judge this one, state its hyper-parameters as config"
    label = method.key if row is None else row.label
    for group in GROUPS:
        if group in method.groups:
            ours = None if row is None else row.groups.get(group, {}).get("auroc")
            obstacle = _group_obstacle(results, published, group) or other
            yield _deviation(published, method, label, row, "group", group, method.groups[group], ours, obstacle)
    for key, figure in method.sets.items():
        ours = None if row is None else row.sets.get(key, {}).get("auroc")
        obstacle = _set_obstacle(results, published, key) or other
        yield _deviation(published, method, label, row, "set", key, figure, ours, obstacle)


def _deviation(
    published: Published,
    method: PublishedMethod,
    label: str,
    row: MethodSummary | None,
    scope: Literal["group", "set"],
    where: str,
    theirs: Figure,
    share: Spread | None,
    obstacle: str | None,
) -> Deviation:
    def found(ours: Spread | None, finding: Finding, reason: str) -> Deviation:
        return Deviation(label, scope, where, theirs, ours, finding, reason, method.source)

    if share is None:
        return found(None, "missing", _why_missing(row, obstacle))
    ours = Spread(100 * share.mean, None if share.std is None else 100 * share.std, share.n)
    if row is not None and obstacle is None and row.n_done < row.n_runs:
        obstacle = f"it is done in {row.n_done} of {row.n_runs} runs"
    if obstacle is not None:
        return found(ours, "not comparable", obstacle)
    distance = abs(ours.mean - theirs.value) - _EPSILON
    if distance <= theirs.rounding:
        return found(ours, "agrees", "")
    if distance <= theirs.rounding + published.tolerance:
        return found(ours, "within tolerance", f"{published.tolerance:g} points")
    stds = distance / theirs.std if theirs.std else None
    if stds is not None and stds <= published.within_std:
        return found(ours, "within std", f"{stds:.1f} of {published.within_std:g} std")
    return found(ours, "off", f"by {ours.mean - theirs.value:+.2f}" + ("" if stds is None else f", {stds:.1f} std"))


def _why_missing(row: MethodSummary | None, obstacle: str | None) -> str:
    if row is None:
        return _NOT_RUN
    reasons = [f"{one.status}: {one.reason}" for one in row.results if one.status != "done"]
    return reasons[0] if reasons else obstacle or "there is no such figure"


def _group_obstacle(results: BenchmarkResults, published: Published, group: Group) -> str | None:
    found = results.comparable.get(group)
    if found is None:
        return f"the results have no {group} sets"
    if not found.comparable:
        return "; ".join(found.reasons)
    expected = published.sets.get(group)
    if expected is None:
        return None
    ours = {one.key: one.n for one in results.of_role(group)}
    if set(ours) != set(expected):
        return f"the {group} sets are {', '.join(sorted(ours))} here, {', '.join(sorted(expected))} there"
    return next((text for key in ours if (text := _other_count(key, ours[key], expected[key]))), None)


def _set_obstacle(results: BenchmarkResults, published: Published, key: str) -> str | None:
    one = next((one for one in results.of_role("near", "far") if one.key == key), None)
    if one is None:
        return f"the results have no set {key}"
    if not results.is_comparable(one):
        reasons = [reason for found in results.comparable.values() for reason in found.reasons]
        return one.shortfall() if one.status != "complete" else next(iter(reasons), "the ID sets are not complete")
    expected = next((sets[key] for sets in published.sets.values() if key in sets), 0)
    return _other_count(key, one.n, expected)


def _other_count(key: str, ours: int, expected: int) -> str | None:
    return f"{key} has {ours:,} images here, {expected:,} there" if expected not in (0, ours) else None


def _other_checkpoints(results: BenchmarkResults, published: Published, method: PublishedMethod) -> str | None:
    if published.weights_sha256:
        strangers = [run for run in results.runs if run.weights_sha256 not in published.weights_sha256]
        return f"other checkpoints: theirs are {method.checkpoints}" if strangers else None
    theirs = method.id_accuracy
    if theirs is None:
        return None
    ours = 100 * accuracy_summary(results)["classifier"].mean
    allowed = max(theirs.rounding + published.tolerance, published.within_std * (theirs.std or 0.0))
    if abs(ours - theirs.value) - _EPSILON <= allowed:
        return None
    return f"other checkpoints: ID accuracy is {ours:.2f} % here, {theirs} % there ({method.checkpoints})"


def _folder() -> Any:
    return resources.files("torch_grood.evaluation") / "figures"


def _content(path: str | os.PathLike[str]) -> bytes:
    file = Path(path)
    if file.suffix != ".toml" and not file.exists():
        close = difflib.get_close_matches(str(path), published_names(), 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(published_names())}"
        raise GroodError(f"there are no published figures {str(path)!r:.100}; {hint} Or give a TOML file")
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
    except OSError as error:
        raise GroodError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > _LARGEST:
        raise GroodError(f"{path} is larger than {_LARGEST >> 20} MiB; expected a TOML file of published figures")
    return content


def _published(top: _Table) -> Published:
    top.only(
        "name", "benchmark", "source", "checkpoints", "tolerance", "within_std", "id_accuracy", "sets",
        "weights_sha256", "figures",
    )  # fmt: skip
    sets = top.table("sets")
    sets.only(*GROUPS)
    source, checkpoints = top.text("source"), top.text("checkpoints")
    id_accuracy = top.figure("id_accuracy")
    figures = top.table("figures")
    methods = {key: _method(figures.table(key), source, checkpoints, id_accuracy) for key in figures.data}
    if not methods:
        raise GroodError(f"{top.origin}: there are no figures; add a table such as [figures.msp]")
    return Published(
        name=top.text("name"),
        benchmark=top.text("benchmark"),
        source=source,
        checkpoints=checkpoints,
        methods=methods,
        tolerance=top.number("tolerance", 0.0),
        within_std=top.number("within_std", 2.0),
        id_accuracy=id_accuracy,
        sets={group: sets.table(group).counts() for group in GROUPS if group in sets.data},
        weights_sha256=top.hashes("weights_sha256"),
    )


def _method(table: _Table, source: str, checkpoints: str, id_accuracy: Figure | None) -> PublishedMethod:
    table.only(
        "method", "config", *GROUPS, "sets", "source", "checkpoints", "id_accuracy", "note",
    )  # fmt: skip
    groups: dict[Group, Figure] = {}
    for group in GROUPS:
        if (figure := table.figure(group)) is not None:
            groups[group] = figure
    inner = table.table("sets")
    sets = {key: figure for key in inner.data if (figure := inner.figure(key)) is not None}
    if not groups and not sets:
        raise table.error("has no figure; expected near, far or sets")
    return PublishedMethod(
        key=table.key,
        method=table.text("method", table.key),
        config=table.table("config").plain(),
        groups=groups,
        sets=sets,
        source=table.text("source", source),
        checkpoints=table.text("checkpoints", checkpoints),
        id_accuracy=table.figure("id_accuracy") or id_accuracy,
        note=table.text("note", "") or None,
    )


class _Table:
    """A table of the file; its errors name the place."""

    def __init__(self, data: dict[str, Any], origin: str, where: str = "", key: str = "") -> None:
        self.data, self.origin, self.where, self.key = data, origin, where, key

    def error(self, text: str) -> GroodError:
        return GroodError(f"{self.origin}: {f'[{self.where}] ' if self.where else ''}{text}")

    def only(self, *allowed: str) -> None:
        if unknown := [key for key in self.data if key not in allowed]:
            raise self.error(f"unknown key {unknown[0]!r:.80}; expected {', '.join(allowed)}")

    def table(self, key: str) -> _Table:
        found = self.data.get(key, {})
        if not isinstance(found, dict):
            raise self.error(f"{key} is no table")
        return _Table(found, self.origin, f"{self.where}.{key:.80}" if self.where else f"{key:.80}", key)

    def text(self, key: str, default: str | None = None) -> str:
        found = self.data.get(key, default)
        if found is None:
            raise self.error(f"the key {key} is missing; expected a text")
        if not isinstance(found, str) or (not found and found != default):
            raise self.error(f"{key} is {found!r:.80}; expected a text")
        return found

    def number(self, key: str, default: float) -> float:
        found = self.data.get(key, default)
        # Decimal refuses to compare NaN, which TOML has; float does not.
        number = float(found) if type(found) in (int, float, Decimal) else -1.0
        if not 0 <= number <= 100:
            raise self.error(f"{key} is {found!s:.80}; expected a number, 0 to 100")
        return number

    def figure(self, key: str) -> Figure | None:
        """In per cent, a number or a text such as "90.64 ± 0.20"; decimals count as they are written."""
        if key not in self.data:
            return None
        found = self.data[key]
        text = found if isinstance(found, str) else str(found) if type(found) in (int, Decimal) else ""
        match = _PRINTED.fullmatch(text)
        value = Decimal(match[1]) if match else None
        if match is None or value is None or value > 100:
            raise self.error(f'{key} is {found!s:.80}; expected per cent such as 90.64 or "90.64 ± 0.20"')
        decimals = len(match[1].partition(".")[2])
        return Figure(float(value), float(match[2]) if match[2] else None, decimals)

    def counts(self) -> dict[str, int]:
        for key, found in self.data.items():
            if type(found) is not int or found < 0:
                raise self.error(f"{key} is {found!s:.80}; expected a number of images, or 0 if it is not known")
        return dict(self.data)

    def hashes(self, key: str) -> frozenset[str]:
        found = self.data.get(key, [])
        if not isinstance(found, list) or not all(isinstance(one, str) and _SHA256.fullmatch(one) for one in found):
            raise self.error(f"{key} is no list of SHA-256 in 64 hexadecimal digits")
        return frozenset(found)

    def plain(self) -> dict[str, Any]:
        """Free values, to be compared with those of a JSON file."""
        kinds: dict[type, Callable[[Any], Any]] = {str: str, bool: bool, int: int, Decimal: float}
        for key, found in self.data.items():
            if type(found) not in kinds or (isinstance(found, Decimal) and not math.isfinite(float(found))):
                raise self.error(f"{key} is {found!s:.80}; expected a text, a number, true or false")
        return {key: kinds[type(found)](found) for key, found in self.data.items()}
