"""Split conformal decisions: p-values by hand and by counting, coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_grood import ConformalThreshold, GroodError

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
