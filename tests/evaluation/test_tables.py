"""Tables: what is shown of results, how it is marked, and that no text in them can do anything."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_results import SETS, SHA, comparison, done, figures, methods, results, run

from torch_grood._text import plain
from torch_grood.errors import GroodError
from torch_grood.evaluation.results import (
    FIGURES,
    BenchmarkResults,
    GroupFigures,
    MethodResult,
    Seconds,
    SetInfo,
    SpecInfo,
    comparability,
)
from torch_grood.evaluation.tables import escape_markdown, footnotes, to_csv, to_markdown, to_rich, write_tables

ONE_RUN = """\
# CIFAR-10

**CIFAR-10: unknown images told from known ones, in %**

| method | near: AUROC ↑ | far†: AUROC ↑ | near: OOD accepted, 95 % ID kept ↓ | far†: OOD accepted, 95 % ID kept ↓ \
| near: ID flagged, 95 % OOD caught ↓ | far†: ID flagged, 95 % OOD caught ↓ |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| GROOD (outliers = ood) \\* | 92.00 (91.70 to 92.20) | 96.00 | 12.00 | 6.00 | 11.20 | 5.60 |
| GROOD | **91.00 (90.70 to 91.20)** | 95.00 | **13.50** | 7.50 | **12.60** | 7.00 |
| KNN | 90.95 (90.65 to 91.15) ≈ | **97.00** | 13.57 | **4.50** | 12.67 | **4.20** |
| MSP | 88.50 (88.20 to 88.70) | 92.00 | 17.25 | 12.00 | 16.10 | 11.20 |
| ODIN | – | – | – | – | – | – |

**AUROC of each OOD set, in %**

| method | near: CIFAR-100 | near: TinyImageNet | far: MNIST† |
| --- | ---: | ---: | ---: |
| GROOD (outliers = ood) \\* | 91.00 (90.60 to 91.30) | 93.00 | 96.00 |
| GROOD | **90.00 (89.60 to 90.30)** | **92.00** | 95.00 |
| KNN | 89.90 (89.50 to 90.20) | **92.00** | **97.00** |
| MSP | 88.00 (87.60 to 88.30) | 89.00 | 92.00 |
| ODIN | – | – | – |

**Differences of AUROC in points, paired tests (DeLong; p by Holm)**

| methods | near |
| --- | ---: |
| GROOD − MSP | +2.50 (+2.10 to +2.90), p &lt; 0.001 |
| GROOD − KNN | +0.05 (-0.35 to +0.45), p = 0.400 |

- † far is not comparable with published figures: MNIST: 10,000 of 70,000 images; SVHN: absent (no such folder).
- \\* saw real outliers, in fitting or in the choice of hyper-parameters; not among the best in bold.
- ≈ not distinguishable from the best: Holm-corrected p ≥ 0.05 in every run, where they were tested.
- GROOD: λ = 0.95 is at the end of its grid
- ODIN: unavailable: it needs the network, and there are features only
- In parentheses: 95 % intervals, for the chance in the test images alone.
- FPR@95: most papers mean OOD accepted when 95 % of ID is kept; OpenOOD means ID flagged when 95 % of OOD is caught.
- near, far: unweighted means over the sets.
- weights: r18-s0.safetensors (seed 0).
- ID accuracy: classifier 95.00 %, nearest class prototype 94.00 %.
- images: training 50,000; ID validation 1,000; ID test 9,000; OOD validation 1,000; near CIFAR-100 9,000, \
TinyImageNet 7,793; far MNIST 10,000 of 70,000.
- hyper-parameters: chosen on held-out classes (refitted for each choice): KNN; as given: MSP, GROOD, \
GROOD (outliers = ood).
- versions: torch-grood 0.1.0, torch 2.8.0.
"""

THREE_RUNS = """\
**CIFAR-10: unknown images told from known ones, in %**

