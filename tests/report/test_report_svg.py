"""Figures as parts of a page: nothing clashes, no stand-in is left, and points lie where they are said to."""

from __future__ import annotations

import re

import matplotlib as mpl
import numpy as np
import pytest
from report_world import Page, svg_markers, svg_texts

from torch_grood.report.svg import BACK, FAINT, GRID, INK, SERIES, drawing, in_svg, series

NAMES = (
    "#010101",
    f"{FAINT}{GRID}{BACK}{series(3)}",
    'id="x"',
    'href="#x"',
    "url(#x)",
    "'DejaVu Sans', x; y",
    "<b>&amp;</b>",
    "$x^{2$",
    "-->",
)


def draw(name: str, texts: tuple[str, ...] = (), description: str = "a figure") -> str:
    with drawing(name, (4, 3), description) as found:
        axes = found.figure.add_axes((0.1, 0.1, 0.8, 0.8))
        for place in range(SERIES):
            # Markers become <use>, and clipped lines refer to a clip path.
            axes.plot([0, 1, 2], [place, 1, 5], "o-", color=series(place))
        for place, text in enumerate(texts):
            axes.text(0.1, place, text, color=INK)
    return found.text


def test_ids_are_unique_over_figures_of_the_same_kind() -> None:
    page = Page(draw("first") + draw("second"))
    ids = page.ids()
    assert len(ids) > 10
    assert len(set(ids)) == len(ids)
    assert all(one.startswith(("first-", "second-")) for one in ids)
    assert page.references()
    assert page.references() <= set(ids)


def test_all_colours_are_the_page_s() -> None:
    svg = draw("a", ("text",))
    assert not re.search(r"#0[1-5]0[0-9a-f]{3}", svg)
    assert set(re.findall(r"--series-(\d)", svg)) == {str(i) for i in range(SERIES)}
    assert "var(--ink)" in svg
    assert "var(--faint)" in svg
    # The rest is matplotlib's own black or white, which a dark page would not show.
    assert set(re.findall(r"#[0-9a-f]{6}", svg)) == set()
    assert "DejaVu" not in svg
    assert "system-ui" in svg


@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_shown_as_it_is(name: str) -> None:
    svg = draw("a", (name,), name)
    assert name in svg_texts(svg)
    top = Page(svg).all("svg")[0]
    assert top.attributes["aria-label"] == name
    assert top.attributes["role"] == "img"


def test_the_description_cannot_leave_its_attribute() -> None:
    page = Page(draw("a", (), '"><script>alert(1)</script>\\1 \\g<0>'))
    assert not page.all("script")
    assert page.all("svg")[0].attributes["aria-label"] == '"><script>alert(1)</script>\\1 \\g<0>'


def test_a_figure_fills_its_frame() -> None:
    top = Page(draw("a")).all("svg")[0].attributes
    assert top["viewbox"] == "0 0 288 216"
    # A fixed size would not fit into a narrow page.
    assert "width" not in top


def test_the_same_figure_has_the_same_bytes() -> None:
    assert draw("a") == draw("a")
    assert "<metadata>" not in draw("a") or "date" not in draw("a")


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_points_lie_where_matplotlib_draws_them(scale: str) -> None:
    x, y = [1.0, 3.0, 10.0, 7.5], [2.0, -1.0, 0.5, 4.0]
    with drawing("a", (4, 3), "points") as found:
        axes = found.figure.add_axes((0.13, 0.2, 0.7, 0.6))
        axes.set_xscale(scale)
        axes.scatter(x, y, s=20, gid="points")
        axes.margins(0.07)
        told = in_svg(axes, x, y)
    np.testing.assert_allclose(told, svg_markers(found.text, "a-points"), atol=0.051)


def test_the_session_s_own_style_has_no_part_in_it() -> None:
    plain = draw("a", ("text",))
    # Without LaTeX, usetex would fail.
    theirs = {"text.usetex": True, "axes.grid": True, "lines.linewidth": 9, "svg.fonttype": "path", "figure.dpi": 300}
    with mpl.rc_context(theirs):
        assert draw("a", ("text",)) == plain
        assert mpl.rcParams["lines.linewidth"] == 9


def test_a_letter_that_the_font_lacks_is_no_warning() -> None:
    assert "日本" in draw("a", ("日本",))


def test_colours_begin_anew() -> None:
    assert series(SERIES) == series(0)
    assert len({series(i) for i in range(SERIES)}) == SERIES
