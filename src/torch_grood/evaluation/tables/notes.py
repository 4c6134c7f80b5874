"""What a reader of the tables must know: marks, reasons, conventions, counts, versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch_grood._text import plain
from torch_grood.evaluation.results import (
    GROUPS,
    BenchmarkResults,
    MethodSummary,
    SetInfo,
    accuracy_summary,
    summary,
)
from torch_grood.evaluation.tables.grid import percent
from torch_grood.evaluation.tables.parts import ties_with_best

__all__ = ["footnotes"]


def footnotes(results: BenchmarkResults, *, intervals: bool = False) -> list[str]:
    """What a reader of the tables must know, a line each; plain text that may be printed as it is.

    Args:
        results: of a benchmark.
        intervals: whether the tables show them.
    """
    rows = summary(results)
    lines = [*_comparability_notes(results), *_data_notes(results), *_method_notes(results, rows)]
    if intervals and len(results.runs) == 1:
        lines.append("In parentheses: 95 % intervals, for the chance in the test images alone.")
    lines += [
        "FPR@95: most papers mean OOD accepted when 95 % of ID is kept; OpenOOD means ID flagged when 95 % of OOD is "
        "caught.",
        f"near, far: unweighted means over the sets{_over_runs(results)}.",
        f"weights: {_weights(results)}.",
        f"ID accuracy: {_accuracy(results)}.",
        f"images: {_counts(results)}.",
        f"hyper-parameters: {_choices(rows)}.",
        "versions: " + ", ".join(f"{name} {version}" for name, version in results.versions.items()) + ".",
    ]
    return [plain(line) for line in lines]


def _weights(results: BenchmarkResults) -> str:
    runs = [f"{run.weights or 'as the model is made'} (seed {run.seed})" for run in results.runs]
    return ", ".join(dict.fromkeys(runs))


def _comparability_notes(results: BenchmarkResults) -> Iterator[str]:
    for group in GROUPS:
        if group in results.comparable and not results.comparable[group].comparable:
            reasons = "; ".join(results.comparable[group].reasons)
            yield f"† {group} is not comparable with published figures: {reasons}."


def _data_notes(results: BenchmarkResults) -> Iterator[str]:
    """What the benchmark had to say of the images; settings are free, and may have anything under that name."""
    found = results.settings.get("warnings")
    yield from (text for text in (found if isinstance(found, list) else []) if isinstance(text, str))


def _method_notes(results: BenchmarkResults, rows: Sequence[MethodSummary]) -> Iterator[str]:
    if any(row.uses_ood_data and row.n_done for row in rows):
        yield "* saw real outliers, in fitting or in the choice of hyper-parameters; not among the best in bold."
    if any(ties_with_best(results, rows, group) for group in results.comparable):
        yield "≈ not distinguishable from the best: Holm-corrected p ≥ 0.05 in every run, where they were tested."
    for row in rows:
        reasons: dict[str, list[int]] = {}
        for place, run in enumerate(results.runs):
            method = run.method(row.label)
            if method is None:
                reasons.setdefault("not run", []).append(place)
            elif method.status != "done":
                reasons.setdefault(f"{method.status}: {method.reason}", []).append(place)
            for warning in method.warnings if method else ():
                reasons.setdefault(warning, []).append(place)
        for reason, places in reasons.items():
            yield f"{row.label}: {reason}{_in_runs(results, places)}"


def _in_runs(results: BenchmarkResults, places: Sequence[int]) -> str:
    if len(places) == len(results.runs):
        return ""
    return f" (run {', '.join(str(place + 1) for place in places)} of {len(results.runs)})"


def _over_runs(results: BenchmarkResults) -> str:
    n = len(results.runs)
    return "" if n == 1 else f"; ± is the population standard deviation over {n} runs"


def _accuracy(results: BenchmarkResults) -> str:
    names = {"classifier": "classifier", "prototype": "nearest class prototype"}
    parts = []
    for name, spread in accuracy_summary(results).items():
        parts.append(f"{names[name]} {percent(spread.mean, spread.std)} %")
    return ", ".join(parts)


def _counts(results: BenchmarkResults) -> str:
    parts = []
    titles = {
        "train": "training",
        "val": "ID validation",
        "test": "ID test",
        "val_ood": "OOD validation",
        "near": "near",
        "far": "far",
    }
    for role, title in titles.items():
        found = [one for one in results.sets if one.role == role]
        texts = [f"{one.title} {_count(one)}" if role in GROUPS else _count(one) for one in found if one.n]
        if texts:
            parts.append(f"{title} {', '.join(texts)}")
    return "; ".join(parts)


def _count(one: SetInfo) -> str:
    return f"{one.n:,}" + (f" of {one.expected:,}" if one.expected not in (None, one.n) else "")


def _choices(rows: Sequence[MethodSummary]) -> str:
    chosen: dict[str, list[str]] = {}
    for row in rows:
        ways = dict.fromkeys(one.chosen_by for one in row.results if one.status == "done")
        for way in ways:
            chosen.setdefault(way or "", []).append(row.label)
    given = chosen.pop("", [])
    parts = [f"chosen on {way} (refitted for each choice): {', '.join(labels)}" for way, labels in chosen.items()]
    if given or not parts:
        parts.append(f"as given: {', '.join(given)}" if parts else "as given, none chosen")
    return "; ".join(parts)
