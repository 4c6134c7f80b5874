"""The figures of a report, whatever the scores and the names are."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from report_world import HOSTILE, Page, svg_elements, svg_markers
from report_world import svg_texts as texts
from scipy.stats import betabinom
from sklearn.metrics import roc_auc_score

from torch_grood.report.closer import Places
from torch_grood.report.figures import (
    Dots,
    Histogram,
    _log_ticks,
    _thinned,
    auroc_dots,
    method_histograms,
    promise_curve,
    roc_curves,
    scatter,
    score_histograms,
)

ODD_SCORES = {
    "zeros": [0.0, 0.0],
    "equal": [0.7] * 9,
    "one": [0.3],
    "narrow": [0.55, 0.6, 0.61],
    "narrow and small": [5.5e-7, 6e-7],
    "huge": [1e-300, 1e3],
    "denormal": [5e-324, 1.0],
    "with zero": [0.0, 1e-3, 2.0],
}


def histogram(scores: list[float], name: str = "a set", flagged: float | None = 0.125) -> Histogram:
    return Histogram(name, "known images (ID)", np.array(scores), flagged, 0)


def bars(svg: str) -> list[list[float]]:
    """Heights of the 60 bars of each histogram, in units of the picture."""
    found = []
    for one in re.findall(r'<path d="([^"]+)"[^>]*style="fill: var\(--series', svg):
        ys = [float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", one)]
        found.append([max(ys) - y for y in ys[1::2][:60]])
    return found


@pytest.mark.parametrize("scores", ODD_SCORES.values(), ids=ODD_SCORES)
@pytest.mark.parametrize("taus", [None, (0.0, 0.0), (0.5, 0.5), (1e-9, 2e-3)])
def test_any_scores_have_an_axis(scores: list[float], taus: tuple[float, float] | None) -> None:
    svg = score_histograms([histogram(scores)], taus)
    found = texts(svg)
    ticks = [float(one) for one in found if re.fullmatch(r"[\d.]+(e-?\d+)?", one)]
    assert len(ticks) >= 2
    assert sorted(ticks) == ticks
    assert len(set(ticks)) == len(ticks)
    assert ("τ" in found) == (taus is not None)
    assert "12.5 %" in " ".join(found)
    assert "nan" not in svg
    assert [max(one) > 20 for one in bars(svg)] == [True]


@given(st.floats(-320, 3), st.floats(0.04, 320))
@settings(max_examples=200, deadline=None)
def test_ticks_are_where_their_names_say(low: float, width: float) -> None:
    high = low + width
    ticks, names = _log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert len(set(names)) == len(names)
    for tick, name in zip(ticks, names, strict=True):
        assert low <= tick <= high
        mantissa, _, exponent = name.partition("e")
        assert len(name) <= 10
        assert math.log10(float(mantissa)) + int(exponent or 0) == pytest.approx(tick, abs=2e-3 * max(1, width))


def test_ticks_of_lengths_that_no_float_holds() -> None:
    ticks, names = _log_ticks(-43429.9, -43400.1)
    assert names[0] == "1e-43426"
    assert ticks[0] == -43426
    assert len(names) > 5


def test_every_image_is_in_its_row() -> None:
    # A score of 0, of a copy of a training image, has no place on the axis and goes into the lowest bin.
    svg = score_histograms([histogram([0.0] * 5 + [1.0] * 5), histogram([1.0] * 9 + [1.09], "b")], None)
    first, second = bars(svg)
    assert np.flatnonzero(first).tolist() == [0, 15]
    assert first[0] == first[15]
    assert np.flatnonzero(second).tolist()[0] == 15
    assert second[15] == pytest.approx(9 * min(one for one in second if one), rel=1e-3)
    assert texts(svg).count("known images (ID), 10") == 2


def test_tau_of_each_class_is_two_lines() -> None:
    def lines(taus: tuple[float, float]) -> int:
        return score_histograms([histogram([0.1, 1.0])], taus).count("stroke-dasharray")

    assert lines((0.2, 0.5)) == lines((0.2, 0.2)) + 1


@pytest.mark.parametrize(
    "scores",
    [
        [-9.5, -3.0, 0.0],
        [1e-9, 2e-9],
        [-1e7, -9e6],
        [5.0] * 4,
        [-1e6] * 3,
        [0.0],
        [-np.inf, 1.0, 2.0],
        [np.inf],
        [1e300, -1e300],
    ],
)
def test_a_method_s_scores_have_an_axis_of_their_own(scores: list[float]) -> None:
    svg = method_histograms([histogram(scores), histogram(scores[:1], "b")], name="scores-1")
    first, second = bars(svg)
    assert max(first) > 20
    assert np.count_nonzero(second) == 1
    assert np.count_nonzero(first) == len(set(scores))
    ticks = [float(one.replace("−", "-")) for one in texts(svg) if re.fullmatch(r"[-−]?[\d.]+(e[+-]?\d+)?", one)]
    assert len(ticks) >= 2
    assert ticks == sorted(set(ticks))


def test_an_outlier_does_not_press_a_method_s_scores_together() -> None:
    random = np.random.default_rng(0)
    scores = [*random.normal(size=3000), 1e6]
    (found,) = bars(method_histograms([histogram(scores)], name="scores-1"))
    assert np.count_nonzero(found) > 40
    assert found[-1] > 0


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_is_shown(name: str) -> None:
    whole = name.replace("\udc80", "\\udc80")
    shown = "n" * 45 + "…" if len(name) > 46 else whole
    svg = score_histograms([histogram([0.1, 1.0], name)], None)
    assert shown in [one.strip("\u200a") for one in texts(svg)]
    assert not Page(svg).all("script")
    label = Page(svg).all("svg")[0].attributes["aria-label"]
    assert f"{whole}: median score 0.55, 12.5 % flagged" in label
    curve = roc_curves(np.array([0.1, 0.4]), {name: np.array([0.3, 0.5])}, [1])
    in_legend = f"{whole[:25]}…" if len(name) > 26 else whole
    assert in_legend in [one.strip("\u200a") for one in texts(curve)]
    dots = auroc_dots("dots", "AUROC", Dots([name], [0.8], [None], [True]))
    assert in_legend in [one.strip("\u200a") for one in texts(dots)]


def test_a_name_does_not_cover_the_axis_of_the_curve() -> None:
    names = {f"{i} " + "W" * 60: np.array([0.3, 0.5]) for i in range(10)}
    svg = roc_curves(np.array([0.1, 0.4]), names, range(10))
    for one in svg_elements(svg):
        if one.tag.endswith("}text") and "W" in "".join(one.itertext()):
            assert float(one.get("x", "")) > 0.16 * 403 + 20


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_a_thinned_curve_is_the_curve(n: int) -> None:
    random = np.random.default_rng(n)
    known, unknown = random.normal(size=n), random.normal(1, 1, n)
    from sklearn.metrics import roc_curve

    flagged, caught, _ = roc_curve([0] * n + [1] * n, np.concatenate([known, unknown]))
    keep = _thinned(flagged, caught)
    assert len(keep) <= 300
    assert (keep[0], keep[-1]) == (0, len(flagged) - 1)
    exact = roc_auc_score([0] * n + [1] * n, np.concatenate([known, unknown]))
    assert np.trapezoid(caught[keep], flagged[keep]) == pytest.approx(exact, abs=0.005)


def vertices(path: str) -> NDArray[np.float64]:
    return np.array(re.findall(r"([-\d.]+) ([-\d.]+)", path), dtype=np.float64)


def in_data(svg: str, style: str, most: tuple[float, float]) -> NDArray[np.float64]:
    """The vertices of the longest path of a style, in units of the axes, which begin at 0."""
    paths = [vertices(path) for path in re.findall(rf'<path d="([^"]+)"[^>]*style="{style}', svg)]
    frame = vertices(re.findall(r'<path d="([^"]+)"\s*style="fill: none"', svg)[1])
    low, high = frame.min(0), frame.max(0)
    found = max(paths, key=len)
    x, y = (found[:, 0] - low[0]) / (high[0] - low[0]), (high[1] - found[:, 1]) / (high[1] - low[1])
    return np.stack([x * most[0], y * most[1]], 1)


def test_the_observed_share_is_drawn() -> None:
    p_values = np.random.default_rng(0).integers(1, 102, 80) / 101
    svg = promise_curve(p_values, 0.05, None)
    shares = [(p_values <= rate).mean() for rate in np.linspace(0, 0.2, 201)]
    curve = in_data(svg, r"fill: none; stroke: var\(--series-0\)", (0.2, max(0.2, *shares) * 1.02))
    assert len(curve) > 20
    for rate, share in curve:
        assert share == pytest.approx((p_values <= rate + 1e-6).mean(), abs=1e-4)
    assert "observed, 80 images" in texts(svg)


def test_an_image_at_a_rate_is_flagged_at_it() -> None:
    # A p-value of α is at most α.
    p_values = np.linspace(0, 0.2, 201)[[50, 100]]
    curve = in_data(promise_curve(p_values, 0.05, None), r"fill: none; stroke: var\(--series-0\)", (0.2, 1.02))
    assert curve[np.isclose(curve[:, 0], 0.05, atol=1e-5), 1].max() == pytest.approx(0.5, abs=1e-4)
    assert curve[-1, 1] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("n", "rate"), [(1, 0.5), (5, 0.2), (50, 0.9), (1000, 0.05), (20_000, 0.0001)])
def test_any_calibration_has_a_curve(n: int, rate: float) -> None:
    svg = promise_curve(np.array([1 / (n + 1), 1.0]), rate, n)
    assert "nan" not in svg
    assert f"at {rate:g}" in texts(svg)


def test_the_band_is_the_law() -> None:
    n, p_values = 99, np.linspace(0.001, 1, 200)
    svg = promise_curve(p_values, 0.1, n)
    band = in_data(svg, r"fill: var\(--rule\); fill-opacity", (0.3, 0.3 * 1.02))
    for rate, share in band:
        rank = round(rate * (n + 1))
        assert rate == pytest.approx(rank / (n + 1), abs=1e-5)
        limits = [betabinom.ppf(level, 200, rank, n + 1 - rank) / 200 for level in (0.025, 0.975)]
        assert min(abs(share - limit) for limit in limits) < 1e-4
    assert {round(rate * 100) for rate, _ in band} == set(range(1, 31))


def places(m: int = 6, shift: float = 0.0) -> Places:
    random = np.random.default_rng(0)

    def some(*shape: int) -> NDArray[np.float64]:
        return random.normal(size=shape)

    own, training = (some(m) + 40, some(m) + shift, some(m, 2)), (some(9), some(9) + shift, some(9, 2))
    return Places(*own, *training, ("$a_",), some(1, 2), (0.5, 0.25))


@pytest.mark.parametrize("view", ["polar", "plane"])
@pytest.mark.parametrize("shift", [0.0, -2.0, -1e5])
def test_the_script_finds_points_where_they_are(view: str, shift: float) -> None:
    sets = np.array([0, 0, 1, 2, 2, 2])
    found = scatter(places(shift=shift), sets, [0, 1, 8], view)
    for place in range(3):
        told = np.array(found.xy)[sets == place]
        np.testing.assert_allclose(told, svg_markers(found.svg, f"{view}-set-{place}"), atol=0.051)
    assert np.isfinite(found.xy).all()
    assert ("$a_" in texts(found.svg)) == (view == "plane")
    assert ("first principal axis (50 % of the variance)" in texts(found.svg)) == (view == "plane")


def test_a_set_without_a_point_can_be_hidden_all_the_same() -> None:
    found = scatter(places(), np.zeros(6, dtype=np.int64), [0, 1], "polar")
    assert svg_markers(found.svg, "polar-set-1") == []


@pytest.mark.parametrize("value", [0.0, -900.0, -1e5])
def test_lengths_that_are_all_the_same(value: float) -> None:
    same = replace(places(), log_magnitude=np.full(6, value), training_log_magnitude=np.full(9, value))
    found = scatter(same, np.zeros(6, dtype=np.int64), [0], "polar")
    assert len({y for _, y in found.xy}) == 1
    assert 0 < found.xy[0][1] < 4.6 * 72


def test_dots_show_values_and_intervals() -> None:
    dots = Dots(["GROOD", "MSP", "KNN"], [0.9, 0.8, 0.85], [(0.88, 0.92), None, (0.8, 0.9)], [True, False, False])
    svg = auroc_dots("dots", "near AUROC", dots)
    assert [one for one in texts(svg) if one in dots.labels] == list(dots.labels)
    assert "near AUROC, %" in texts(svg)
    bold = re.findall(r"<text[^>]*style=\"[^\"]*(?:bold|700)[^\"]*\"[^>]*>([^<]+)<", svg)
    assert bold == ["GROOD"]
    assert "series-0" in svg
