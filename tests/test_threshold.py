"""Split conformal decisions by hand and by counting; the band against scipy; Benjamini-Hochberg in exact fractions.

test_coverage.py simulates what the detector promises with them.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from torch_grood import ConformalThreshold, GroodError
from torch_grood.threshold import benjamini_hochberg, least_rejections

NINETEEN = torch.arange(1.0, 20.0, dtype=torch.float64)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_p_values_by_hand() -> None:
    threshold = ConformalThreshold.fit(tensor(3, 1, 2, 2), fpr=0.2)
    assert threshold.log_scores.tolist() == [1, 2, 2, 3]
    # (1 + #{held-out ≥ s}) / 5.
    found = threshold.p_values(tensor(0.5, 1, 1.5, 2, 2.5, 3, 3.5))
    assert found.dtype == torch.float64
    assert found.tolist() == [5 / 5, 5 / 5, 4 / 5, 4 / 5, 2 / 5, 2 / 5, 1 / 5]


def test_threshold_by_hand() -> None:
    # m = ⌊0.1 · 20⌋ = 2: the second largest of 1 … 19; ID if S ≤ τ, as Algorithm 2 says.
    threshold = ConformalThreshold.fit(NINETEEN[torch.randperm(19)], fpr=0.1)
    assert threshold.log_tau == 18
    assert threshold.tau == math.exp(18)
    assert threshold.n == 19
    assert threshold.fpr == 0.1
    assert threshold.is_ood(tensor(17, 18, math.nextafter(18, 19), 19, 99)).tolist() == [False, False, True, True, True]


def test_tau_underflows_but_decisions_do_not() -> None:
    threshold = ConformalThreshold.fit(NINETEEN - 5000, fpr=0.05)
    assert threshold.tau == 0
    assert threshold.is_ood(tensor(-4981, -4980.999)).tolist() == [False, True]


def test_ties_are_never_flagged() -> None:
    threshold = ConformalThreshold.fit(torch.full((100,), 2.0), fpr=0.5)
    assert threshold.is_ood(tensor(2.0)).tolist() == [False]
    assert threshold.p_values(tensor(2.0)).tolist() == [1.0]
    assert threshold.is_ood(tensor(2.5)).tolist() == [True]


def test_scores_of_minus_infinity() -> None:
    threshold = ConformalThreshold.fit(tensor(*[-math.inf] * 18, 0.0), fpr=0.1)
    assert threshold.log_tau == -math.inf
    assert threshold.tau == 0
    assert threshold.p_values(tensor(-math.inf, -700, 0, 1)).tolist() == [1.0, 2 / 20, 2 / 20, 1 / 20]
    assert threshold.is_ood(tensor(-math.inf, -700)).tolist() == [False, True]


def test_fit_leaves_its_input_alone_and_takes_any_float() -> None:
    scores = torch.tensor([[3.0, 1.0], [2.0, 0.0]], dtype=torch.float32)
    threshold = ConformalThreshold.fit(scores, fpr=0.5)
    assert scores.tolist() == [[3.0, 1.0], [2.0, 0.0]]
    assert threshold.log_scores.dtype == torch.float64
    assert threshold.log_scores.tolist() == [0, 1, 2, 3]
    # float16 queries are compared by value: 0.1 in float16 is below 0.1 in float64.
    assert threshold.p_values(torch.tensor([2.0], dtype=torch.float16)).tolist() == [3 / 5]


score = st.one_of(st.sampled_from([-math.inf, -1.0, 0.0, 0.5]), st.floats(-800, 0))
scores = st.lists(score, min_size=1, max_size=60)


@settings(deadline=None, max_examples=150)
@given(scores, scores, st.data())
def test_p_values_by_counting_and_decisions_by_p_values(
    held_out: list[float], new: list[float], data: st.DataObject
) -> None:
    n = len(held_out)
    # At the multiples of 1 / (n + 1), and next to them, rounding decides.
    multiple = st.integers(1, n).map(lambda m: m / (n + 1))
    rate = st.one_of(
        multiple,
        multiple.map(lambda x: math.nextafter(x, 1)),
        multiple.filter(lambda x: x > 1 / (n + 1)).map(lambda x: math.nextafter(x, 0)) if n > 1 else multiple,
        st.floats(1 / (n + 1), 1, exclude_max=True),
    )
    fpr = data.draw(rate)
    threshold = ConformalThreshold.fit(tensor(*held_out), fpr)
    expected = [(1 + sum(h >= s for h in held_out)) / (n + 1) for s in new]
    found = threshold.p_values(tensor(*new))
    assert found.tolist() == expected
    assert threshold.is_ood(tensor(*new)).tolist() == [s > threshold.log_tau for s in new]
    assert threshold.is_ood(tensor(*new)).tolist() == [p <= fpr for p in expected]


@pytest.mark.parametrize("n", [1, 9, 19, 99, 999, 12_345])
def test_decisions_equal_p_values_at_every_attainable_rate(n: int) -> None:
    held_out = torch.arange(n, dtype=torch.float64)
    new = torch.linspace(-0.5, n + 0.5, 301, dtype=torch.float64)
    for m in sorted({1, 2, 3, n // 3, n // 2, n - 1, n} & set(range(1, n + 1))):
        threshold = ConformalThreshold.fit(held_out, m / (n + 1))
        assert threshold.log_tau == n - m
        assert torch.equal(threshold.is_ood(new), threshold.p_values(new) <= threshold.fpr)


@pytest.mark.parametrize(("fpr", "n"), [(0.05, 19), (0.01, 99), (0.1, 9), (0.3, 9), (0.29, 99), (0.7, 9), (0.001, 999)])
def test_binary_fractions_do_not_lose_a_rank(fpr: float, n: int) -> None:
    threshold = ConformalThreshold.fit(torch.arange(n, dtype=torch.float64), fpr)
    assert threshold.log_tau == n - round(fpr * (n + 1))


def test_a_rate_just_below_a_multiple_is_kept() -> None:
    threshold = ConformalThreshold.fit(tensor(1, 2, 3, 4, 5), fpr=2 / 6 - 1e-11)
    new = tensor(4.5)
    assert threshold.is_ood(new).tolist() == [bool(threshold.p_values(new) <= threshold.fpr)]


def test_a_rate_next_to_one_flags_the_most() -> None:
    threshold = ConformalThreshold.fit(tensor(*range(10)), fpr=1 - 1e-12)
    assert threshold.log_tau == 0


AWKWARD = [0.1, 0.3, 1 / 3, 0.29, 0.7, 0.01, 0.05, math.nextafter(0.1, 0), math.nextafter(0.5, 1), 0.999999]


def test_decisions_equal_p_values_for_every_n_up_to_300() -> None:
    """Scores in pairs of ties, a third of them -inf; queries at, between and beyond all of them."""
    levels = torch.cat([tensor(-math.inf), torch.arange(0, 320, 0.5, dtype=torch.float64), tensor(math.inf)])
    for n in range(1, 301):
        held_out = torch.div(torch.arange(n, dtype=torch.float64), 2, rounding_mode="floor")
        held_out[: n // 3] = -math.inf
        p = None
        for fpr in [*AWKWARD, 1 / (n + 1), math.nextafter(1 / (n + 1), 1), n / (n + 1), 2 / (n + 1)]:
            if not 1 / (n + 1) <= fpr < 1:
                continue
            threshold = ConformalThreshold.fit(held_out, fpr)
            p = threshold.p_values(levels) if p is None else p  # does not depend on fpr
            flagged = threshold.is_ood(levels)
            assert torch.equal(flagged, p <= fpr), (n, fpr)
            assert torch.equal(flagged, levels > threshold.log_tau), (n, fpr)


def test_queries_need_not_be_contiguous() -> None:
    threshold = ConformalThreshold.fit(NINETEEN, 0.1)
    assert threshold.p_values(torch.stack([NINETEEN, NINETEEN], dim=1)[:, 0]).tolist() == [
        (20 - i) / 20 for i in range(19)
    ]
    assert threshold.p_values(torch.zeros(0)).tolist() == []
    assert threshold.is_ood(torch.zeros(0)).tolist() == []


# --- Several operating points -------------------------------------------------------------------------------------


def test_another_operating_point_is_another_fit() -> None:
    first = ConformalThreshold.fit(NINETEEN.flip(0), 0.05)
    for fpr in (0.05, 0.1, 0.3, 0.95):
        other = first.at(fpr)
        assert other.fpr == fpr
        assert other.log_tau == ConformalThreshold.fit(NINETEEN, fpr).log_tau
        assert other.band() == ConformalThreshold.fit(NINETEEN, fpr).band()
        assert other.log_scores.data_ptr() == first.log_scores.data_ptr()  # shared, not copied
    assert first.fpr == 0.05
    assert first.log_tau == 19


def test_another_operating_point_has_the_errors_of_a_fit() -> None:
    threshold = ConformalThreshold.fit(NINETEEN, 0.1)
    with pytest.raises(GroodError, match=r"rate of 0.04 cannot be promised from 19 .* Pass at least 24 samples"):
        threshold.at(0.04)
    with pytest.raises(GroodError, match="fpr is the share of ID samples that may be flagged, between 0 and 1; got 5"):
        threshold.at(5)


# --- Groups -------------------------------------------------------------------------------------------------------


def test_groups_by_hand() -> None:
    # Group 4: 10 … 18; group 7: 1, 2, 3. At 0.25, m = 2 of 10 and 1 of 4.
    scores = torch.cat([torch.arange(10.0, 19.0), tensor(1, 3, 2)])
    groups = torch.tensor([4] * 9 + [7] * 3)
    mixed = torch.tensor([11, 3, 0, 9, 1, 5, 10, 2, 8, 4, 7, 6])
    threshold = ConformalThreshold.fit(scores[mixed], 0.25, groups[mixed])
    assert threshold.groups is not None
    assert threshold.groups.dtype == torch.int64
    assert threshold.groups.tolist() == [4] * 9 + [7] * 3
    assert threshold.log_scores.tolist() == [*range(10, 19), 1, 2, 3]
    assert threshold.n == 12
    assert threshold.group_ids.dtype == torch.int64
    assert threshold.group_ids.tolist() == [4, 7]
    assert threshold.log_taus.tolist() == [17, 3]
    new, of = tensor(17.5, 17.5, 3, 17, 0, 99), torch.tensor([4, 7, 7, 4, 4, 7])
    assert threshold.p_values(new, of).tolist() == [2 / 10, 1 / 4, 2 / 4, 3 / 10, 10 / 10, 1 / 4]
    assert threshold.is_ood(new, of).tolist() == [True, True, False, False, False, True]


def test_one_group_is_group_0() -> None:
    threshold = ConformalThreshold.fit(NINETEEN, 0.1)
    assert threshold.groups is None
    assert threshold.group_ids.dtype == torch.int64
    assert threshold.group_ids.tolist() == [0]
    assert threshold.log_taus.tolist() == [18]
    assert threshold.log_taus.dtype == torch.float64


def test_a_group_that_calibration_never_saw_is_never_flagged() -> None:
    threshold = ConformalThreshold.fit(NINETEEN, 0.1, torch.full((19,), 3))
    new, of = tensor(99, 99, -math.inf), torch.tensor([2, 3, 4])
    assert threshold.p_values(new, of).tolist() == [1.0, 1 / 20, 1.0]
    assert threshold.is_ood(new, of).tolist() == [False, True, False]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_each_group_is_a_threshold_of_its_own(data: st.DataObject) -> None:
    pairs = st.tuples(st.sampled_from([-3, 0, 2, 900]), score)
    held_out = data.draw(st.lists(pairs, min_size=1, max_size=60))
    new = data.draw(st.lists(pairs, max_size=30))
    sizes = {g: sum(g == of for of, _ in held_out) for g, _ in held_out}
    fpr = data.draw(st.floats(1 / (min(sizes.values()) + 1), 1, exclude_max=True))
    groups, scores_ = torch.tensor([g for g, _ in held_out]), tensor(*[s for _, s in held_out])
    threshold = ConformalThreshold.fit(scores_, fpr, groups)
    alone = {g: ConformalThreshold.fit(scores_[groups == g], fpr) for g in sorted(sizes)}
    assert threshold.group_ids.tolist() == list(alone)
    assert threshold.log_taus.tolist() == [one.log_tau for one in alone.values()]
    assert threshold.bands(0.9).tolist() == [list(one.band(0.9)) for one in alone.values()]
    of = torch.tensor([g for g, _ in new], dtype=torch.int64)
    new_scores = tensor(*[s for _, s in new])
    p_values, decisions = threshold.p_values(new_scores, of), threshold.is_ood(new_scores, of)
    for (g, s), p, is_ood in zip(new, p_values.tolist(), decisions.tolist(), strict=True):
        assert p == (alone[g].p_values(tensor(s)).item() if g in alone else 1)
        assert is_ood == (p <= fpr)


def test_what_is_stored_makes_the_same_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 4, (400,), generator=generator)
    threshold = ConformalThreshold.fit(torch.randn(400, generator=generator), 0.1, groups)
    again = ConformalThreshold.fit(threshold.log_scores, threshold.fpr, threshold.groups)
    assert again.groups is not None
    assert torch.equal(again.log_scores, threshold.log_scores)
    assert torch.equal(again.groups, threshold.groups)
    assert torch.equal(again.log_taus, threshold.log_taus)


def test_a_group_that_is_too_small_is_named() -> None:
    names = ["cat", "dog", "eel", "fox", "gnu", "hen", "ibis"]
    few = torch.tensor([0] * 19 + [1] * 3 + [2] * 18)
    with pytest.raises(
        GroodError,
        match=r"rate of 0.05 needs at least 19 calibration samples for each class; too few: class 'dog' \(3\), class "
        r"'eel' \(18\). Pass more of them, a larger fpr, or use one threshold for all classes.",
    ):
        ConformalThreshold.fit(torch.zeros(40), 0.05, few, describe=lambda group: f"class {names[group]!r}")
    with pytest.raises(GroodError, match=r"too few: 0 \(1\), 1 \(1\), 2 \(1\), 3 \(1\), 4 \(1\) and 2 more\. Pass"):
        ConformalThreshold.fit(torch.zeros(7), 0.05, torch.arange(7))
    threshold = ConformalThreshold.fit(torch.zeros(40), 0.3, few)
    with pytest.raises(GroodError, match=r"too few: dog \(3\)\. Pass"):
        threshold.at(0.1, describe=lambda group: names[group])


def test_groups_that_do_not_fit() -> None:
    grouped = ConformalThreshold.fit(NINETEEN, 0.2, torch.arange(19) % 2)
    single = ConformalThreshold.fit(NINETEEN, 0.2)
    for method in ("p_values", "is_ood"):
        with pytest.raises(GroodError, match="as they were at calibration: expected one for each sample, got none"):
            getattr(grouped, method)(NINETEEN)
        with pytest.raises(GroodError, match="as they were at calibration: expected none, got some"):
            getattr(single, method)(NINETEEN, torch.zeros(19, dtype=torch.int64))
        with pytest.raises(GroodError, match=r"groups must have the shape \(19,\), one for each score; got \(18,\)"):
            getattr(grouped, method)(NINETEEN, torch.zeros(18, dtype=torch.int64))
    for wrong in (torch.zeros(19), torch.zeros(19, dtype=torch.bool)):
        with pytest.raises(GroodError, match="groups are whole numbers, one for each sample; got torch"):
            ConformalThreshold.fit(NINETEEN, 0.2, wrong)
    with pytest.raises(GroodError, match=r"groups must have the shape \(19,\), one for each score; got \(1, 19\)"):
        ConformalThreshold.fit(NINETEEN, 0.2, torch.zeros(1, 19, dtype=torch.int64))


def test_what_only_one_group_has() -> None:
    grouped = ConformalThreshold.fit(NINETEEN, 0.2, torch.arange(19) % 2)
    for name in ("log_tau", "tau"):
        with pytest.raises(GroodError, match="this threshold has 2 groups, not one; use log_taus"):
            getattr(grouped, name)
    with pytest.raises(GroodError, match="this threshold has 2 groups, not one; use bands"):
        grouped.band()


# --- The band of this draw ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 19, 99, 400, 1000, 12_345, 1_000_000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999999])
def test_the_band_is_that_of_scipy(n: int, confidence: float) -> None:
    for m in sorted({1, 2, n // 100, n // 20, n // 2, n - 1, n} & set(range(1, n + 1))):
        threshold = ConformalThreshold.fit(torch.zeros(n), m / (n + 1))
        tail = (1 - confidence) / 2
        low, high = threshold.band(confidence)
        assert low == pytest.approx(stats.beta.ppf(tail, m, n + 1 - m), abs=1e-10)
        assert high == pytest.approx(stats.beta.isf(tail, m, n + 1 - m), abs=1e-10)
        assert threshold.bands(confidence).tolist() == [[low, high]]


def test_the_band_is_clopper_and_pearsons() -> None:
    """Its lower limit is that of m exceedances in n trials, its upper limit that of m - 1."""
    threshold = ConformalThreshold.fit(torch.arange(1000.0), 0.05)
    low, high = threshold.band(0.9)
    assert low == pytest.approx(stats.binomtest(50, 1000).proportion_ci(0.9, "exact").low, abs=1e-10)
    assert high == pytest.approx(stats.binomtest(49, 1000).proportion_ci(0.9, "exact").high, abs=1e-10)
    assert low < 0.05 < high


def test_bands_by_hand() -> None:
    # One score: the rate is uniform on (0, 1). Three at m = 1: P(rate ≤ v) = 1 - (1 - v)³.
    assert ConformalThreshold.fit(tensor(1), 0.5).band(0.9) == pytest.approx((0.05, 0.95), abs=1e-12)
    groups = torch.tensor([0, 1, 1, 1])
    bands = ConformalThreshold.fit(tensor(1, 2, 3, 4), 0.5, groups).at(0.5).bands(0.5)
    assert bands.dtype == torch.float64
    assert bands[0].tolist() == pytest.approx([0.25, 0.75], abs=1e-12)
    assert bands[1].tolist() == pytest.approx(list(stats.beta.ppf([0.25, 0.75], 2, 2)), abs=1e-12)
    low, high = ConformalThreshold.fit(tensor(2, 3, 4), 0.25).band(0.5)
    assert (low, high) == pytest.approx((1 - 0.75 ** (1 / 3), 1 - 0.25 ** (1 / 3)), abs=1e-12)


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, math.nan, "0.95", None])
def test_a_confidence_that_is_none(confidence: object) -> None:
    threshold = ConformalThreshold.fit(NINETEEN, 0.1)
    for method in (threshold.band, threshold.bands):
        with pytest.raises(GroodError, match=r"confidence is the share of calibrations .*, between 0 and 1; got"):
            method(confidence)  # type: ignore[arg-type]


# --- Many samples at once -----------------------------------------------------------------------------------------


def test_benjamini_hochberg_by_hand() -> None:
    # Sorted against 0.1·k/5 = .02, .04, .06, .08, .1: 0.03 > .02, but 0.04 ≤ .04 and 0.06 ≤ .06 take it along.
    p = tensor(0.06, 0.5, 0.03, 0.81, 0.04)
    flagged = benjamini_hochberg(p, 0.1)
    assert flagged.dtype == torch.bool
    assert flagged.tolist() == [True, False, True, False, True]
    assert benjamini_hochberg(p, 0.05).tolist() == [False] * 5
    assert benjamini_hochberg(tensor(0.1), 0.1).tolist() == [True]
    assert benjamini_hochberg(tensor(0.05, 0.05, 0.05), 0.05).tolist() == [True] * 3
    assert benjamini_hochberg(torch.zeros(0), 0.1).tolist() == []


def by_fractions(counts: list[int], n: int, fdr: Fraction) -> list[bool]:
    """The rule as it is printed, p = count/(n + 1), in exact arithmetic."""
    p = sorted(Fraction(count, n + 1) for count in counts)
    cut = max((p[k - 1] for k in range(1, len(p) + 1) if p[k - 1] <= fdr * k / len(p)), default=Fraction(-1))
    return [Fraction(count, n + 1) <= cut for count in counts]


@settings(deadline=None, max_examples=300)
@given(
    st.data(), st.sampled_from([1, 9, 19, 29, 99, 299, 999, 49_999]), st.sampled_from(["0.1", "0.05", "0.3", "0.01"])
)
def test_benjamini_hochberg_in_exact_arithmetic(data: st.DataObject, n: int, fdr: str) -> None:
    """P-values lie on a grid, so that p = fdr·k/N happens; rounding must not decide it."""
    few = st.integers(1, min(n + 1, 6))
    counts = data.draw(st.lists(st.one_of(few, st.integers(1, n + 1)), min_size=1, max_size=60))
    p = torch.tensor(counts, dtype=torch.float64) / (n + 1)
    assert benjamini_hochberg(p, float(fdr)).tolist() == by_fractions(counts, n, Fraction(fdr))


def test_benjamini_hochberg_is_that_of_scipy() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        p = np.concatenate([generator.uniform(size=200), generator.uniform(0, 0.01, size=generator.integers(0, 60))])
        expected = stats.false_discovery_control(p, method="bh") <= 0.1
        assert benjamini_hochberg(torch.from_numpy(p), 0.1).tolist() == expected.tolist()


@pytest.mark.parametrize(("n", "tested", "fdr"), [(99, 10, 0.1), (999, 300, 0.1), (999, 9000, 0.1), (29, 7, 0.3)])
def test_the_least_number_of_rejections(n: int, tested: int, fdr: float) -> None:
    least = least_rejections(n, tested, fdr)
    assert 1 <= least <= tested
    p = torch.ones(tested, dtype=torch.float64)
    p[: least - 1] = 1 / (n + 1)
    assert not bool(benjamini_hochberg(p, fdr).any())
    p[least - 1] = 1 / (n + 1)
    assert int(benjamini_hochberg(p, fdr).sum()) == least


def test_the_least_number_of_rejections_by_hand() -> None:
    assert least_rejections(999, 9000, 0.1) == 90
    assert least_rejections(999, 100, 0.1) == 1
    assert least_rejections(999, 101, 0.1) == 2
    assert least_rejections(10**6, 10, 0.5) == 1
    assert least_rejections(999, 0, 0.1) == 0
    # More than there are: nothing can be flagged.
    assert least_rejections(9, 10, 0.05) == 20
    assert not bool(benjamini_hochberg(torch.full((10,), 0.1), 0.05).any())


@settings(deadline=None, max_examples=300)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(["0.1", "0.05", "0.3", "0.01", "0.001"]))
def test_the_least_number_of_rejections_in_exact_arithmetic(n: int, tested: int, fdr: str) -> None:
    assert least_rejections(n, tested, float(fdr)) == math.ceil(tested / (Fraction(fdr) * (n + 1)))


# --- The promise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "fpr"), [(19, 0.05), (50, 0.1), (199, 0.05), (37, 0.333)])
@pytest.mark.parametrize("distribution", ["normal", "heavy", "tied"])
def test_coverage(n: int, fpr: float, distribution: str) -> None:
    """The false-alarm rate over many calibrations lies in (fpr - 1/(n + 1), fpr] for continuous scores."""
    generator = np.random.default_rng(n)
    trials, fresh = 1500, 100
    draw = {
        "normal": lambda size: generator.normal(size=size),
        "heavy": lambda size: -np.abs(generator.standard_cauchy(size=size)),
        "tied": lambda size: generator.integers(0, 8, size=size).astype(float),
    }[distribution]
    flagged = []
    for _ in range(trials):
        threshold = ConformalThreshold.fit(torch.from_numpy(draw(n)), fpr)
        new = torch.from_numpy(draw(fresh))
        decision = threshold.is_ood(new)
        assert torch.equal(decision, threshold.p_values(new) <= fpr)
        flagged.append(float(decision.double().mean()))
    rate, sigma = np.mean(flagged), np.std(flagged) / math.sqrt(trials)
    assert rate <= fpr + 3 * sigma
    if distribution != "tied":
        assert rate >= fpr - 1 / (n + 1) - 3 * sigma
        # The rate is that of the rank: m / (n + 1) exactly, which a rank off by one misses.
        assert rate == pytest.approx(math.floor(fpr * (n + 1) + 1e-9) / (n + 1), abs=4 * sigma)


def test_p_values_of_exchangeable_scores_are_uniform() -> None:
    generator = np.random.default_rng(0)
    n, counts = 9, np.zeros(10)
    for _ in range(2000):
        sample = torch.from_numpy(generator.normal(size=n + 1))
        p = float(ConformalThreshold.fit(sample[:n], 0.1).p_values(sample[n:]))
        counts[round(p * 10) - 1] += 1
    # χ² with 9 degrees of freedom: beyond 27.9 in one of a thousand.
    assert float(((counts - 200) ** 2 / 200).sum()) < 27.9


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fpr", [0, 1, 0.0, 1.0, -0.1, 1.5, math.nan, math.inf, "0.05", None, True, [0.05]])
def test_a_rate_that_is_none(fpr: object) -> None:
    with pytest.raises(GroodError, match="fpr is the share of ID samples that may be flagged, between 0 and 1; got"):
        ConformalThreshold.fit(NINETEEN, fpr)  # type: ignore[arg-type]


def test_eighteen_samples_cannot_promise_one_in_twenty() -> None:
    ConformalThreshold.fit(NINETEEN, 0.05)
    with pytest.raises(
        GroodError, match=r"rate of 0.05 cannot be promised from 18 .*1/\(n \+ 1\) = 0.05263. Pass at least 19 samples"
    ):
        ConformalThreshold.fit(NINETEEN[:18], 0.05)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 3000).map(lambda n: 1 / n) | st.floats(1e-3, 0.9))
def test_the_number_of_samples_that_is_asked_for_is_the_least_that_works(fpr: float) -> None:
    try:
        ConformalThreshold.fit(torch.zeros(1), fpr)
    except GroodError as error:
        needed = int(str(error).split("Pass at least ")[1].split()[0])
        ConformalThreshold.fit(torch.zeros(needed), fpr)
        with pytest.raises(GroodError, match=f"Pass at least {needed} samples"):
            ConformalThreshold.fit(torch.zeros(needed - 1), fpr)
    else:
        assert fpr >= 0.5 - 1e-9


def test_the_smallest_rates_are_an_error_of_ours() -> None:
    with pytest.raises(GroodError, match="cannot be promised"):
        ConformalThreshold.fit(NINETEEN, 1e-310)


def test_no_score_or_a_broken_one() -> None:
    with pytest.raises(GroodError, match="no calibration sample"):
        ConformalThreshold.fit(torch.zeros(0), 0.05)
    with pytest.raises(GroodError, match="a calibration score is NaN"):
        ConformalThreshold.fit(torch.cat([NINETEEN, tensor(math.nan)]), 0.05)


def test_a_score_of_plus_infinity() -> None:
    with pytest.raises(GroodError, match="a calibration score is infinite; check the calibration images"):
        ConformalThreshold.fit(tensor(1, math.inf), 0.4)
    # A new sample may be that far.
    threshold = ConformalThreshold.fit(NINETEEN, 0.1)
    assert threshold.p_values(tensor(math.inf)).tolist() == [1 / 20]
    assert threshold.is_ood(tensor(math.inf)).tolist() == [True]


def test_new_scores_that_are_none() -> None:
    threshold = ConformalThreshold.fit(NINETEEN, 0.1)
    for method in (threshold.p_values, threshold.is_ood):
        with pytest.raises(GroodError, match="a score is NaN, of which nothing can be said"):
            method(tensor(1, math.nan))
        with pytest.raises(GroodError, match=r"scores must have the shape \(n,\), got \(\)"):
            method(torch.tensor(1.0))


@pytest.mark.parametrize("fdr", [0, 1, -0.1, 10, math.nan, "0.1", None])
def test_a_false_discovery_rate_that_is_none(fdr: object) -> None:
    message = "fdr is the share of the flagged samples that may be ID, between 0 and 1; got"
    with pytest.raises(GroodError, match=message):
        benjamini_hochberg(tensor(0.5), fdr)  # type: ignore[arg-type]
    with pytest.raises(GroodError, match=message):
        least_rejections(10, 10, fdr)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-0.001, 1.001, math.nan, math.inf])
def test_p_values_that_are_none(wrong: float) -> None:
    assert benjamini_hochberg(tensor(0, 1), 0.1).tolist() == [True, False]
    with pytest.raises(GroodError, match="p-values must be between 0 and 1, and not NaN"):
        benjamini_hochberg(tensor(0.5, wrong), 0.1)


def test_sizes_that_are_none() -> None:
    with pytest.raises(GroodError, match=r"p-values must have the shape \(n,\), got \(2, 1\)"):
        benjamini_hochberg(tensor(0.1, 0.2)[:, None], 0.1)
    with pytest.raises(GroodError, match="expected n_calibration ≥ 1 and n_tested ≥ 0, got 0 and 5"):
        least_rejections(0, 5, 0.1)
    with pytest.raises(GroodError, match="expected n_calibration ≥ 1 and n_tested ≥ 0, got 5 and -1"):
        least_rejections(5, -1, 0.1)
