"""Each method over all runs: means and spreads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from torch_grood.evaluation.metrics import FIGURES
from torch_grood.evaluation.results.benchmark_results import BenchmarkResults
from torch_grood.evaluation.results.figures import Figures
from torch_grood.evaluation.results.runs import MethodResult
from torch_grood.evaluation.results.sets import Group

__all__ = ["MethodSummary", "Spread", "accuracy_summary", "summary"]


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


def summary(results: BenchmarkResults) -> list[MethodSummary]:
    """Mean and population standard deviation over the runs, for each method in the order given."""
    labels = list(dict.fromkeys(method.label for run in results.runs for method in run.methods))
    return [_summary(results, label) for label in labels]


def accuracy_summary(results: BenchmarkResults) -> dict[str, Spread]:
    """ID accuracy over the runs, by "classifier" and "prototype"; the latter only where all runs have it."""
    found = {name: [getattr(run.accuracy, name) for run in results.runs] for name in ("classifier", "prototype")}
    return {name: _spread(values) for name, values in found.items() if values and None not in values}


def _summary(results: BenchmarkResults, label: str) -> MethodSummary:
    found = tuple(method for run in results.runs if (method := run.method(label)) is not None)
    done = [method for method in found if method.status == "done"]

    def spreads(parts: Sequence[Figures]) -> dict[str, Spread]:
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
    return Spread(float(np.mean(values)), float(np.std(values)) if len(values) > 1 else None, len(values))
