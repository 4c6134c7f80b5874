"""The tables of a benchmark: of the methods, of the OOD sets, and of the paired tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch_grood.errors import GroodError
from torch_grood.evaluation.results import GROUPS, BenchmarkResults, Group, MethodSummary, Spread, summary
from torch_grood.evaluation.tables.grid import NONE, Cell, Grid, percent

__all__ = ["PARTS", "Part", "Sort", "grids", "ties_with_best"]

Part = Literal["methods", "sets", "tests"]
Sort = Literal["near", "far", "given"]
PARTS: tuple[Part, ...] = ("methods", "sets", "tests")
_HEADINGS = {
    "auroc": "AUROC ↑",
    "ood_accepted_at_95_id_kept": "OOD accepted, 95 % ID kept ↓",
    "id_flagged_at_95_ood_caught": "ID flagged, 95 % OOD caught ↓",
}
_SIGNIFICANT = 0.05


def grids(results: BenchmarkResults, parts: Sequence[Part], sort: Sort, intervals: bool) -> list[Grid]:
    """Those of the tables asked for that have something to show; see `to_rich`."""
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
            ties = ties_with_best(results, rows, group) if figure == "auroc" else frozenset()
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
                cells.append(Cell(NONE))
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
    shown = [None if spread is None else percent(spread.mean) for spread in spreads]
    fair = [text for row, text in zip(rows, shown, strict=True) if text is not None and _is_fair(row)]
    best = (max if higher else min)(fair, key=float) if len(fair) > 1 else None
    cells = []
    for row, spread, text, interval in zip(rows, spreads, shown, intervals, strict=True):
        if spread is None or text is None:
            cells.append(Cell(NONE))
            continue
        bold = text == best and _is_fair(row)
        text = percent(spread.mean, spread.std)
        if interval is not None:
            text += f" ({percent(interval[0])} to {percent(interval[1])})"
        cells.append(Cell(text + (" ≈" if row.label in ties and not bold else ""), bold))
    return cells


def _is_fair(row: MethodSummary) -> bool:
    """Whether it may be the best: it ran everywhere, and on ID data alone."""
    return row.n_done == row.n_runs and not row.uses_ood_data


def ties_with_best(results: BenchmarkResults, rows: Sequence[MethodSummary], group: Group) -> frozenset[str]:
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
