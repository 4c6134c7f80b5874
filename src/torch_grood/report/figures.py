"""The figures of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from torch_grood._conformal import flagged_law
from torch_grood._optional import require
from torch_grood._text import plain
from torch_grood.report.svg import BACK, FAINT, GRID, INK, drawing, in_svg, series

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from torch_grood.report.closer import Places

__all__ = [
    "Dots",
    "Histogram",
    "Scatter",
    "auroc_dots",
    "method_histograms",
    "promise_curve",
    "roc_curves",
    "scatter",
    "score_histograms",
]

_WIDE = 9.0
_BINS = 60
_CURVE_POINTS = 300
_LONGEST_NAME, _LONGEST_LABEL = 46, 26
# Curves whose names would cover them in letters of the usual size.
_MANY = 6
# Lines that are told apart without colours.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
_MARKERS = "oD^svPX*"


class Histogram(NamedTuple):
    """Scores of one set.

    Attributes:
        name: of the set.
        kind: what its images are.
        score: float64 (n,).
        flagged: share of them that is flagged; None without a threshold.
        colour: place of its colour.
    """

    name: str
    kind: str
    score: NDArray[np.float64]
    flagged: float | None
    colour: int


def score_histograms(sets: Sequence[Histogram], taus: tuple[float, float] | None, *, name: str = "scores") -> str:
    """A histogram for each set of GROOD's scores on a common logarithmic axis, with τ.

    Args:
        sets: at least one.
        taus: τ, twice; the least and the greatest, if each class has its own; None: there is none.
        name: of the figure on the page.
    """
    scores = [one.score for one in sets]
    low, high = _score_range(scores, taus)
    label = "GROOD score, logarithmic: further right is less like the training images"
    placed = [_log10(one, low, high) for one in scores]
    return _histograms(name, sets, placed, _Axis(low, high, *_log_ticks(low, high), label), taus)


def method_histograms(sets: Sequence[Histogram], *, name: str) -> str:
    """A histogram for each set of a method's scores, as it gives them, on a common axis.

    The axis ends where a thousandth of the scores lies beyond; these are in the outermost bars.
    """
    scores = [one.score for one in sets]
    everything = np.concatenate(scores)
    finite = everything[np.isfinite(everything)]
    low, high = (float(end) for end in np.quantile(finite if len(finite) else [0.0], [0.001, 0.999]))
    margin = 0.02 * (high - low) or 0.02 * abs(high) or 1.0
    low, high = low - margin, high + margin
    locator = require("matplotlib.ticker", extra="report").MaxNLocator(6)
    ticks = [tick for tick in locator.tick_values(low, high).tolist() if low <= tick <= high]
    axis = _Axis(
        low, high, ticks, [f"{tick:.6g}" for tick in ticks], "score: further right is less like the training images"
    )
    return _histograms(name, sets, [one.clip(low, high) for one in scores], axis, None)


class _Axis(NamedTuple):
    low: float
    high: float
    ticks: list[float]
    names: list[str]
    label: str


def _histograms(
    name: str,
    sets: Sequence[Histogram],
    placed: Sequence[NDArray[np.float64]],
    axis: _Axis,
    taus: tuple[float, float] | None,
) -> str:
    """With the scores where they lie on the axis, and τ on one of log₁₀."""
    low, high = axis.low, axis.high
    edges = np.linspace(low, high, _BINS + 1)
    rows = len(sets)
    height = 0.95 * rows + 0.75
    lines = [max(math.log10(tau), low) if tau > 0 else low for tau in sorted(set(taus or ()))]
    with drawing(name, (_WIDE, height), _describe_histograms(sets)) as found:
        figure = found.figure
        grid = figure.add_gridspec(
            rows, 1, left=0.01, right=0.87, top=1 - 0.32 / height, bottom=0.55 / height, hspace=0.75
        )
        for row, (one, places) in enumerate(zip(sets, placed, strict=True)):
            axes = figure.add_subplot(grid[row, 0])
            counts, _ = np.histogram(places, edges)
            if lines:
                axes.axvspan(lines[0], high, color=GRID, alpha=0.45, linewidth=0)
            axes.stairs(counts, edges, fill=True, color=series(one.colour))
            for line in lines:
                axes.axvline(line, color=INK, linewidth=1.3, linestyle=(0, (4, 2)))
            axes.set_xlim(low, high)
            axes.set_ylim(0, max(1, counts.max()) * 1.02)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.set_xticks(axis.ticks, axis.names if row == rows - 1 else [""] * len(axis.ticks))
            axes.annotate(_shortened(one.name), (0, 1), (0, 5), weight="bold", color=series(one.colour), **_POINTS)
            axes.annotate(f"{one.kind}, {len(one.score):,}", (1, 1), (0, 5), ha="right", color=FAINT, **_POINTS)
            if one.flagged is not None:
                axes.text(1.02, 0.5, f"{100 * one.flagged:.1f} %\nflagged", transform=axes.transAxes, va="center")
            if row == 0 and lines:
                where: Any = axes.get_xaxis_transform()
                axes.annotate(
                    "τ", (lines[0], 1), (4, -2), xycoords=where, va="top", textcoords="offset points", size=13
                )
        axes.set_xlabel(axis.label)
    return found.text


def roc_curves(
    known: NDArray[np.float64],
    unknown: Mapping[str, NDArray[np.float64]],
    colours: Sequence[int],
    *,
    name: str = "roc",
) -> str:
    """Share of unknown images caught against known ones flagged, for every threshold; a curve for each set."""
    metrics = require("sklearn.metrics", extra="report")
    names = plain(", ".join(unknown))
    with drawing(name, (5.6, 4.6), f"ROC curves of {names}; a table has their figures") as found:
        axes = found.figure.add_axes((0.16, 0.12, 0.79, 0.86))
        axes.plot([0, 1], [0, 1], color=GRID, linewidth=1)
        axes.axvline(0.05, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.axhline(0.95, color=FAINT, linewidth=0.8, linestyle=(0, (2, 2)))
        for place, (title, scores) in enumerate(unknown.items()):
            truth = np.repeat([0, 1], [len(known), len(scores)])
            flagged, caught, _ = metrics.roc_curve(truth, np.concatenate([known, scores]))
            keep = _thinned(flagged, caught)
            axes.plot(
                flagged[keep],
                caught[keep],
                color=series(colours[place]),
                linewidth=1.8,
                linestyle=_DASHES[place % len(_DASHES)],
                label=_shortened(title, _LONGEST_LABEL),
            )
        axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="known images flagged", ylabel="unknown images caught")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.text(0.06, 0.02, "95 % of known kept", color=FAINT, fontsize=9)
        axes.text(0.99, 0.935, "95 % of unknown caught", color=FAINT, fontsize=9, ha="right", va="top")
        many = len(unknown) > _MANY
        axes.legend(loc="lower right", frameon=False, bbox_to_anchor=(1, 0.05), fontsize=8 if many else 11)
    return found.text


def promise_curve(p_values: NDArray[np.float64], rate: float, n_calibration: int | None) -> str:
    """Share of known images with p ≤ α against α, and where it lies if the promise holds.

    Args:
        p_values: of known images, float64 (n,).
        rate: that the decisions promise.
        n_calibration: held-out images; None: each class has its own, and no band is drawn.
    """
    n, most = len(p_values), min(1.0, max(0.2, 3 * rate))
    rates = np.linspace(0, most, 201)
    observed = np.searchsorted(np.sort(p_values), rates, side="right") / n
    with drawing("promise", (5.6, 4.2), "Promised and observed false alarms; the table has the numbers") as found:
        axes = found.figure.add_axes((0.16, 0.13, 0.79, 0.84))
        if n_calibration is not None:
            ranks = np.arange(1, n_calibration + 1)
            ranks = ranks[ranks / (n_calibration + 1) <= most]
            ranks = ranks[:: max(1, len(ranks) // 150)]
            laws = (np.cumsum(flagged_law(n, int(rank), n_calibration)) for rank in ranks)
            band = np.array([np.searchsorted(law, (0.025, 0.975)) for law in laws]).T / n
            axes.fill_between(ranks / (n_calibration + 1), *band, color=GRID, alpha=0.6, linewidth=0)
        axes.plot([0, most], [0, most], color=FAINT, linewidth=1, linestyle=(0, (4, 2)), label="promised, on average")
        axes.plot(rates, observed, color=series(0), linewidth=1.8, label=f"observed, {n:,} images")
        at = float((p_values <= rate).mean())
        axes.plot([rate], [at], "o", color=series(0), markersize=7, markeredgecolor=BACK, label=f"at {rate:g}")
        axes.set(xlim=(0, most), ylim=(0, max(most, float(observed.max())) * 1.02))
        axes.set(xlabel="promised false-alarm rate", ylabel="known images flagged")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
        axes.legend(loc="upper left", frameon=False)
    return found.text


class Scatter(NamedTuple):
    """A picture of points.

    Attributes:
        svg: of it.
        xy: of each point, in the units of its view box.
    """

    svg: str
    xy: list[tuple[float, float]]


def scatter(places: Places, sets: NDArray[np.int64], colours: Sequence[int], view: str) -> Scatter:
    """Gradients in one of their views, those of the training images in grey behind them.

    Args:
        places: of the points.
        sets: which set each point belongs to, int64 (m,).
        colours: place of each set's colour.
        view: "polar": log π against the angle to the nearest class direction; "plane": the plane of the training
            gradients.
    """
    polar = view == "polar"
    if polar:
        x, y = places.angle, places.log_magnitude / math.log(10)
        behind = places.training_angle, places.training_log_magnitude / math.log(10)
        what = "length and angle of the gradients"
    else:
        (x, y), behind = places.plane.T, tuple(places.training_plane.T)
        what = "the gradients on the plane of the training gradients"
    with drawing(view, (5.6, 4.6), f"A point for each image: {what}") as found:
        axes = found.figure.add_axes((0.17, 0.12, 0.8, 0.86))
        axes.scatter(*behind, s=9, color=FAINT, alpha=0.4, linewidths=0)
        for place, colour in enumerate(colours):
            here = sets == place
            marker = _MARKERS[colour % len(_MARKERS)]
            how: dict[str, Any] = {"s": 15, "alpha": 0.65, "linewidths": 0, "gid": f"set-{place}"}
            axes.scatter(x[here], y[here], color=series(colour), marker=marker, **how)
        axes.margins(0.03)
        if polar:
            axes.set(xlabel="angle to the nearest class direction", ylabel="π, the length of the gradient, logarithmic")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}°")
            low, high = _with_margin(np.concatenate([y, behind[1]]))
            axes.set_ylim(low, high)
            axes.set_yticks(*_log_ticks(low, high))
        else:
            first, second = (f"{100 * share:.0f} %" for share in places.variance)
            axes.set(xlabel=f"first principal axis ({first} of the variance)", ylabel=f"second ({second})")
            for place, (name, at) in enumerate(zip(places.class_names, places.class_plane.tolist(), strict=True)):
                how = {"ha": "center", "va": "center", "weight": "bold", "size": 10, "gid": f"class-{place}"}
                axes.text(at[0], at[1], _shortened(name, 16), **how)
        xy = in_svg(axes, x, y)
    return Scatter(found.text, xy)


class Dots(NamedTuple):
    """One figure of each method: its value and 95 % interval, as shares; and whether it is to be seen at once."""

    labels: Sequence[str]
    values: Sequence[float]
    intervals: Sequence[tuple[float, float] | None]
    is_marked: Sequence[bool]


def auroc_dots(name: str, title: str, dots: Dots) -> str:
    """AUROC of methods, one below the other."""
    height = 0.23 * len(dots.labels) + 0.6
    with drawing(name, (5.4, height), f"{title}; the table has the numbers") as found:
        left = 0.38
        axes = found.figure.add_axes((left, 0.48 / height, 0.95 - left, 1 - 0.5 / height))
        for row, (_, value, interval, is_marked) in enumerate(zip(*dots, strict=True)):
            colour = series(0) if is_marked else FAINT
            if interval is not None:
                axes.plot([100 * end for end in interval], [row, row], color=colour, linewidth=2, alpha=0.7)
            axes.plot([100 * value], [row], "o", color=colour, markersize=5.5)
        axes.set_yticks(
            range(len(dots.labels)), [_shortened(label, _LONGEST_LABEL) for label in dots.labels], fontsize=9.5
        )
        for is_marked, text in zip(dots.is_marked, axes.get_yticklabels(), strict=True):
            text.set_fontweight("bold" if is_marked else "normal")
        axes.set_ylim(len(dots.labels) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{title}, %")
    return found.text


_POINTS: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 11}


def _score_range(scores: Sequence[NDArray[np.float64]], taus: tuple[float, float] | None) -> tuple[float, float]:
    """Of log₁₀ S; a score of 0, a copy of a training image, has no place there and goes into the lowest bin."""
    everything = np.concatenate([*scores, np.array(taus or ())])
    positive = everything[everything > 0]
    return _with_margin(np.log10(positive) if len(positive) else np.array([-1.0, 0.0]))


def _with_margin(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = max(0.02 * (high - low), 0.02)
    return low - margin, high + margin


def _log10(scores: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = np.clip(np.log10(scores), low, high)
    return found


def _log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Where round numbers lie on an axis of log₁₀, and their names: powers of ten, or closer where there is room."""
    decade = math.floor(low)
    if high - low < 1:
        locator = require("matplotlib.ticker", extra="report").MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
        numbers = locator.tick_values(10 ** (low - decade), 10 ** (high - decade)).tolist()
        found = [(decade, number) for number in numbers if number > 0]
    else:
        exponents = range(decade, math.ceil(high) + 1)
        exponents = exponents[:: math.ceil(len(exponents) / 8)]
        found = [(exponent, step) for exponent in exponents for step in ((1, 2, 5) if high - low < 3 else (1,))]
    ticks = {exponent + math.log10(number): _number(number, exponent) for exponent, number in found}
    shown = {tick: name for tick, name in ticks.items() if low <= tick <= high}
    return list(shown), list(shown.values())