| method | near: AUROC ↑ | far†: AUROC ↑ | near: OOD accepted, 95 % ID kept ↓ | far†: OOD accepted, 95 % ID kept ↓ \
| near: ID flagged, 95 % OOD caught ↓ | far†: ID flagged, 95 % OOD caught ↓ |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| MSP | 88.50 ± 0.12 | 92.00 ± 0.00 | 17.25 ± 0.18 | 12.00 ± 0.00 | 16.10 ± 0.17 | 11.20 ± 0.00 |
| GROOD | **91.00 ± 0.12** | 95.00 ± 0.00 | **13.50 ± 0.18** | 7.50 ± 0.00 | **12.60 ± 0.17** | 7.00 ± 0.00 |
| GROOD (outliers = ood) \\* | 92.00 ± 0.12 | 96.00 ± 0.00 | 12.00 ± 0.18 | 6.00 ± 0.00 | 11.20 ± 0.17 | 5.60 ± 0.00 |
| KNN | 90.95 ± 0.12 ≈ | **97.00 ± 0.00** | 13.57 ± 0.18 | **4.50 ± 0.00** | 12.67 ± 0.17 | **4.20 ± 0.00** |
| ODIN | – | – | – | – | – | – |
"""


def rows_of(markdown: str) -> dict[str, list[str]]:
    """Cells of the first table by the row's name."""
    table = markdown.split("\n\n")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    return {row[0]: row[1:] for row in cells}


def shown(results: BenchmarkResults, width: int = 200, **options: Any) -> str:
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(to_rich(results, **options))
    return stream.getvalue()


def test_markdown_of_one_run() -> None:
    assert to_markdown(results()) == ONE_RUN


def test_markdown_of_three_runs_in_the_order_given() -> None:
    text = to_markdown(results(3), sort="given")
    assert THREE_RUNS in text
    assert "| GROOD − MSP | +2.50, p &lt; 0.05 in 3 of 3 runs |\n" in text
    assert "± is the population standard deviation over 3 runs" in text
    assert "ID accuracy: classifier 95.00 ± 0.24 %" in text
    # One interval of three runs would be that of one of them.
    assert "In parentheses" not in text


def test_rows_are_sorted_by_a_group() -> None:
    by_far = list(rows_of(to_markdown(results(), sort="far")))
    assert by_far[2:] == ["KNN", "GROOD (outliers = ood) \\*", "GROOD", "MSP", "ODIN"]
    with pytest.raises(GroodError, match="sorted by 'size'; expected near, far or given"):
        to_markdown(results(), sort="size")  # type: ignore[arg-type]
    with pytest.raises(GroodError, match="no table 'all'; there are methods, sets, tests"):
        to_markdown(results(), parts=("all",))  # type: ignore[arg-type]


def test_a_terminal_shows_the_same() -> None:
    text = shown(results(), intervals=True)
    assert "90.95 (90.65 to 91.15) ≈" in text
    assert "90.95 (" not in shown(results())
    assert "far†" in text
    assert "MNIST†" in text
    assert "ODIN" in text
    assert "paired tests" not in text
    assert "paired tests" in shown(results(), parts=("tests",))
    # Nothing is cut off where there is little room.
    narrow = shown(results(3), width=60)
    assert "…" not in narrow
    assert narrow.count("90.95") == 1


def test_of_equal_printed_figures_all_are_bold() -> None:
    nearly = done("gen", "GEN", 0.9, 0.9196, 0.97)
    found = results(runs=(run(methods=(*methods()[:2], nearly)),), comparisons=())
    rows = rows_of(to_markdown(found, intervals=False))
    assert rows["GROOD"][0] == "**91.00**"
    assert rows["GEN"][0] == "90.98"
    equal = done("gen", "GEN", 0.900001, 0.92, 0.97)
    found = results(runs=(run(methods=(*methods()[:2], equal)),), comparisons=())
    rows = rows_of(to_markdown(found, intervals=False))
    assert (rows["GROOD"][0], rows["GEN"][0]) == ("**91.00**", "**91.00**")


def test_a_method_alone_is_not_the_best() -> None:
    found = results(runs=(run(methods=methods()[:1]),), comparisons=())
    assert "**8" not in to_markdown(found)


