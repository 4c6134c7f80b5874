"""Intervals and tests against all pairs, scipy, exact enumeration, and simulated truth."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from scored_methods import two_methods, values

from torch_grood.errors import GroodError
from torch_grood.evaluation import (
    FIGURES,
    EstimateWithTest,
    ScoreSets,
    auroc,
    bootstrap,
    delong,
    delong_difference,
    holm,
    paired_bootstrap,
    shuffled_auroc,
)

Arrays = Mapping[str, NDArray[np.float64]]


def kernel(id_scores: NDArray[np.float64], ood_scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, m): 1 where OOD lies above ID, ½ where they tie."""
    return (ood_scores > id_scores[:, None]) + 0.5 * (ood_scores == id_scores[:, None])


def by_all_pairs(kernels: list[NDArray[np.float64]]) -> tuple[float, float]:
    """Mean of the kernels' means, and DeLong's standard error, from the definition."""
    n, s = len(kernels[0]), len(kernels)
    of_id = sum(k.mean(1) for k in kernels) / s
    variance = np.var(of_id, ddof=1) / n + sum(np.var(k.mean(0), ddof=1) / k.shape[1] for k in kernels) / s**2
    return float(np.mean([k.mean() for k in kernels])), float(np.sqrt(variance))


def test_delong_by_hand() -> None:
    """ID 1, 2 and OOD 1.5, 3: three of four pairs are right. V = (1, ½), W = (½, 1), each of variance 1/8."""
    found = delong(ScoreSets([1.0, 2.0], {"a": [1.5, 3.0]}))
    error = math.sqrt(1 / 8 / 2 + 1 / 8 / 2)
    assert (found.value, found.standard_error) == (0.75, pytest.approx(error))
    assert found.z == pytest.approx(0.25 / error)
    assert found.p == pytest.approx(2 * stats.norm.sf(0.25 / error))
    width = 1.959964 * error / (0.75 * 0.25)
    assert found.low == pytest.approx(1 / (1 + math.exp(width) / 3), abs=1e-6)
    assert found.high == pytest.approx(1 / (1 + math.exp(-width) / 3), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(values, values), min_size=2, max_size=12),
    st.lists(st.lists(st.tuples(values, values), min_size=2, max_size=9), min_size=1, max_size=3),
)
def test_delong_is_its_definition(of_id: list[tuple[float, float]], of_ood: list[list[tuple[float, float]]]) -> None:
    methods, kernels = [], []
    for i in range(2):
        ids = np.array([pair[i] for pair in of_id])
        oods = {str(s): np.array([pair[i] for pair in pairs]) for s, pairs in enumerate(of_ood)}
        methods.append(ScoreSets(ids, oods))
        kernels.append([kernel(ids, ood) for ood in oods.values()])
    for found, expected in (
        (delong(methods[0]), by_all_pairs(kernels[0])),
        (delong_difference(*methods), by_all_pairs([a - b for a, b in zip(*kernels, strict=True)])),
    ):
        assert found.value == pytest.approx(expected[0], abs=1e-12)
        assert found.standard_error == pytest.approx(expected[1], abs=1e-7)
        assert found.low <= found.value <= found.high
        assert 0 <= found.p <= 1


def test_delong_of_one_set_is_brunner_and_munzels_test() -> None:
    """Their statistic is the same, AUROC − ½ in units of the same standard error, and scipy has it."""
    first, _ = two_methods(n=30, sizes=(50,))
    theirs = stats.brunnermunzel(first.id_scores, first.ood_scores["a"], distribution="normal")
    found = delong(first)
    assert found.z == pytest.approx(abs(theirs.statistic), rel=1e-12)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)


def test_delong_value_is_the_metric_itself() -> None:
    first, second = two_methods(n=333, sizes=(217, 101))
    for name, ood in first.ood_scores.items():
        assert delong(first, name).value == auroc(first.id_scores, ood)
    of_sets = [delong_difference(first, second, [name]).value for name in first.sizes]
    assert delong_difference(first, second).value == pytest.approx(sum(of_sets) / 2, abs=1e-15)


def test_shared_id_samples_make_a_mean_less_sure_than_sets_of_their_own_would() -> None:
    first, _ = two_methods(n=50, sizes=(400, 400))
    of_sets = [delong(first, name).standard_error for name in first.sizes]
    assert delong(first).standard_error > 1.1 * math.hypot(*of_sets) / 2


def test_pairing_makes_a_difference_surer() -> None:
    first, second = two_methods(n=200, sizes=(200,))
    apart = math.hypot(delong(first).standard_error, delong(second).standard_error)
    assert delong_difference(first, second).standard_error < 0.9 * apart