def _number(number: float, exponent: int) -> str:
    """number · 10^exponent, which float64 may be too small for."""
    if number >= 10:
        number, exponent = number / 10, exponent + 1
    return f"{number * 10.0**exponent:.4g}" if abs(exponent) < 5 else f"{number:.4g}e{exponent}"


def _thinned(flagged: NDArray[np.float64], caught: NDArray[np.float64]) -> NDArray[np.int64]:
    """Points of a curve that a page needs: evenly along it, both ends among them."""
    length = np.concatenate([[0], np.cumsum(np.abs(np.diff(flagged)) + np.abs(np.diff(caught)))])
    wanted = np.linspace(0, length[-1], _CURVE_POINTS)
    keep: NDArray[np.int64] = np.unique(np.searchsorted(length, wanted).clip(max=len(length) - 1))
    return keep


def _describe_histograms(sets: Sequence[Histogram]) -> str:
    parts = []
    for one in sets:
        flagged = "" if one.flagged is None else f", {100 * one.flagged:.1f} % flagged"
        parts.append(f"{plain(one.name)}: median score {np.median(one.score):.3g}{flagged}")
    return f"Histograms of the scores. {'; '.join(parts)}"


def _shortened(name: str, most: int = _LONGEST_NAME) -> str:
    name = plain(name)
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    # A legend leaves out what begins with an underscore.
    return f"\u200a{name}" if name.startswith("_") else name