def test_the_mark_of_a_tie_needs_every_run() -> None:
    ties = [comparison(place, "KNN", 0.0005, p) for place, p in enumerate((0.4, 0.4, 0.049))]
    assert "≈" not in to_markdown(results(3, comparisons=tuple(ties)))
    assert "≈" not in to_markdown(results(3, comparisons=tuple(ties[:2])))
    assert "90.95 ± 0.12 ≈" in to_markdown(results(3, comparisons=(*ties[:2], replace(ties[2], p_holm=0.05))))


def test_a_method_that_failed_in_a_run_is_not_compared() -> None:
    failed = MethodResult("knn", "KNN", {"name": "knn"}, "failed", "out of memory")
    knn = done("knn", "KNN", 0.95, 0.95, 0.99)
    runs = (run(0, methods=(*methods()[:2], failed)), run(1, methods=(*methods()[:2], knn)))
    found = results(runs=runs, comparisons=())
    rows = rows_of(to_markdown(found))
    assert rows["KNN (1 of 2 runs)"][0] == "95.00"
    assert rows["GROOD"][0] == "**91.00 ± 0.00**"
    assert "KNN: failed: out of memory (run 1 of 2)" in footnotes(found)


def test_a_method_that_a_run_has_not_is_said() -> None:
    found = results(runs=(run(0), run(1, methods=methods()[:2])), comparisons=())
    assert "KNN: not run (run 2 of 2)" in footnotes(found)


def test_warnings_about_the_images_are_shown() -> None:
    assert "3 files are in val and in test" in footnotes(
        results(settings={"warnings": ["3 files are in val and in test"]})
    )
    for other in (None, "text", {"a": 1}, [1]):
        assert footnotes(results(settings={"warnings": other})) == footnotes(results())


def test_a_group_without_sets_has_no_column() -> None:
    sets = tuple(one for one in SETS if one.role != "far")
    found = {"cifar100": figures(0.9), "tin": figures(0.8)}
    method = MethodResult(
        "msp", "MSP", {}, seconds=Seconds(1, 1), figures=found, groups={"near": GroupFigures.of(found, True)}
    )
    ours = results(sets=sets, comparable=comparability(sets), runs=(run(methods=(method,)),), comparisons=())
    text = to_markdown(ours)
    assert "far" not in text.replace("near, far: unweighted", "")
    assert "†" not in text


def test_an_id_set_that_is_not_whole_marks_all() -> None:
    sets = (*SETS[:2], SetInfo("test", "CIFAR-10 test", "test", 900, 9_000, "incomplete"), *SETS[3:])
    comparable = comparability(sets)

    def marked(method: MethodResult) -> MethodResult:
        groups = {group: replace(means, comparable=False) for group, means in method.groups.items()}
        return replace(method, groups=groups)

    runs = (run(methods=tuple(marked(method) for method in methods())),)
    found = results(sets=sets, comparable=comparable, runs=runs)
    text = to_markdown(found)
    assert "near†: AUROC" in text
    assert "near: CIFAR-100†" in text
    assert "near is not comparable with published figures: ID CIFAR-10 test: 900 of 9,000 images." in text
    assert {row["comparable"] for row in csv.DictReader(io.StringIO(to_csv(found)))} == {"false", ""}


def test_csv_has_every_figure_unrounded() -> None:
    found = results(3)
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    # Three sets and two groups of four methods, and one row of the method that could not run.
    assert len(rows) == 3 * (4 * 5 + 1)
    for row in rows:
        method = found.runs[int(row["run"])].method(row["label"])
        assert method is not None
        assert (row["status"], row["seed"]) == (method.status, row["run"])
        if method.status != "done":
            assert (row["reason"], row["scope"], row["auroc"]) == (method.reason, "", "")
            continue
        part = method.figures[row["key"]] if row["scope"] == "set" else method.groups[row["key"]]  # type: ignore[index]
        assert [float(row[figure]) for figure in FIGURES] == [part.value(figure) for figure in FIGURES]
        assert float(row["openood_aupr_in"]) == part.openood.aupr_in
        if "auroc" in part.intervals:
            assert (float(row["auroc_low"]), float(row["auroc_high"])) == part.intervals["auroc"]
    mnist = next(row for row in rows if row["key"] == "mnist")
    assert (mnist["role"], mnist["comparable"], mnist["n_id"], mnist["n_ood"]) == ("far", "false", "9000", "10000")
    tuned = next(row for row in rows if row["label"] == "KNN")
    assert (tuned["config"], tuned["chosen_by"]) == ('{"name": "knn", "k": 100}', "held-out classes")
    assert next(row for row in rows if row["label"] == "GROOD (outliers = ood)")["uses_ood_data"] == "true"


