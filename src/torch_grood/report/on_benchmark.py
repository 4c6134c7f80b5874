"""A report on the results of a benchmark."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_grood._optional import require
from torch_grood.errors import GroodError
from torch_grood.evaluation.metrics import auroc
from torch_grood.evaluation.results import (
    GROUPS,
    BenchmarkResults,
    Group,
    MethodSummary,
    SetInfo,
    accuracy_summary,
    read_results,
    summary,
)
from torch_grood.evaluation.scoring import KeptScores, kept_scores
from torch_grood.evaluation.tables import footnotes, grids
from torch_grood.report.figures import Dots, Histogram, auroc_dots, method_histograms, roc_curves
from torch_grood.report.page import page
from torch_grood.report.sets import ROLES
from torch_grood.report.svg import SERIES
from torch_grood.report.tables import share

if TYPE_CHECKING:
    from torch_grood.evaluation.tables import Grid

__all__ = ["benchmark_report"]

_METHODS_DRAWN = 3
# Of a mean of sets' AUROC that is computed anew.
_ROUNDING = 1e-9


def benchmark_report(results: BenchmarkResults | str | os.PathLike[str], *, title: str | None = None) -> str:
    """An HTML page on a benchmark.

    Args:
        results: or the ``results.json`` that they lie in; where ``scores/`` of the same run lies beside it, the scores
            are drawn, too.
        title: of the page; None: of the benchmark.

    Raises:
        GroodError: if the file cannot be read.
        MissingDependencyError: without the extra ``report``.
    """
    for module in ("jinja2", "matplotlib", "sklearn.metrics"):
        require(module, extra="report")
    folder = None
    if not isinstance(results, BenchmarkResults):
        folder, results = Path(results).parent, read_results(results)
    methods = _by_auroc(summary(results))
    tables: dict[str, Grid] = {}
    for part in ("methods", "sets", "tests"):
        found = grids(results, [part], "near", True)
        if found:
            tables[part] = found[0]
    scored = [] if folder is None else list(_scored(results, methods, folder))
    context = {
        "lead": _lead(results, methods),
        "tiles": list(_tiles(results, methods)),
        "warnings": [],
        "dots": list(_dots(results, methods)),
        "methods": tables["methods"],
        "sets": tables.get("sets"),
        "tests": tables.get("tests"),
        "scored": scored,
        "notes": footnotes(results, intervals=True),
        "setting_rows": list(_settings(results)),
    }
    contents = {"methods": "Methods"}
    contents |= {"sets": "Each set"} if "sets" in tables else {}
    contents |= {f"scores-{place}": f"Scores of {one['label']}" for place, one in enumerate(scored, 1)}
    contents |= {"tests": "Do methods differ?"} if "tests" in tables else {}
    contents |= {"notes": "What was measured"}
    return page("benchmark", title or results.spec.title, contents, context)


def _by_auroc(methods: Sequence[MethodSummary]) -> list[MethodSummary]:
    """Those with figures, the best first: by near AUROC, else by far."""

    def key(one: MethodSummary) -> float:
        return next((-one.groups[group]["auroc"].mean for group in GROUPS if group in one.groups), 0.0)

    return sorted((one for one in methods if one.n_done), key=key)


def _lead(results: BenchmarkResults, methods: Sequence[MethodSummary]) -> str:
    runs = "one classifier" if len(results.runs) == 1 else f"{len(results.runs)} checkpoints or seeds of a classifier"
    count = "One method" if len(methods) == 1 else f"{len(methods)} methods"
    incomparable = [group for group in results.comparable if not results.comparable[group].comparable]
    text = (
        "How well do detectors tell images of unknown things from images of the classes that a classifier knows? "
        f"{count}, on the same features of {runs}."
    )
    if incomparable:
        marked = " and ".join(incomparable)
        text += f" Figures marked † ({marked}) may not stand beside published ones: images are missing."
    return text


def _tiles(results: BenchmarkResults, methods: Sequence[MethodSummary]) -> Iterator[dict[str, str]]:
    grood = _grood(methods)
    for group in GROUPS:
        fair = [one for one in methods if group in one.groups and not one.uses_ood_data]
        if not fair:
            continue
        mark = "" if results.comparable[group].comparable else "†"
        if grood is not None and group in grood.groups:
            value = share(grood.groups[group]["auroc"].mean)
            yield {
                "what": f"{grood.label}, {group} AUROC{mark}",
                "value": f"{value} %",
                "note": _sets_of(results, group),
            }
        best = max(fair, key=lambda one: one.groups[group]["auroc"].mean)
        value = share(best.groups[group]["auroc"].mean)
        yield {"what": f"best {group} AUROC{mark}", "value": f"{value} %", "note": best.label}
    accuracy = accuracy_summary(results).get("classifier")
    if accuracy is not None:
        yield {"what": "accuracy of the classifier", "value": f"{share(accuracy.mean)} %", "note": "on its test images"}


def _grood(methods: Sequence[MethodSummary]) -> MethodSummary | None:
    """As it is by itself, if it is among them; the variants may be many."""
    groods = [one for one in methods if one.results[0].name == "grood" and not one.uses_ood_data]
    return min(groods, key=lambda one: len(one.label), default=None)


def _sets_of(results: BenchmarkResults, group: Group) -> str:
    return ", ".join(one.title for one in results.of_role(group) if one.status != "absent")


def _dots(results: BenchmarkResults, methods: Sequence[MethodSummary]) -> Iterator[str]:
    for group in GROUPS:
        of_group = [one for one in methods if group in one.groups]
        if not of_group:
            continue
        of_group.sort(key=lambda one: -one.groups[group]["auroc"].mean)
        intervals = [
            one.results[0].groups[group].intervals.get("auroc") if len(results.runs) == 1 else None for one in of_group
        ]
        dots = Dots(
            [f"{one.label}{' *' if one.uses_ood_data else ''}" for one in of_group],
            [one.groups[group]["auroc"].mean for one in of_group],
            intervals,
            [one.results[0].name == "grood" for one in of_group],
        )
        mark = "" if results.comparable[group].comparable else "†"
        yield auroc_dots(f"dots-{group}", f"AUROC of {group} images{mark}", dots)


def _scored(results: BenchmarkResults, methods: Sequence[MethodSummary], folder: Path) -> Iterator[dict[str, Any]]:
    """Scores of GROOD and of the best others, where they are those that the figures come from."""
    kept = kept_scores(folder / "scores", "run0")
    grood = _grood(methods)
    order = sorted(methods, key=lambda one: one is not grood)
    sets = [one for one in results.of_role("near", "far") if one.status != "absent"]
    colours = [1 + place % (SERIES - 1) for place in range(len(sets))]
    shown = 0
    for one in order:
        scores = kept.get(one.label)
        if shown == _METHODS_DRAWN or scores is None or not _are_those(results, one, scores, sets):
            continue
        shown += 1
        test = results.of_role("test")[0]
        histograms = [Histogram(test.title, ROLES["known"], scores["test"], None, 0)]
        histograms += [
            Histogram(of.title, ROLES[of.role], scores[of.key], None, place)  # type: ignore[index]
            for place, of in zip(colours, sets, strict=True)
        ]
        curves = {of.title: scores[of.key] for of in sets}
        yield {
            "label": one.label,
            "is_log": one.results[0].name == "grood",
            "histograms": method_histograms(histograms, name=f"scores-{shown}"),
            "roc": roc_curves(scores["test"], curves, colours, name=f"roc-{shown}"),
        }


def _are_those(results: BenchmarkResults, one: MethodSummary, scores: KeptScores, sets: Sequence[SetInfo]) -> bool:
    """Whether the kept scores give the figures of the first run: files of another one may lie there."""
    method = results.runs[0].method(one.label)
    if method is None or method.status != "done" or not {"test", *(of.key for of in sets)} <= scores.keys():
        return False
    try:
        return all(abs(auroc(scores["test"], scores[of.key]) - method.figures[of.key].auroc) < _ROUNDING for of in sets)
    except GroodError:
        # They are no scores: none, NaN, of another shape.
        return False


def _settings(results: BenchmarkResults) -> Iterator[tuple[str, str]]:
    yield "benchmark", f"{results.spec.name}, SHA-256 {results.spec.digest[:16]}…"
    yield "measured", results.created
    models = results.settings.get("models")
    for model in models if isinstance(models, list) else []:
        if isinstance(model, dict):
            yield "model", f"{model.get('spec')}, features before {model.get('head')}, on {model.get('device')}"
    for run in results.runs:
        seconds = f"{run.extraction.seconds:,.0f} s for {run.extraction.images:,} images"
        yield f"weights, seed {run.seed}", f"{run.weights or 'as the model is made'}; features in {seconds}"
