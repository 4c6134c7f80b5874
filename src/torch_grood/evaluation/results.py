"""What a benchmark found, as data: ``results.json``.

    BenchmarkResults ─┬─ spec, versions, settings, sets         what was measured, and with what
                      ├─ runs: one checkpoint or seed each ── methods ─┬─ figures  of each OOD set
                      │                                                └─ groups   near and far: unweighted means
                      └─ comparisons: paired tests of two methods

All shares lie in 0…1 here; tables print per cent. The reader is strict: a file that was cut, edited by hand into
something impossible (a mean that is not the mean), or written by a newer version is an error and not a table.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from torch_grood._files import replacing
from torch_grood.errors import GroodError
from torch_grood.evaluation._records import decoded, encoded, json_data, parsed

__all__ = [
    "FIGURES",
    "GROUPS",
    "OPENOOD_FIGURES",
    "SCHEMA_VERSION",
    "Accuracy",
    "BenchmarkResults",
    "Comparability",
    "Comparison",
    "Extraction",
    "GroupFigures",
    "MethodResult",
    "MethodSummary",
    "OpenOODFigures",
    "Run",
    "SearchPoint",
    "Seconds",
    "SetFigures",
    "SetInfo",
    "SpecInfo",
    "Spread",
    "accuracy_summary",
    "comparability",
    "read_results",
    "summary",
    "write_results",
]

SCHEMA_VERSION = 1
FIGURES = ("auroc", "ood_accepted_at_95_id_kept", "id_flagged_at_95_ood_caught", "aupr_ood", "aupr_id")
OPENOOD_FIGURES = ("fpr95", "auroc", "aupr_in", "aupr_out")
GROUPS: tuple[Group, ...] = ("near", "far")

Group = Literal["near", "far"]
Role = Literal["train", "val", "test", "val_ood", "near", "far"]
Interval = tuple[float, float]

_LARGEST = 256 << 20
# Means are taken again on reading; they may round differently, no more.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class SpecInfo:
    """The benchmark.

    Attributes:
        name: e.g. "cifar10".
        title: for people.
        digest: SHA-256 of its file.
    """

    name: str
    title: str
    digest: str


@dataclass(frozen=True)
class SetInfo:
    """One image set of the benchmark, also one that was not there.

    Attributes:
        key: its name in `MethodResult.figures`; near and far sets have different ones.
        title: for people.
        role: what it served for.
        n: images used.
        expected: images that the benchmark asks for, if it asks.
        status: "complete", "incomplete" (another number of images) or "absent".
        reason: why not complete, if there is more to say than the numbers.
        list_sha256: digest of the images' content; None if absent.
    """

    key: str
    title: str
    role: Role
    n: int
    expected: int | None = None
    status: Literal["complete", "incomplete", "absent"] = "complete"
    reason: str | None = None
    list_sha256: str | None = None

    def __post_init__(self) -> None:
        if not self.key:
            raise GroodError("an image set has an empty key; give it a name")
        if self.n < 0 or (self.n == 0) != (self.status == "absent"):
            raise GroodError(f"{self.key} is {self.status} with {self.n} images; only an absent set has none")
        if self.status == "complete" and self.expected not in (None, self.n):
            raise GroodError(f"{self.key} is called complete with {self.n} of {self.expected} images")

    def shortfall(self) -> str:
        """What there is of a set that is not complete, e.g. "MNIST: 10,000 of 70,000 images"."""
        found = f"{self.n:,} images" if self.expected is None else f"{self.n:,} of {self.expected:,} images"
        return f"{self.title}: {'absent' if self.status == 'absent' else found}" + (
            f" ({self.reason})" if self.reason else ""
        )


@dataclass(frozen=True)
class Comparability:
    """Whether a group's means may stand beside other people's.

    Attributes:
        comparable: if there is no reason against it.
        reasons: against it.
    """

    comparable: bool
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.comparable == bool(self.reasons):
            raise GroodError(f"comparable is {self.comparable} with {len(self.reasons)} reasons; give one if it is not")


@dataclass(frozen=True)
class Accuracy:
    """Shares of the ID test set that are labelled right.

    Attributes:
        classifier: by the network's own labels.
        prototype: by the nearest class prototype; None if there are none.
    """

    classifier: float
    prototype: float | None = None

    def __post_init__(self) -> None:
        _check_shares({"classifier": self.classifier, "prototype": self.prototype})


@dataclass(frozen=True)
class Extraction:
    """The one pass over all images.

    Attributes:
        seconds: wall time.
        images: all of them.
        images_from_cache: those that the network did not see again.
    """

    seconds: float
    images: int
    images_from_cache: int = 0

    def __post_init__(self) -> None:
        _check_seconds(seconds=self.seconds)
        if not 0 <= self.images_from_cache <= self.images:
            raise GroodError(f"{self.images_from_cache} of {self.images} images came from the cache")


@dataclass(frozen=True)
class Seconds:
    """Wall time of a method.

    Attributes:
        fit: on the training outputs.
        score: all test sets.
        choose: trying hyper-parameters.
    """

    fit: float
    score: float
    choose: float = 0.0

    def __post_init__(self) -> None:
        _check_seconds(fit=self.fit, score=self.score, choose=self.choose)


@dataclass(frozen=True)
class SearchPoint:
    """One choice of hyper-parameters that was tried.

    Attributes:
        config: the choice.
        value: AUROC on what was chosen on; None if it could not be tried.
        reason: why not.
    """

    config: Mapping[str, Any]
    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", json_data(self.config, "config"))
        _check_shares({"value": self.value})


@dataclass(frozen=True)
class OpenOODFigures:
    """What OpenOOD prints for the same scores; see `openood_metrics`. Of a group: the means.

    Attributes:
        fpr95: share of ID flagged when 95 % of OOD is caught.
        auroc: area under the ROC curve.
        aupr_in: trapezoidal area, ID as the positive class.
        aupr_out: trapezoidal area, OOD as the positive class.
    """

    fpr95: float
    auroc: float
    aupr_in: float
    aupr_out: float

    def __post_init__(self) -> None:
        _check_shares(vars(self))


@dataclass(frozen=True)
class _Figures:
    """See `DetectionMetrics` for the figures; `intervals` has some of them by name: (low, high)."""

    auroc: float
    ood_accepted_at_95_id_kept: float
    id_flagged_at_95_ood_caught: float
    aupr_ood: float
    aupr_id: float
    openood: OpenOODFigures

    def value(self, figure: str) -> float:
        """A figure by its name in `FIGURES`."""
        found: float = getattr(self, figure)
        return found

    def _check(self, intervals: Mapping[str, Interval]) -> None:
        _check_shares({figure: self.value(figure) for figure in FIGURES})
        for figure, interval in intervals.items():
            if figure not in FIGURES:
                raise GroodError(f"there is an interval of {figure!r:.80}; expected {', '.join(FIGURES)}")
            _check_interval(interval, 0.0, figure)


@dataclass(frozen=True)
class SetFigures(_Figures):
    """One method on one OOD set against the ID test set.

    Attributes:
        auroc, ood_accepted_at_95_id_kept, id_flagged_at_95_ood_caught, aupr_ood, aupr_id: see `DetectionMetrics`.
        openood: the same scores by OpenOOD's definitions.
        n_id, n_ood: number of scores.
        intervals: 95 %, (low, high) of some figures.
    """

    n_id: int
    n_ood: int
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check(self.intervals)
        if self.n_id < 1 or self.n_ood < 1:
            raise GroodError(f"figures of {self.n_id} ID and {self.n_ood} OOD scores; expected one of each at least")


@dataclass(frozen=True)
class GroupFigures(_Figures):
    """One method on the near or far sets: unweighted means of the sets' figures, as OpenOOD takes them.

    Attributes:
        auroc, ood_accepted_at_95_id_kept, id_flagged_at_95_ood_caught, aupr_ood, aupr_id, openood: means.
        comparable: whether they may stand beside other people's.
        sets: keys of the sets.
        intervals: 95 %, (low, high) of some means.
    """

    comparable: bool
    sets: tuple[str, ...]
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check(self.intervals)
        if not self.sets or len(set(self.sets)) < len(self.sets):
            raise GroodError(f"a mean over the sets {list(self.sets)}; expected one at least, and none twice")

    @classmethod
    def of(
        cls, sets: Mapping[str, SetFigures], comparable: bool, intervals: Mapping[str, Interval] | None = None
    ) -> Self:
        """The means over some sets.

        Raises:
            GroodError: if there is no set.
        """
        if not sets:
            raise GroodError("there is no set to take a mean over; leave the group out")
        found = list(sets.values())
        return cls(
            **{figure: _mean(one.value(figure) for one in found) for figure in FIGURES},
            openood=OpenOODFigures(
                **{name: _mean(getattr(one.openood, name) for one in found) for name in OPENOOD_FIGURES}
            ),
            comparable=comparable,
            sets=tuple(sets),
            intervals=dict(intervals or {}),
        )


@dataclass(frozen=True)
class MethodResult:
    """What became of one method in one run.

    Attributes:
        name: on the command line, e.g. "knn".
        label: the row's name, as it was asked for and the same in all runs, e.g. "KNN (k = 200)".
        config: the hyper-parameters that the figures come from, also those that a search chose.
        status: "done"; "unavailable": the classifier or the data lack what it needs; "failed".
        reason: why not done.
        chosen_by: what hyper-parameters were chosen on; None if they were given.
        search: what was tried.
        warnings: for the reader of the figures.
        uses_ood_data: whether it saw real outliers, in fitting or in the choice.
        seconds: None if not done.
        figures: by key of the OOD set; all that are there.
        groups: of "near" and "far", those that have a set.
    """

    name: str
    label: str
    config: Mapping[str, Any]
    status: Literal["done", "unavailable", "failed"] = "done"
    reason: str | None = None
    chosen_by: str | None = None
    search: tuple[SearchPoint, ...] = ()
    warnings: tuple[str, ...] = ()
    uses_ood_data: bool = False
    seconds: Seconds | None = None
    figures: Mapping[str, SetFigures] = field(default_factory=dict)
    groups: Mapping[Group, GroupFigures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", json_data(self.config, f"config of {self.label}"))
        if not self.name or not self.label:
            raise GroodError("a method needs a name and a label")
        if self.status == "done":
            if self.reason is not None or not self.figures:
                raise GroodError(f"{self.label} is done, so it has figures and no reason why not")
        elif not self.reason or self.figures or self.groups:
            raise GroodError(f"{self.label} is {self.status}, so it has a reason and no figures")
        for group, means in self.groups.items():
            self._check_means(group, means)

    def _check_means(self, group: Group, means: GroupFigures) -> None:
        if unknown := [key for key in means.sets if key not in self.figures]:
            raise GroodError(f"{self.label}: the {group} means take in {unknown[0]}, which has no figures")
        again = GroupFigures.of({key: self.figures[key] for key in means.sets}, means.comparable)
        pairs = [(figure, again.value(figure), means.value(figure)) for figure in FIGURES]
        pairs += [
            (f"openood.{figure}", getattr(again.openood, figure), getattr(means.openood, figure))
            for figure in OPENOOD_FIGURES
        ]
        for figure, expected, given in pairs:
            if abs(expected - given) > _ROUNDING:
                raise GroodError(f"{self.label}: {group} {figure} is {given}, but the mean of its sets is {expected}")


@dataclass(frozen=True)
class Run:
    """One checkpoint, or one seed.

    Attributes:
        weights: name of the file; None: as the model is made.
        weights_sha256: of the weights; None if not known.
        seed: of what is random in methods.
        accuracy: on the ID test set.
        extraction: what the pass over the images took.
        methods: in the order given.
        peak_memory_bytes: of the process; None if not known.
    """

    weights: str | None
    weights_sha256: str | None
    seed: int
    accuracy: Accuracy
    extraction: Extraction
    methods: tuple[MethodResult, ...]
    peak_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        labels = [method.label for method in self.methods]
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise GroodError(f"two methods of a run are called {twice!r}; their rows could not be told apart")

    def method(self, label: str) -> MethodResult | None:
        """The method of that label, if the run has it."""
        return next((method for method in self.methods if method.label == label), None)


@dataclass(frozen=True)
class Comparison:
    """A paired test of two methods on the same images.

    Attributes:
        run: position in `BenchmarkResults.runs`.
        group: whose mean AUROC is compared.
        method_a, method_b: labels.
        difference: a − b.
        interval: 95 %, of the difference.
        p: two-sided, of no difference.
        p_holm: corrected for all tests of its table.
        test: "DeLong", or what it was.
    """

    run: int
    group: Group
    method_a: str
    method_b: str
    difference: float
    interval: Interval
    p: float
    p_holm: float
    test: str = "DeLong"

    def __post_init__(self) -> None:
        _check_shares({"p": self.p, "p_holm": self.p_holm})
        _check_interval(self.interval, -1.0, "difference")
        if not -1 <= self.difference <= 1:
            raise GroodError(f"a difference of two AUROC is {self.difference}; expected -1 to 1")


@dataclass(frozen=True)
class BenchmarkResults:
    """All that a benchmark found.

    Attributes:
        spec: the benchmark.
        created: when, ISO 8601 in UTC.
        versions: of what the figures depend on, by name: packages, python, platform.
        settings: how it was run, free JSON: the model's spec, methods as given, batch size, device and so on.
        sets: all of the benchmark's, those too that were not there.
        comparable: of the groups that have a set; see `comparability`.
        runs: one for each checkpoint or seed.
        comparisons: paired tests.
        schema_version: of this form.
    """

    spec: SpecInfo
    created: str
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    sets: tuple[SetInfo, ...]
    comparable: Mapping[Group, Comparability]
    runs: tuple[Run, ...]
    comparisons: tuple[Comparison, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", json_data(self.settings, "settings"))
        if self.schema_version != SCHEMA_VERSION:
            raise GroodError(f"schema_version is {self.schema_version}; expected {SCHEMA_VERSION}")
        _check_utc(self.created)
        if not self.runs:
            raise GroodError("there is no run; expected one at least")
        self._check_sets()
        for place, run in enumerate(self.runs):
            for method in run.methods:
                self._check_method(method, f"runs[{place}], {method.label}")
        for place, test in enumerate(self.comparisons):
            if not 0 <= test.run < len(self.runs):
                raise GroodError(f"comparisons[{place}] is of run {test.run}, and there are {len(self.runs)}")
            for label in (test.method_a, test.method_b):
                if self.runs[test.run].method(label) is None:
                    raise GroodError(f"comparisons[{place}] has the method {label!r:.80}, which run {test.run} has not")

    def of_role(self, *roles: Role) -> tuple[SetInfo, ...]:
        """The sets that served for something."""
        return tuple(one for one in self.sets if one.role in roles)

    def is_comparable(self, ood_set: SetInfo) -> bool:
        """Whether a set's own figures may stand beside other people's: it and the ID sets must be whole."""
        return ood_set.status == "complete" and not _known_shortfalls(self.sets)

    def _check_sets(self) -> None:
        keys = [one.key for one in self.of_role("near", "far")]
        if len(set(keys)) < len(keys):
            raise GroodError(f"two OOD sets are called {next(key for key in keys if keys.count(key) > 1)!r:.80}")
        if len(self.of_role("test")) != 1:
            raise GroodError(f"there are {len(self.of_role('test'))} ID test sets; expected one")
        found = comparability(self.sets)
        if set(found) != set(self.comparable):
            raise GroodError(f"comparable tells of {sorted(self.comparable)}, and there are sets of {sorted(found)}")
        for group, derived in found.items():
            if self.comparable[group].comparable and not derived.comparable:
                raise GroodError(f"{group} is called comparable, in spite of {derived.reasons[0]}")

    def _check_method(self, method: MethodResult, where: str) -> None:
        if method.status != "done":
            return
        expected = {one.key: one.role for one in self.of_role("near", "far") if one.status != "absent"}
        if set(method.figures) != set(expected):
            odd = sorted(set(method.figures) ^ set(expected))
            raise GroodError(f"{where}: figures and OOD sets differ by {', '.join(odd)}; expected figures of all sets")
        if set(method.groups) != set(expected.values()):
            raise GroodError(
                f"{where}: expected means of {sorted(set(expected.values()))}, got {sorted(method.groups)}"
            )
        for group, means in method.groups.items():
            if set(means.sets) != {key for key, role in expected.items() if role == group}:
                raise GroodError(
                    f"{where}: the {group} means are over {', '.join(means.sets)}; expected all {group} sets"
                )
            if means.comparable != self.comparable[group].comparable:
                raise GroodError(f"{where}: comparable differs from what is said of {group} as a whole")


@dataclass(frozen=True)
class Spread:
    """A figure over several runs.

    Attributes:
        mean: of the runs.
        std: *population* standard deviation, as OpenOOD prints it; None for one run.
        n: runs.
    """

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class MethodSummary:
    """One method over all runs.

    Attributes:
        label: see `MethodResult`.
        results: of each run that has it, in order.
        groups: spread by group and figure, of the runs in which it is done.
        sets: by key of the set and figure.
        n_runs: of the benchmark, whether or not the method was done in them.
    """

    label: str
    results: tuple[MethodResult, ...]
    groups: Mapping[Group, Mapping[str, Spread]]
    sets: Mapping[str, Mapping[str, Spread]]
    n_runs: int

    @property
    def n_done(self) -> int:
        """Runs in which it gave figures."""
        return sum(one.status == "done" for one in self.results)

    @property
    def uses_ood_data(self) -> bool:
        """Whether it saw real outliers in a run."""
        return any(one.uses_ood_data for one in self.results)


def comparability(sets: Sequence[SetInfo]) -> dict[Group, Comparability]:
    """Whether each group that has a set is comparable: its sets, and the ID training and test sets, must be whole."""
    found: dict[Group, Comparability] = {}
    known = _known_shortfalls(sets)
    for group in GROUPS:
        if members := [one for one in sets if one.role == group]:
            reasons = tuple(known + [one.shortfall() for one in members if one.status != "complete"])
            found[group] = Comparability(not reasons, reasons)
    return found


def summary(results: BenchmarkResults) -> list[MethodSummary]:
    """Mean and population standard deviation over the runs, for each method in the order given."""
    labels = list(dict.fromkeys(method.label for run in results.runs for method in run.methods))
    return [_summary(results, label) for label in labels]


def accuracy_summary(results: BenchmarkResults) -> dict[str, Spread]:
    """ID accuracy over the runs, by "classifier" and "prototype"; the latter only where all runs have it."""
    found = {name: [getattr(run.accuracy, name) for run in results.runs] for name in ("classifier", "prototype")}
    return {name: _spread(values) for name, values in found.items() if values and None not in values}


def write_results(path: str | os.PathLike[str], results: BenchmarkResults) -> None:
    """Write results as JSON: whole or not at all, every number at full precision.

    Raises:
        GroodError: if the file cannot be written, or the results hold what could not be read back.
    """
    try:
        text = json.dumps(encoded(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        # A file name that is no UTF-8 has lone surrogates; their backslash form is JSON's own escape.
        content = text.encode("utf-8", "backslashreplace")
        # Figures that nobody can read again are better missed now than later.
        _results(content.decode())
    except (TypeError, ValueError) as error:
        # A GroodError is a ValueError, too.
        raise GroodError(f"the results cannot be written: {error}") from None
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


def read_results(path: str | os.PathLike[str]) -> BenchmarkResults:
    """Read what `write_results` wrote.

    Raises:
        GroodError: if the file cannot be read, or is anything else; the place in it is named.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
    except OSError as error:
        raise GroodError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > _LARGEST:
        raise GroodError(f"{path} is larger than {_LARGEST >> 20} MiB; expected results.json of `grood benchmark`")
    try:
        return _results(content.decode("utf-8"))
    except GroodError as error:
        raise GroodError(f"{path} is no results.json of `grood benchmark`, or was altered: {error}") from None
    except ValueError as error:
        raise GroodError(f"{path} is no JSON: {error}") from None


