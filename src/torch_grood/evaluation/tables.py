"""Results as tables for people (terminal, Markdown) and for programs (CSV). Figures are in per cent, in CSV shares.

    methods   near and far: AUROC, and FPR@95 by both conventions under names that say which
    sets      AUROC of each OOD set
    tests     paired tests of two methods

Marks: † a figure that may not stand beside other people's, * a method that saw real outliers, ≈ a method that a test
does not tell from the best. The best of a column is bold among the methods without *. A method that could not run is
listed with its reason. Titles, labels and reasons may come from files: they cannot steer a terminal, a Markdown
renderer or a spreadsheet.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch_grood._files import replacing
from torch_grood._optional import require
from torch_grood.errors import GroodError
from torch_grood.evaluation.results import (
    FIGURES,
    GROUPS,
    OPENOOD_FIGURES,
    BenchmarkResults,
    Group,
    MethodSummary,
    SetInfo,
    Spread,
    accuracy_summary,
    summary,
)

if TYPE_CHECKING:
    from rich.console import Group as Renderables
    from rich.table import Table

__all__ = [
    "PARTS",
    "Cell",
    "Grid",
    "escape_markdown",
    "footnotes",
    "plain",
    "to_csv",
    "to_markdown",
    "to_rich",
    "write_tables",
]

Part = Literal["methods", "sets", "tests"]
Sort = Literal["near", "far", "given"]

PARTS: tuple[Part, ...] = ("methods", "sets", "tests")
_HEADINGS = {
    "auroc": "AUROC ↑",
    "ood_accepted_at_95_id_kept": "OOD accepted, 95 % ID kept ↓",
    "id_flagged_at_95_ood_caught": "ID flagged, 95 % OOD caught ↓",
}
_NONE = "–"
_SIGNIFICANT = 0.05
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~&$#])")
_BLOCK_START = re.compile(r"^(\d*)([-+=.)])")
# What a spreadsheet takes for the start of a formula; the last four are full-width forms.
_FORMULA = tuple("=+-@＝＋－＠")


@dataclass(frozen=True)
class Cell:
    """Text of a table, not yet escaped for anything."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        title: above it.
        headings: of the columns; the first is of the rows' names.
        rows: a cell a column.
        n_texts: columns at the end that are texts and no numbers.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    n_texts: int = 0

    def to_rich(self) -> Table:
        """For a terminal."""
        text = require("rich.text", extra="cli").Text
        # `Text` and not `str`, which would be searched for markup.
        table: Table = require("rich.table", extra="cli").Table(title=text(plain(self.title), style="table.title"))
        for place, heading in enumerate(self.headings):
            # A line for each part of a heading keeps the columns narrow.
            lines = text(plain(heading).replace(", ", ",\n").replace(": ", "\n"))
            table.add_column(lines, justify="right" if self._is_number(place) else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(text(plain(cell.text), style="bold" if cell.bold else "") for cell in row))
        return table

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown, with its title above it."""
        lines = [f"**{escape_markdown(self.title)}**", ""]
        lines.append(_markdown_row(escape_markdown(heading) for heading in self.headings))
        lines.append(_markdown_row("---:" if self._is_number(place) else "---" for place in range(len(self.headings))))
        for row in self.rows:
            cells = [escape_markdown(cell.text) for cell in row]
            lines.append(
                _markdown_row(f"**{text}**" if cell.bold else text for cell, text in zip(row, cells, strict=True))
            )
        return "\n".join(lines) + "\n"

    def _is_number(self, column: int) -> bool:
        return 0 < column < len(self.headings) - self.n_texts


def to_rich(
    results: BenchmarkResults,
    *,
    parts: Sequence[Part] = ("methods", "sets"),
    sort: Sort = "near",
    intervals: bool = False,
) -> Renderables:
    """Tables for a terminal; print `footnotes` below them.

    Args:
        results: of a benchmark.
        parts: which tables; one that would be empty is left out.
        sort: rows by mean AUROC of a group, the best first, or in the order given.
        intervals: also show 95 % intervals, if there is one run.
    """
    grids = _grids(results, parts, sort, intervals)
    tables: Renderables = require("rich.console", extra="cli").Group(*(grid.to_rich() for grid in grids))
    return tables


def to_markdown(
    results: BenchmarkResults, *, parts: Sequence[Part] = PARTS, sort: Sort = "near", intervals: bool = True
) -> str:
    """A Markdown document: title, tables and footnotes; see `to_rich`."""
    blocks = [f"# {escape_markdown(results.spec.title)}\n"]
    blocks += [grid.to_markdown() for grid in _grids(results, parts, sort, intervals)]
    lines = (_BLOCK_START.sub(r"\1\\\2", escape_markdown(line)) for line in footnotes(results, intervals=intervals))
    blocks.append("".join(f"- {line}\n" for line in lines))
    return "\n".join(blocks)


def to_csv(results: BenchmarkResults) -> str:
    """CSV in long form: a row for each run, method and OOD set or group, with all figures as shares, unrounded.

    A method that could not run has one row, with its reason. A text that a spreadsheet would take for a formula begins
    with an apostrophe.
    """
    rows = list(_csv_rows(results))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _csv_columns(), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _csv_cell(value) for name, value in row.items()} for row in rows)
    return stream.getvalue()


def write_tables(folder: str | os.PathLike[str], results: BenchmarkResults) -> None:
    """Write ``results.md`` and ``results.csv`` into a folder that is there.

    Raises:
        GroodError: if a file cannot be written.
    """
    for name, text in (("results.md", to_markdown(results)), ("results.csv", to_csv(results))):
        with replacing(Path(folder) / name) as temporary:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


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
        f"ID accuracy: {_accuracy(results)}.",
        f"images: {_counts(results)}.",
        f"hyper-parameters: {_choices(rows)}.",
        "versions: " + ", ".join(f"{name} {version}" for name, version in results.versions.items()) + ".",
    ]
    return [plain(line) for line in lines]


def escape_markdown(text: object) -> str:
    """Text in one line that Markdown shows as it is."""
    escaped = _MARKDOWN.sub(r"\\\1", plain(text))
    # Angle brackets: a renderer that knows no escapes must not see a tag either.
    return escaped.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def plain(text: object) -> str:
    """Text in one line without characters that steer a terminal."""
    return "".join(char if char.isprintable() else " " if char in "\n\t" else repr(char)[1:-1] for char in str(text))


def _grids(results: BenchmarkResults, parts: Sequence[Part], sort: Sort, intervals: bool) -> list[Grid]:
    if unknown := [part for part in parts if part not in PARTS]:
        raise GroodError(f"there is no table {unknown[0]!r}; there are {', '.join(PARTS)}")
    rows = _sorted(summary(results), sort)
    intervals = intervals and len(results.runs) == 1
    makers: dict[Part, Callable[[], Grid | None]] = {
        "methods": lambda: _methods_grid(results, rows, intervals),
        "sets": lambda: _sets_grid(results, rows, intervals),
        "tests": lambda: _tests_grid(results),
    }
    return [grid for part in parts if (grid := makers[part]()) is not None]


def _sorted(rows: list[MethodSummary], sort: Sort) -> list[MethodSummary]:
    if sort == "given":
        return rows
    if sort not in GROUPS:
        raise GroodError(f"rows cannot be sorted by {sort!r}; expected near, far or given")
    order: tuple[Group, ...] = ("near", "far") if sort == "near" else ("far", "near")

    def key(row: MethodSummary) -> tuple[bool, float]:
        found = next((row.groups[group]["auroc"].mean for group in order if group in row.groups), 0.0)
        return row.n_done == 0, -found

    return sorted(rows, key=key)


def _methods_grid(results: BenchmarkResults, rows: Sequence[MethodSummary], intervals: bool) -> Grid:
    groups = [group for group in GROUPS if group in results.comparable]
    headings, columns = ["method"], [_names(rows)]
    for figure, heading in _HEADINGS.items():
        for group in groups:
            mark = "" if results.comparable[group].comparable else "†"
            headings.append(f"{group}{mark}: {heading}")
            spreads = [row.groups.get(group, {}).get(figure) for row in rows]
            found = [
                row.results[0].groups[group].intervals.get(figure) if intervals and group in row.groups else None
                for row in rows
            ]
            ties = _ties(results, rows, group) if figure == "auroc" else frozenset()
            columns.append(_column(rows, spreads, found, higher=figure == "auroc", ties=ties))
    title = f"{results.spec.title}: unknown images told from known ones, in %"
    return Grid(title, tuple(headings), tuple(zip(*columns, strict=True)))


def _sets_grid(results: BenchmarkResults, rows: Sequence[MethodSummary], intervals: bool) -> Grid:
    sets = [one for one in results.of_role("near", "far") if one.status != "absent"]
    headings, columns = ["method"], [_names(rows)]
    for one in sets:
        headings.append(f"{one.role}: {one.title}{'' if results.is_comparable(one) else '†'}")
        spreads = [row.sets.get(one.key, {}).get("auroc") for row in rows]
        found = [
            row.results[0].figures[one.key].intervals.get("auroc") if intervals and one.key in row.sets else None
            for row in rows
        ]
        columns.append(_column(rows, spreads, found, higher=True))
    return Grid("AUROC of each OOD set, in %", tuple(headings), tuple(zip(*columns, strict=True)))


def _tests_grid(results: BenchmarkResults) -> Grid | None:
    """A row for each pair of methods; over several runs, the mean difference and in how many it is significant."""
    tests = results.comparisons
    groups = [group for group in GROUPS if any(test.group == group for test in tests)]
    pairs = list(dict.fromkeys((test.method_a, test.method_b) for test in tests))
    if not pairs:
        return None
    rows = []
    for pair in pairs:
        cells = [Cell(f"{pair[0]} − {pair[1]}")]
        for group in groups:
            found = [test for test in tests if (test.method_a, test.method_b) == pair and test.group == group]
            if not found:
                cells.append(Cell(_NONE))
            elif len(results.runs) == 1:
                low, high = (f"{100 * end:+.2f}" for end in found[0].interval)
                p = "p < 0.001" if found[0].p_holm < 0.001 else f"p = {found[0].p_holm:.3f}"
                cells.append(Cell(f"{100 * found[0].difference:+.2f} ({low} to {high}), {p}"))
            else:
                mean = sum(test.difference for test in found) / len(found)
                sure = sum(test.p_holm < _SIGNIFICANT for test in found)
                cells.append(Cell(f"{100 * mean:+.2f}, p < {_SIGNIFICANT:g} in {sure} of {len(found)} runs"))
        rows.append(tuple(cells))
    names = ", ".join(dict.fromkeys(test.test for test in tests))
    title = f"Differences of AUROC in points, paired tests ({names}; p by Holm)"
    return Grid(title, ("methods", *groups), tuple(rows))


def _names(rows: Sequence[MethodSummary]) -> list[Cell]:
    cells = []
    for row in rows:
        part = f" ({row.n_done} of {row.n_runs} runs)" if 0 < row.n_done < row.n_runs else ""
        cells.append(Cell(f"{row.label}{' *' if row.uses_ood_data else ''}{part}"))
    return cells


def _column(
    rows: Sequence[MethodSummary],
    spreads: Sequence[Spread | None],
    intervals: Sequence[tuple[float, float] | None],
    *,
    higher: bool,
    ties: frozenset[str] = frozenset(),
) -> list[Cell]:
    # By what is printed: of two equal figures, none may look better than the other.
    shown = [None if spread is None else _percent(spread.mean) for spread in spreads]
    fair = [text for row, text in zip(rows, shown, strict=True) if text is not None and _is_fair(row)]
    best = (max if higher else min)(fair, key=float) if len(fair) > 1 else None
    cells = []
    for row, spread, text, interval in zip(rows, spreads, shown, intervals, strict=True):
        if spread is None or text is None:
            cells.append(Cell(_NONE))
            continue
        bold = text == best and _is_fair(row)
        if spread.std is not None:
            text += f" ± {_percent(spread.std)}"
        if interval is not None:
            text += f" ({_percent(interval[0])} to {_percent(interval[1])})"
        cells.append(Cell(text + (" ≈" if row.label in ties and not bold else ""), bold))
    return cells


def _is_fair(row: MethodSummary) -> bool:
    """Whether it may be the best: it ran everywhere, and on ID data alone."""
    return row.n_done == row.n_runs and not row.uses_ood_data


def _ties(results: BenchmarkResults, rows: Sequence[MethodSummary], group: Group) -> frozenset[str]:
    """Methods that were tested against the best one, and that no run tells from it."""
    fair = [row for row in rows if _is_fair(row) and group in row.groups]
    if not fair:
        return frozenset()
    best = max(fair, key=lambda row: row.groups[group]["auroc"].mean).label
    tied = []
    for row in fair:
        found = [
            test
            for test in results.comparisons
            if test.group == group and {test.method_a, test.method_b} == {best, row.label}
        ]
        if found and len(found) == len(results.runs) and all(test.p_holm >= _SIGNIFICANT for test in found):
            tied.append(row.label)
    return frozenset(tied)


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
    if any(_ties(results, rows, group) for group in results.comparable):
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
        std = "" if spread.std is None else f" ± {_percent(spread.std)}"
        parts.append(f"{names[name]} {_percent(spread.mean)}{std} %")
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


def _csv_columns() -> list[str]:
    columns = ["benchmark", "run", "weights", "weights_sha256", "seed", "accuracy_classifier", "accuracy_prototype"]
    columns += ["method", "label", "config", "status", "reason", "chosen_by", "uses_ood_data"]
    columns += ["fit_seconds", "score_seconds", "scope", "key", "role", "comparable", "n_id", "n_ood"]
    columns += [f"{figure}{part}" for figure in FIGURES for part in ("", "_low", "_high")]
    return columns + [f"openood_{figure}" for figure in OPENOOD_FIGURES]


def _csv_rows(results: BenchmarkResults) -> Iterator[dict[str, Any]]:
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
                yield known | scope | {"n_id": figures.n_id, "n_ood": figures.n_ood} | _csv_figures(figures)
            for group, means in method.groups.items():
                scope = {"scope": "group", "key": group, "role": group, "comparable": means.comparable}
                yield known | scope | _csv_figures(means)


def _csv_figures(part: Any) -> dict[str, float]:
    found: dict[str, float] = {figure: part.value(figure) for figure in FIGURES}
    intervals: Mapping[str, tuple[float, float]] = part.intervals
    for figure, (low, high) in intervals.items():
        found |= {f"{figure}_low": low, f"{figure}_high": high}
    return found | {f"openood_{figure}": getattr(part.openood, figure) for figure in OPENOOD_FIGURES}


def _csv_cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = plain(value)
        return "'" + text if text.lstrip().startswith(_FORMULA) else text
    return "" if value is None else repr(value)


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