def test_exchanging_the_methods_flips_the_sign() -> None:
    first, second = two_methods()
    there, back = delong_difference(first, second), delong_difference(second, first)
    assert (there.value, there.low, there.high, there.z) == (-back.value, -back.high, -back.low, -back.z)
    assert (there.standard_error, there.p) == (back.standard_error, back.p)
    drawn = bootstrap(first, 200), bootstrap(second, 200)
    for figure in FIGURES:
        there, back = (paired_bootstrap(*pair, figure) for pair in (drawn, drawn[::-1]))
        assert (there.value, there.z, there.p) == (-back.value, -back.z, back.p)
        assert (there.low, there.high) == (pytest.approx(-back.high), pytest.approx(-back.low))


def test_methods_that_order_the_samples_alike_do_not_differ() -> None:
    first, _ = two_methods()
    same = ScoreSets(np.exp(first.id_scores), {name: np.exp(ood) for name, ood in first.ood_scores.items()})
    nothing = EstimateWithTest(value=0.0, standard_error=0.0, low=0.0, high=0.0, z=0.0, p=1.0)
    assert delong_difference(first, same) == nothing
    for figure in FIGURES:
        assert paired_bootstrap(bootstrap(first, 50), bootstrap(same, 50), figure) == nothing


def test_exchanging_id_and_ood_mirrors_delong() -> None:
    first, _ = two_methods(sizes=(40,))
    there, back = delong(first), delong(ScoreSets(-first.ood_scores["a"], {"a": -first.id_scores}))
    assert dataclasses.astuple(there) == pytest.approx(dataclasses.astuple(back), rel=1e-12)
    against = delong(ScoreSets(first.ood_scores["a"], {"a": first.id_scores}))
    assert (against.value, against.z) == (pytest.approx(1 - there.value), pytest.approx(-there.z))
    assert (against.low, against.high) == (pytest.approx(1 - there.high), pytest.approx(1 - there.low))


def test_complete_separation_is_not_certainty() -> None:
    """30 independent pairs, all right: a method that is right with probability 0.025^(1/30) shows that in one of 40."""
    found = delong(ScoreSets(np.arange(30.0), {"a": np.arange(50.0, 90.0), "b": np.arange(50.0, 150.0)}))
    assert (found.value, found.standard_error, found.high, found.z) == (1.0, 0.0, 1.0, math.inf)
    assert found.low == pytest.approx(0.025 ** (1 / 30))
    assert found.p == pytest.approx(2 * 0.5**30)
    reversed_ = delong(ScoreSets([1.0, 2.0], {"a": [0.0, -1.0]}), confidence=0.9)
    assert (reversed_.value, reversed_.low, reversed_.z, reversed_.p) == (0.0, 0.0, -math.inf, 0.5)
    assert reversed_.high == pytest.approx(1 - math.sqrt(0.05))


def test_separation_against_its_reverse_and_against_nothing() -> None:
    perfect, reversed_, constant = (
        ScoreSets(id_scores, {"a": ood_scores})
        for id_scores, ood_scores in ([[0, 1, 2], [5, 6, 7]], [[5, 6, 7], [0, 1, 2]], [[1, 1, 1], [1, 1, 1]])
    )
    found = delong_difference(perfect, reversed_)
    assert (found.value, found.standard_error, found.high, found.z) == (1.0, 0.0, 1.0, math.inf)
    assert (found.low, found.p) == (pytest.approx(2 * 0.025 ** (1 / 3) - 1), 2 / 8)
    found = delong_difference(constant, perfect)
    assert (found.value, found.z, found.p) == (-0.5, -math.inf, pytest.approx(2 / 1.5**3))
    assert -1 < found.low < found.value < found.high < 1
    assert delong(constant) == EstimateWithTest(value=0.5, standard_error=0.0, low=0.5, high=0.5, z=0.0, p=1.0)


def test_no_spread_is_seen_through_rounding() -> None:
    """One third has no exact binary form; the mean of many may differ from it, and their variance from 0."""
    scores = ScoreSets([0.0] * 7 + [1.0] * 14, {"a": [0.5] * 1009, "b": [0.5] * 11})
    assert delong(scores).value == pytest.approx(1 / 3)
    assert delong_difference(scores, ScoreSets([0.0] * 7 + [1.0] * 14, {"a": [0.5] * 1009, "b": [0.5] * 11})).p == 1.0


def test_interval_near_one_stays_below_one() -> None:
    rng = np.random.default_rng(1)
    found = delong(ScoreSets(rng.normal(0, 1, 40), {"a": rng.normal(3.2, 1, 40)}))
    assert 0.97 < found.value < 1
    assert found.value + 1.96 * found.standard_error > 1 > found.high
    assert found.value - found.low > found.high - found.value