def _results(text: str) -> BenchmarkResults:
    data = parsed(text)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise GroodError(
            f"schema_version is {version}, and this version of torch-grood reads up to {SCHEMA_VERSION}; install a "
            "newer one"
        )
    return decoded(BenchmarkResults, data)


def _known_shortfalls(sets: Sequence[SetInfo]) -> list[str]:
    return [f"ID {one.shortfall()}" for one in sets if one.role in ("train", "test") and one.status != "complete"]


def _summary(results: BenchmarkResults, label: str) -> MethodSummary:
    found = tuple(method for run in results.runs if (method := run.method(label)) is not None)
    done = [method for method in found if method.status == "done"]

    def spreads(parts: Sequence[_Figures]) -> dict[str, Spread]:
        return {figure: _spread([part.value(figure) for part in parts]) for figure in FIGURES}

    first = done[0] if done else None
    return MethodSummary(
        label,
        found,
        {group: spreads([method.groups[group] for method in done]) for group in (first.groups if first else ())},
        {key: spreads([method.figures[key] for method in done]) for key in (first.figures if first else ())},
        len(results.runs),
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(_mean(values), float(np.std(values)) if len(values) > 1 else None, len(values))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _check_shares(shares: Mapping[str, float | None]) -> None:
    for name, value in shares.items():
        # NaN compares with nothing.
        if value is not None and not 0 <= value <= 1:
            raise GroodError(f"{name} is {value}; expected a share, 0 to 1")


def _check_seconds(**seconds: float) -> None:
    for name, value in seconds.items():
        if not 0 <= value < math.inf:
            raise GroodError(f"{name} took {value} seconds; expected a number from 0 on")


def _check_interval(interval: Interval, least: float, name: str) -> None:
    if len(interval) != 2 or not least <= interval[0] <= interval[1] <= 1:
        raise GroodError(f"the interval of {name} is {list(interval)}; expected two ascending numbers, {least:g} to 1")


def _check_utc(created: str) -> None:
    try:
        offset = datetime.fromisoformat(created).utcoffset()
    except ValueError:
        offset = None
    if offset != timedelta(0):
        raise GroodError(f"created is {created!r:.80}; expected a time in UTC such as 2026-01-31T12:00:00+00:00")
