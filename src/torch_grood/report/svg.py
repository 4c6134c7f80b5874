"""matplotlib's figures as SVG that belongs to the page: its colours, its fonts, no names that clash.

A figure is drawn in stand-in colours, which become the page's CSS variables: so one figure serves a light page, a dark
one and paper. Texts stay texts: small, sharp, found by a search, read aloud.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from torch_grood._optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BACK", "FAINT", "GRID", "INK", "SERIES", "Drawing", "drawing", "in_svg", "series"]

SERIES = 8
"""Colours that can be told apart, also by the colour-blind; the page's style sheet has them."""
INK, FAINT, GRID, BACK = "#010101", "#020202", "#030303", "#040404"
_NAMES = {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--rule)", BACK: "var(--back)"}
_NAMES |= {f"#0500{i:02x}": f"var(--series-{i})" for i in range(SERIES)}
# The backend counts in points.
_DPI = 72
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_ID = re.compile(r'\bid="([^"]+)"')
_REFERENCE = re.compile(r'((?:xlink:)?href="#|url\(#)([^")]+)')
_HEAD = re.compile(r'<svg [^>]*viewBox="([^"]+)"[^>]*>')
# matplotlib escapes ">" in attributes and in texts.
_TAG = re.compile(r"<[^>]+>")
_FONT = re.compile(r"'DejaVu Sans'(, [^;\"]*)?")


class Drawing:
    """What a figure has become; `text` is there when its block is over.

    Attributes:
        figure: to draw on.
        text: the SVG element, `Markup`.
    """

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.text = ""


@contextmanager
def drawing(name: str, size: tuple[float, float], description: str) -> Iterator[Drawing]:
    """Draw one figure.

    Args:
        name: of it on the page, in letters and digits.
        size: width and height in inches.
        description: of what it shows, for those who cannot see it.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    styles, figures = require("matplotlib.style", extra="report"), require("matplotlib.figure", extra="report")
    # A session may have a style of its own, or LaTeX for all texts.
    with styles.context(["default", {**_STYLE, "svg.hashsalt": name}]), warnings.catch_warnings():
        # Letters that the font lacks, of whatever a set is called, are drawn by the browser.
        warnings.simplefilter("ignore", UserWarning)
        found = Drawing(figures.Figure(figsize=size, dpi=_DPI))
        yield found
        content = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        found.figure.savefig(content, format="svg", metadata=nothing)
    found.text = _of_page(content.getvalue(), name, description)


def series(place: int) -> str:
    """Colour of the n-th series."""
    return f"#0500{place % SERIES:02x}"


def in_svg(axes: Axes, x: Sequence[float] | Any, y: Sequence[float] | Any) -> list[tuple[float, float]]:
    """Where points lie in the units of the figure's view box; to be asked when all limits are set."""
    figure: Any = axes.figure
    height = figure.get_size_inches()[1] * _DPI
    # Limits that follow the data are found when they are asked for, which the transform does not do.
    axes.get_xlim(), axes.get_ylim()
    found = axes.transData.transform(list(zip(x, y, strict=True)))
    return [(round(float(px), 1), round(float(height - py), 1)) for px, py in found]


def _of_page(svg: str, name: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    # Not in texts: those are names, which may look like anything.
    svg = _TAG.sub(lambda tag: _tag_of_page(tag[0], name), svg)
    svg = _HEAD.sub(_head(description), svg, count=1)
    safe: str = require("markupsafe", extra="report").Markup(svg.strip())
    return safe


def _tag_of_page(tag: str, name: str) -> str:
    tag = _ID.sub(rf'id="{name}-\1"', tag)
    tag = _REFERENCE.sub(rf"\g<1>{name}-\2", tag)
    tag = _FONT.sub("system-ui, sans-serif", tag)
    for colour, variable in _NAMES.items():
        tag = tag.replace(colour, variable)
    return tag


def _head(description: str) -> Callable[[re.Match[str]], str]:
    def head(found: re.Match[str]) -> str:
        return f'<svg viewBox="{found[1]}" role="img" aria-label="{escape(description)}">'

    return head
