"""CSV: a row for each run, method and OOD set or group."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch_grood._text import plain
from torch_grood.evaluation.metrics import FIGURES
from torch_grood.evaluation.results import OPENOOD_FIGURES, BenchmarkResults

__all__ = ["to_csv"]

# What a spreadsheet takes for the start of a formula; the last four are full-width forms.
_FORMULA = tuple("=+-@＝＋－＠")


def to_csv(results: BenchmarkResults) -> str:
    """CSV in long form: a row for each run, method and OOD set or group, with all figures as shares, unrounded.

    A method that could not run has one row, with its reason. A text that a spreadsheet would take for a formula begins
    with an apostrophe.
    """
    rows = list(_rows(results))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _columns(), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return stream.getvalue()


def _columns() -> list[str]:
    columns = ["benchmark", "run", "weights", "weights_sha256", "seed", "accuracy_classifier", "accuracy_prototype"]
    columns += ["method", "label", "config", "status", "reason", "chosen_by", "uses_ood_data"]
    columns += ["fit_seconds", "score_seconds", "scope", "key", "role", "comparable", "n_id", "n_ood"]
    columns += [f"{figure}{part}" for figure in FIGURES for part in ("", "_low", "_high")]
    return columns + [f"openood_{figure}" for figure in OPENOOD_FIGURES]


def _rows(results: BenchmarkResults) -> Iterator[dict[str, Any]]:
    roles = {one.key: one for one in results.of_role("near", "far")}
    for place, run in enumerate(results.runs):
        for method in run.methods:
            known = {
                "benchmark": results.spec.name,
                "run": place,
                "weights": run.weights,
                "weights_sha256": run.weights_sha256,
                "seed": run.seed,
                "accuracy_classifier": run.accuracy.classifier,
                "accuracy_prototype": run.accuracy.prototype,
                "method": method.name,
                "label": method.label,
                "config": json.dumps(method.config, ensure_ascii=False),
                "status": method.status,
                "reason": method.reason,
                "chosen_by": method.chosen_by,
                "uses_ood_data": method.uses_ood_data,
                "fit_seconds": method.seconds and method.seconds.fit,
                "score_seconds": method.seconds and method.seconds.score,
            }
            if method.status != "done":
                yield known
            for key, figures in method.figures.items():
                one = roles[key]
                scope = {"scope": "set", "key": key, "role": one.role, "comparable": results.is_comparable(one)}
                yield known | scope | {"n_id": figures.n_id, "n_ood": figures.n_ood} | _figures(figures)
            for group, means in method.groups.items():
                scope = {"scope": "group", "key": group, "role": group, "comparable": means.comparable}
                yield known | scope | _figures(means)


def _figures(part: Any) -> dict[str, float]:
    found: dict[str, float] = {figure: part.value(figure) for figure in FIGURES}
    intervals: Mapping[str, tuple[float, float]] = part.intervals
    for figure, (low, high) in intervals.items():
        found |= {f"{figure}_low": low, f"{figure}_high": high}
    return found | {f"openood_{figure}": getattr(part.openood, figure) for figure in OPENOOD_FIGURES}


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = plain(value)
        return "'" + text if text.lstrip().startswith(_FORMULA) else text
    return "" if value is None else repr(value)
