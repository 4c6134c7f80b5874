"""Records of results: what they refuse, means, what is comparable, and summaries over runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_results import SETS, comparison, figures, methods, results, run

from torch_grood.errors import GroodError
from torch_grood.evaluation.metrics import openood_metrics
from torch_grood.evaluation.results import (
    FIGURES,
    OPENOOD_FIGURES,
    Accuracy,
    Comparability,
    Extraction,
    GroupFigures,
    MethodResult,
    OpenOODFigures,
    SearchPoint,
    Seconds,
    SetInfo,
    accuracy_summary,
    comparability,
    summary,
)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.1])
def test_figures_are_shares(bad: float) -> None:
    good = figures(0.9)
    for figure in FIGURES:
        with pytest.raises(GroodError, match=f"{figure} is .*; expected a share, 0 to 1"):
            replace(good, **{figure: bad})
    for figure in OPENOOD_FIGURES:
        with pytest.raises(GroodError, match=f"{figure} is .*; expected a share"):
            replace(good.openood, **{figure: bad})
    with pytest.raises(GroodError, match="the interval of auroc"):
        replace(good, intervals={"auroc": (0.5, bad)})
    with pytest.raises(GroodError, match="classifier is"):
        Accuracy(bad)


def test_a_perfect_ranking_has_figures_whatever_its_trapezoids_sum_to() -> None:
    found = openood_metrics(np.arange(40) * 0.1, 100 + np.arange(20) * 0.1)
    # As OpenOOD has it, to the last bit.
    assert found.aupr_out > 1
    assert OpenOODFigures(**found._asdict()).aupr_out == found.aupr_out
    with pytest.raises(GroodError, match="expected a share"):
        OpenOODFigures(**found._replace(aupr_out=1.001)._asdict())


def test_bad_parts_are_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(GroodError, match=r"config of X\.k is .*, which JSON cannot say"):
            MethodResult("x", "X", {"k": bad}, "failed", "why")
        with pytest.raises(GroodError, match=r"took .* seconds"):
            Seconds(bad, 0)
    with pytest.raises(GroodError, match=r"config of X.k\[0\] is a PosixPath|WindowsPath; expected what JSON can say"):
        MethodResult("x", "X", {"k": [Path()]}, "failed", "why")
    with pytest.raises(GroodError, match="has the key 1; expected texts"):
        SearchPoint({1: 2}, 0.5)  # type: ignore[dict-item]
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(GroodError, match="nested more than 32 deep"):
        SearchPoint({"k": nested}, 0.5)
    with pytest.raises(GroodError, match="figures of 0 ID and 1 OOD"):
        replace(figures(0.5), n_id=0, n_ood=1)
    with pytest.raises(GroodError, match="no set to take a mean over"):
        GroupFigures.of({}, True)
    with pytest.raises(GroodError, match="none twice"):
        replace(GroupFigures.of({"a": figures(0.5)}, True), sets=("a", "a"))
    with pytest.raises(GroodError, match="needs a name and a label"):
        MethodResult("", "X", {}, "failed", "why")
    with pytest.raises(GroodError, match="empty key"):
        SetInfo("", "x", "near", 1)
    with pytest.raises(GroodError, match="came from the cache"):
        Extraction(1.0, 2, 3)


def test_means_are_unweighted() -> None:
    found = GroupFigures.of({"small": figures(0.5, 10), "large": figures(1.0, 10**6)}, True)
    assert found.auroc == 0.75
    assert found.openood.aupr_in == pytest.approx(0.72, abs=1e-15)
    assert found.sets == ("small", "large")


def test_groups_are_comparable_when_their_sets_and_the_id_sets_are_whole() -> None:
    whole = tuple(one for one in SETS if one.role != "far")
    assert comparability(whole) == {"near": Comparability(True)}
    test = SetInfo("test", "CIFAR-10 test", "test", 100, 9_000, "incomplete")
    found = comparability([*(one for one in SETS if one.role != "test"), test])
    assert found["near"] == Comparability(False, ("ID CIFAR-10 test: 100 of 9,000 images",))
    assert found["far"].reasons[0] == "ID CIFAR-10 test: 100 of 9,000 images"
    # A benchmark that expects no number is complete as it is.
    assert comparability([SetInfo("own", "own", "near", 5)]) == {"near": Comparability(True)}
    with pytest.raises(GroodError, match="give one if it is not"):
        Comparability(False)


def test_more_reasons_may_be_given_but_none_left_out() -> None:
    ours = comparability(SETS) | {"near": Comparability(False, ("another transform",))}
    with pytest.raises(GroodError, match="comparable differs"):
        results(comparable=ours)


def test_the_summary_has_population_deviations() -> None:
    grood = {row.label: row for row in summary(results(3))}["GROOD"]
    near = [0.91, 0.9115, 0.9085]
    assert grood.groups["near"]["auroc"].mean == pytest.approx(np.mean(near), abs=1e-15)
    assert grood.groups["near"]["auroc"].std == pytest.approx(np.std(near), abs=1e-15)
    assert grood.groups["near"]["auroc"].std != pytest.approx(np.std(near, ddof=1), abs=1e-6)
    assert grood.sets["cifar100"]["aupr_id"].mean == pytest.approx(0.88)
    assert (grood.n_done, grood.n_runs, grood.uses_ood_data) == (3, 3, False)
    assert accuracy_summary(results(3))["classifier"].std == pytest.approx(np.std([0.95, 0.953, 0.947]))


def test_one_run_has_no_deviation() -> None:
    for row in summary(results()):
        assert all(spread.std is None for means in row.groups.values() for spread in means.values())
    assert accuracy_summary(results())["prototype"].std is None


def test_the_summary_counts_the_runs_that_gave_figures() -> None:
    failed = MethodResult("msp", "MSP", {}, "failed", "out of memory")
    runs = (run(0), run(1, methods=(failed, *methods()[1:4])), run(2, methods=methods()[1:]))
    rows = {row.label: row for row in summary(results(runs=runs, comparisons=()))}
    assert list(rows) == ["MSP", "GROOD", "GROOD (outliers = ood)", "KNN", "ODIN"]
    assert (rows["MSP"].n_done, len(rows["MSP"].results), rows["MSP"].n_runs) == (1, 2, 3)
    assert rows["MSP"].groups["near"]["auroc"].n == 1
    assert (rows["ODIN"].n_done, rows["ODIN"].groups, rows["ODIN"].sets) == (0, {}, {})


def test_prototype_accuracy_may_be_unknown() -> None:
    found = results(2, runs=(run(0), run(1, accuracy=Accuracy(0.9))), comparisons=())
    assert set(accuracy_summary(found)) == {"classifier"}


def test_a_comparison_is_of_methods_that_are_there() -> None:
    with pytest.raises(GroodError, match="has the method 'MDS', which run 0 has not"):
        results(comparisons=(comparison(0, "MDS", 0.1, 0.1),))