def test_intervals_stay_in_range() -> None:
    """At the highest confidence that a float can say, and for one wrong pair of very many."""
    most = math.nextafter(1, 0)
    for n, m in ((2, 50_000), (50_000, 2), (3, 3)):
        id_scores, ood_scores = np.arange(float(n)), np.arange(n - 1.5, n + m - 2)
        found = delong(ScoreSets(id_scores, {"a": ood_scores}), confidence=most)
        assert 0 < found.low < found.value < found.high <= 1
    found = delong_difference(ScoreSets([1.0, 2.0], {"a": [1.5, 3.0]}), ScoreSets([1.0, 2.0], {"a": [3.0, 0.0]}))
    assert found.value == 0.25
    assert (found.low, found.high) == (-1.0, 1.0)


@pytest.mark.slow
def test_delong_covers_the_truth_and_rejects_no_truth_too_often() -> None:
    """Normal scores, of which the AUROC is known: Φ(shift / √2). Experiments enough to tell 95 % from 94 and 96."""
    rng, experiments = np.random.default_rng(0), 8000
    shifts = {"a": 1.2, "b": 2.4}
    truth = {name: stats.norm.cdf(shift / math.sqrt(2)) for name, shift in shifts.items()}
    hits = np.zeros(4)
    for _ in range(experiments):
        noise = {"ID": rng.normal(0, 1, 80), **{name: rng.normal(shift, 1, 60) for name, shift in shifts.items()}}
        # Two methods of the same quality, correlated.
        methods = []
        for _ in range(2):
            scores = {name: 0.8 * array + rng.normal(0, 0.6, array.size) for name, array in noise.items()}
            scores = {name: array + 0.2 * shifts.get(name, 0) for name, array in scores.items()}
            methods.append(ScoreSets(scores.pop("ID"), scores))
        for i, name in enumerate(shifts):
            found = delong(methods[0], name)
            hits[i] += found.low <= truth[name] <= found.high
        found = delong(methods[0])
        hits[2] += found.low <= sum(truth.values()) / 2 <= found.high
        hits[3] += delong_difference(*methods).p >= 0.05
    assert hits / experiments == pytest.approx(np.full(4, 0.95), abs=0.01)


