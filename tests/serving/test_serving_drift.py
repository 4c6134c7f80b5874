"""The test for drift: its p-value is exact, and it keeps its level over calibrations and windows."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom

from torch_grood.errors import GroodError
from torch_grood.serving import DriftMonitor
from torch_grood.serving.drift import exceedance_p_value


def _rising(base: int, count: int) -> int:
    found = 1
    for i in range(count):
        found *= base + i
    return found


def _exact(images: int, rank: int, n: int) -> list[Fraction]:
    """P(K = 0), …, P(K = images), by Pólya's urn with `rank` flagged and n + 1 - rank other balls."""
    other = n + 1 - rank
    return [
        Fraction(comb(images, k) * _rising(rank, k) * _rising(other, images - k), _rising(n + 1, images))
        for k in range(images + 1)
    ]


@given(st.integers(1, 30), st.integers(1, 40), st.data())
def test_p_value_is_exact(images: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, n))
    flagged = data.draw(st.integers(0, images))
    expected = sum(_exact(images, rank, n)[flagged:], Fraction(0))
    found = exceedance_p_value(rank / (n + 1), {0: n}, {0: images}, flagged)
    assert found == pytest.approx(float(expected), rel=1e-10, abs=1e-290)


@pytest.mark.parametrize(("images", "rank", "n"), [(1000, 50, 1000), (1000, 1, 20), (20_000, 500, 9999)])
def test_p_value_of_large_windows(images: int, rank: int, n: int) -> None:
    law = betabinom(images, rank, n + 1 - rank)
    for flagged in (0, 1, images // 20, images // 10, images // 4):
        found = exceedance_p_value(rank / (n + 1), {0: n}, {0: images}, flagged)
        # scipy takes the tail from 1.
        assert found == pytest.approx(float(law.sf(flagged - 1)), rel=1e-6, abs=1e-9)


def test_p_value_of_classes_is_that_of_their_sum() -> None:
    rate, sizes, counts = 0.2, {0: 9, 3: 14, 5: 4}, {0: 4, 3: 5, 5: 3, 7: 6}
    laws = [_exact(counts[group], int(rate * (n + 1)), n) for group, n in sizes.items()]
    for flagged in range(14):
        expected = Fraction(0)
        for ks in product(*(range(len(law)) for law in laws)):
            if sum(ks) >= flagged:
                term = Fraction(1)
                for k, law in zip(ks, laws, strict=True):
                    term *= law[k]
                expected += term
        # Class 7 was not calibrated: it flags nothing.
        assert exceedance_p_value(rate, sizes, counts, flagged) == pytest.approx(float(expected), rel=1e-10)


def _false_alarms(sizes: dict[int, int], shares: list[float], seed: int) -> float:
    """Share of the windows that are an alarm, over fresh calibrations, for images like theirs."""
    random, rate, level, window, repeats = np.random.default_rng(seed), 0.1, 0.05, 60, 4000
    classes = list(sizes)
    alarms = 0
    for _ in range(repeats):
        monitor = DriftMonitor(rate, sizes, window, level)
        held_out = {group: np.sort(random.random(n)) for group, n in sizes.items()}
        for group in random.choice(classes, window, p=shares):
            scores = held_out[group]
            p_value = (1 + len(scores) - np.searchsorted(scores, random.random())) / (len(scores) + 1)
            monitor.add(int(group), bool(p_value <= rate))
        assert monitor.tests == 1
        alarms += monitor.alarms
    return alarms / repeats


@pytest.mark.parametrize(
    ("sizes", "shares"), [({-1: 99}, [1.0]), ({-1: 30}, [1.0]), ({0: 19, 1: 60, 2: 9}, [0.5, 0.3, 0.2])]
)
def test_the_level_holds(sizes: dict[int, int], shares: list[float]) -> None:
    found = _false_alarms(sizes, shares, seed=len(sizes))
    # Four standard deviations; and it is no test that never warns.
    assert 0.005 < found <= 0.05 + 4 * (0.05 * 0.95 / 4000) ** 0.5


def test_windows() -> None:
    monitor = DriftMonitor(0.1, 99, window=20, level=0.01)
    for i in range(20):
        assert monitor.last is None
        monitor.add(i, i < 2)
    assert monitor.last is not None
    assert (monitor.last.images, monitor.last.flagged, monitor.last.alarm) == (20, 2, False)
    assert monitor.last.expected == pytest.approx(2)
    for _ in range(20):
        monitor.add(0, True)
    assert monitor.last.alarm
    monitor.add(0, True)
    found = monitor.described()
    assert (found["alarm"], found["tests"], found["alarms"]) == (True, 2, 1)
    assert found["current"] == {"images": 1, "flagged": 1}
    assert "at most 0.01 of the windows" in found["statement"]
    assert found["last"]["p_value"] <= 0.01
    for _ in range(19):
        monitor.add(0, False)
    assert not monitor.described()["alarm"]


def test_a_class_without_a_calibration_is_expected_to_flag_nothing() -> None:
    monitor = DriftMonitor(0.1, {0: 99}, window=20, level=0.01)
    for _ in range(10):
        monitor.add(1, False)
        monitor.add(0, False)
    assert monitor.last is not None
    assert monitor.last.expected == pytest.approx(1)


@pytest.mark.parametrize(
    ("window", "level", "message"),
    [(0, 0.01, "at least one image"), (10, 0.0, "chance of a false alarm"), (10, float("nan"), "false alarm"),
     (1, 0.001, "take more images for a window")],
)  # fmt: skip
def test_mistakes(window: int, level: float, message: str) -> None:
    with pytest.raises(GroodError, match=message):
        DriftMonitor(0.1, 99, window, level)