EVIL = '=HYPERLINK("x") | <script>alert(1)</script> [red]**`_x_`**[/red]\n# \x1b[31m$1$ &amp; ![i](u)'


def evil_results(text: str) -> BenchmarkResults:
    sets = tuple(replace(one, title=text) if one.key in ("tin", "mnist") else one for one in SETS)
    bad = MethodResult("odin", text, {"name": text}, "unavailable", text)
    warned = done("msp", f"{text}2", 0.9, 0.9, 0.9, warnings=(text,), chosen_by=text, config={text: text})
    return results(
        spec=SpecInfo("cifar10", text, SHA),
        sets=sets,
        comparable=comparability(sets),
        runs=(run(weights=text, methods=(bad, warned, methods()[1])),),
        comparisons=(comparison(0, f"{text}2", 0.01, 0.01),),
        versions={text: text},
    )


def test_texts_cannot_leave_a_markdown_table() -> None:
    good, evil = to_markdown(evil_results("plain")), to_markdown(evil_results(EVIL))
    # Each line stays a line, each row has as many cells as before.
    assert len(good.splitlines()) == len(evil.splitlines())
    for before, after in zip(good.splitlines(), evil.splitlines(), strict=True):
        assert before.count("|") == after.replace("\\|", "").count("|")
    for forbidden in ("<", ">", "\x1b", "[red]", "![i]", " **`", "$1$"):
        assert forbidden not in evil.replace("\\[", "(").replace("\\$", "§").replace("\\*", "·")
    assert escape_markdown("a|b <i> [x](y) *_` \\ \n&lt;") == ("a\\|b &lt;i&gt; \\[x\\](y) \\*\\_\\` \\\\  &amp;lt;")


def test_a_footnote_starts_no_other_block() -> None:
    for text, shown_as in (("- x", "\\- x"), ("1. x", "1\\. x"), ("+ x", "\\+ x"), ("# x", "\\# x"), ("> x", "&gt; x")):
        assert f"\n- {shown_as}: unavailable: " in to_markdown(evil_results(text))


def test_texts_cannot_steer_a_terminal() -> None:
    text = shown(evil_results(EVIL), width=2_000, parts=("methods", "sets", "tests"))
    assert "[red]**`_x_`**[/red]" in text
    assert "\x1b" not in text
    assert "\\x1b[31m" in text
    assert not any("\x1b" in line or "\n" in line for line in footnotes(evil_results(EVIL)))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\n=1", " =1", "＝1"])
def test_no_cell_of_csv_is_a_formula(text: str) -> None:
    content = to_csv(evil_results(text))
    rows = list(csv.DictReader(io.StringIO(content)))
    assert {row["weights"] for row in rows} == {"'" + plain(text)}
    for row in csv.reader(io.StringIO(content)):
        assert not any(cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r", "＝")) for cell in row)
    # Numbers stay numbers.
    assert {row["seed"] for row in rows} == {"0"}


def test_both_files_are_written(tmp_path: Path) -> None:
    write_tables(tmp_path, results())
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == ONE_RUN
    assert (tmp_path / "results.csv").read_bytes().decode() == to_csv(results())
    write_tables(tmp_path, evil_results("\udcff"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.csv", "results.md"]
    with pytest.raises(GroodError, match="cannot write"):
        write_tables(tmp_path / "absent", results())
