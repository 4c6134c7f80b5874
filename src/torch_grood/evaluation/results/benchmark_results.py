"""All that a benchmark found, and whether its parts agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from torch_grood.errors import GroodError
from torch_grood.evaluation.results._checks import Interval, check_interval, check_shares, twice
from torch_grood.evaluation.results._records import json_data
from torch_grood.evaluation.results.runs import MethodResult, Run
from torch_grood.evaluation.results.sets import Comparability, Group, Role, SetInfo, comparability, known_shortfalls

__all__ = ["SCHEMA_VERSION", "BenchmarkResults", "Comparison", "SpecInfo"]

SCHEMA_VERSION = 1


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
        check_shares({"p": self.p, "p_holm": self.p_holm})
        check_interval(self.interval, -1.0, "difference")
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
        return ood_set.status == "complete" and not known_shortfalls(self.sets)

    def _check_sets(self) -> None:
        if (key := twice([one.key for one in self.of_role("near", "far")])) is not None:
            raise GroodError(f"two OOD sets are called {key!r:.80}")
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


def _check_utc(created: str) -> None:
    try:
        offset = datetime.fromisoformat(created).utcoffset()
    except ValueError:
        offset = None
    if offset != timedelta(0):
        raise GroodError(f"created is {created!r:.80}; expected a time in UTC such as 2026-01-31T12:00:00+00:00")