def test_holm_by_hand() -> None:
    """0.01 · 4, 0.02 · 3, 0.03 · 2 (as large as the one before it), 0.2 · 1."""
    assert holm([0.02, 0.2, 0.01, 0.03]) == pytest.approx([0.06, 0.2, 0.04, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


@settings(max_examples=60)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_laws(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(p <= q <= min(1.0, len(p_values) * p) + 1e-15 for p, q in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
    # Rejecting at α is the step-down rule itself: as long as the k-th smallest is at most α / (K − k).
    for alpha in (0.01, 0.05, 0.3):
        stepped = 0
        while stepped < len(p_values) and (len(p_values) - stepped) * p_values[order[stepped]] <= alpha:
            stepped += 1
        assert sum(q <= alpha for q in adjusted) == stepped


@pytest.mark.parametrize("ids", [[0.0, 1.0, 2.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
def test_null_of_shuffles_is_that_of_all_arrangements(ids: list[float]) -> None:
    everything = [*ids, 0.0, 1.0, 1.0, 3.0] if any(ids) else [0.0] * 7
    arranged = []
    for chosen in itertools.combinations(range(7), 3):
        rest = [everything[i] for i in range(7) if i not in chosen]
        arranged.append(auroc([everything[i] for i in chosen], rest))
    found = shuffled_auroc(ids, everything[3:])
    assert np.mean(arranged) == pytest.approx(0.5)
    assert found.standard_error == pytest.approx(np.std(arranged))
    assert found.auroc in arranged
    assert found.z == pytest.approx((found.auroc - 0.5) / found.standard_error if any(ids) else 0.0)


def test_shuffling_leaves_nothing_of_a_perfect_method() -> None:
    id_scores, ood_scores = np.arange(0.0, 3000.0), np.arange(5000.0, 9000.0)
    z = np.array([shuffled_auroc(id_scores, ood_scores, seed=seed).z for seed in range(200)])
    assert np.abs(z).max() < 4.5
    assert abs(z.mean()) < 0.25
    assert 0.85 < z.std() < 1.15
    assert shuffled_auroc(id_scores, ood_scores, seed=1) == shuffled_auroc(id_scores, ood_scores, seed=1)


def test_score_sets_keep_a_copy_that_none_may_change() -> None:
    mine = np.array([1.0, 2.0])
    scores = ScoreSets(mine, {"a": torch.tensor([3.0, 4.0]), "b": [5]})
    mine[0] = 99
    assert scores.id_scores.tolist() == [1.0, 2.0]
    assert scores.sizes == {"a": 2, "b": 1}
    with pytest.raises(ValueError, match="read-only"):
        scores.id_scores[0] = 0.0
    with pytest.raises(ValueError, match="read-only"):
        scores.ood_scores["a"][0] = 0.0


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "message"),
    [
        ([1.0], {}, r"OOD sets by name, got the names \[\]"),
        ([1.0], {"": [1.0]}, r"got the names \[''\]"),
        ([], {"a": [1.0]}, "no ID scores"),
        ([1.0], {"svhn": []}, r"no OOD \(svhn\) scores"),
        ([1.0], {"a": [1.0], "svhn": [math.nan]}, r"1 of 1 OOD \(svhn\) scores are NaN"),
    ],
)
def test_bad_score_sets(id_scores: Any, ood_scores: Any, message: str) -> None:
    with pytest.raises(GroodError, match=message):
        ScoreSets(id_scores, ood_scores)


def test_bad_groups_figures_and_confidence() -> None:
    first, second = two_methods()
    drawn = bootstrap(first, 50)
    for group in ("c", ["a", "c"], ["a", "a"], []):
        with pytest.raises(GroodError, match=r"a group names OOD sets, each once, of \['a', 'b'\]"):
            delong(first, group)
        with pytest.raises(GroodError, match="a group names OOD sets"):
            drawn.estimate("auroc", group)
    with pytest.raises(GroodError, match="there is no figure 'fpr95'; there are: auroc, ood_accepted"):
        drawn.estimate("fpr95")
    constant = ScoreSets([1.0, 1.0], {"a": [1.0, 1.0]})
    for confidence in (0.0, 1.0, 95, math.nan):
        for call in (
            lambda confidence: delong(first, confidence=confidence),
            lambda confidence: delong(constant, confidence=confidence),
            lambda confidence: delong_difference(first, second, confidence=confidence),
            lambda confidence: drawn.estimate("auroc", confidence=confidence),
        ):
            with pytest.raises(GroodError, match="confidence must lie between 0 and 1"):
                call(confidence)
    with pytest.raises(GroodError, match=r"50 draws are too few for an interval of 0.99.*at least 200"):
        drawn.estimate("auroc", confidence=0.99)


def test_methods_that_are_no_pair() -> None:
    first, _ = two_methods()
    ids, oods = first.id_scores, first.ood_scores
    fewer, shorter = ScoreSets(ids, {"a": oods["a"]}), ScoreSets(ids[1:], oods)
    other = ScoreSets(ids, {"a": oods["a"], "b": oods["b"][1:]})
    for pair in ((first, fewer), (fewer, first)):
        with pytest.raises(GroodError, match=r"scores of different sets.*name a group"):
            delong_difference(*pair)
        with pytest.raises(GroodError, match=r"scores of different sets.*name a group"):
            paired_bootstrap(*(bootstrap(scores, 40) for scores in pair), "auroc")
    assert delong_difference(first, fewer, "a").value == 0.0
    for second, group, message in (
        (fewer, "b", "75 and no scores of b"),
        (shorter, None, "60 and 59 scores of ID"),
        (other, None, "75 and 74 scores of b"),
    ):
        with pytest.raises(GroodError, match=message):
            delong_difference(first, second, group)
        with pytest.raises(GroodError, match=message):
            paired_bootstrap(bootstrap(first, 40), bootstrap(second, 40), "auroc", group)
    for second_drawn in (bootstrap(first, 41), bootstrap(first, 40, seed=1)):
        with pytest.raises(GroodError, match="drawn differently: 40 draws of seed 0, 4"):
            paired_bootstrap(bootstrap(first, 40), second_drawn, "auroc")


def test_too_few_samples_draws_and_odd_seeds_and_p_values() -> None:
    with pytest.raises(GroodError, match="one ID score; a standard error needs at least two"):
        delong(ScoreSets([1.0], {"a": [1.0, 2.0]}))
    single = ScoreSets([1.0, 2.0], {"a": [1.0, 3.0], "svhn": [1.0]})
    with pytest.raises(GroodError, match=r"one OOD \(svhn\) score"):
        delong_difference(single, single)
    assert delong(single, "a").value == 0.625
    with pytest.raises(GroodError, match="at least 2 draws"):
        bootstrap(single, 1)
    with pytest.raises(GroodError, match="whole number from 0, got -1"):
        bootstrap(single, 10, seed=-1)
    with pytest.raises(GroodError, match="whole number from 0, got -1"):
        shuffled_auroc([1.0], [2.0], seed=-1)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(GroodError, match="a p-value lies between 0 and 1"):
            holm([0.5, p])
