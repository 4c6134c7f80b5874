"""What a benchmark found, as data: ``results.json``.

    BenchmarkResults ─┬─ spec, versions, settings, sets         what was measured, and with what
                      ├─ runs: one checkpoint or seed each ── methods ─┬─ figures  of each OOD set
                      │                                                └─ groups   near and far: unweighted means
                      └─ comparisons: paired tests of two methods

All shares lie in 0…1 here; tables print per cent. The reader is strict: a file that was cut, edited by hand into
something impossible (a mean that is not the mean), or written by a newer version is an error and not a table.
"""

from __future__ import annotations

from torch_grood.evaluation.metrics import FIGURES
from torch_grood.evaluation.results._checks import Interval
from torch_grood.evaluation.results.benchmark_results import SCHEMA_VERSION, BenchmarkResults, Comparison, SpecInfo
from torch_grood.evaluation.results.figures import OPENOOD_FIGURES, GroupFigures, OpenOODFigures, SetFigures
from torch_grood.evaluation.results.file import read_results, write_results
from torch_grood.evaluation.results.runs import Accuracy, Extraction, MethodResult, Run, SearchPoint, Seconds
from torch_grood.evaluation.results.sets import GROUPS, Comparability, Group, Role, SetInfo, comparability
from torch_grood.evaluation.results.summaries import MethodSummary, Spread, accuracy_summary, summary

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
    "Group",
    "GroupFigures",
    "Interval",
    "MethodResult",
    "MethodSummary",
    "OpenOODFigures",
    "Role",
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
