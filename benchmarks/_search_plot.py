"""The tables and the figure of `search.py`, from its JSON."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np

from torch_grood._optional import require

__all__ = ["figure", "header", "markdown", "text_notes", "text_row"]

_COLUMNS = (
    "method", "build s", "B/image", "ID, 1", "OOD, 1", "ID, 256", "OOD, 256", "recall", "infl.", "AUROC", "Δ", "peak",
)  # fmt: skip
_WIDTHS = (37, 7, 7, 14, 14, 14, 14, 6, 6, 5, 5, 4)
_KEYS = ("ID 1", "OOD 1", "ID 256", "OOD 256")


def header(reference: str) -> str:
    """The head of the table in text."""
    first = f"{'':{sum(_WIDTHS[:3]) + 3}s}queries a second (× {reference}), batches of 1 and 256"
    return f"{first}\n{_aligned(_COLUMNS)}\n{_aligned('-' * width for width in _WIDTHS)}"


def text_row(row: dict[str, Any]) -> str:
    """One row of the table in text."""
    return _aligned(_cells(row))


def _aligned(cells: Iterable[str]) -> str:
    pairs = list(zip(cells, _WIDTHS, strict=True))
    return " ".join(f"{cell:{'<' if i == 0 else '>'}{width}s}" for i, (cell, width) in enumerate(pairs))


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["method"], _number(row["build seconds"]), f"{row['bytes']:,.0f}"]
    cells += [f"{_number(row['rates'][key])} ({_number(row['ratios'][key])}×)" for key in _KEYS]
    quality = {"recall": "", "inflation": "", "auroc": "", "delta auroc": ""}
    if "recall" in row:
        quality["recall"], quality["inflation"] = f"{100 * row['recall']:.2f}", f"{row['inflation']:.4f}"
        quality["delta auroc"] = _points(row["delta auroc"])
    if "auroc" in row:
        quality["auroc"] = f"{100 * row['auroc']:.2f}"
    cells += quality.values()
    return [*cells, f"{row['peak']:.1f}"]


def _number(x: float) -> str:
    """Two significant digits or more, without an exponent."""
    if x < 0.005 or x >= 100:
        return f"{x:,.0f}"
    return f"{x:.{max(0, 1 - math.floor(math.log10(x)))}f}"


def text_notes(data: dict[str, Any]) -> str:
    """What stands under the table in text."""
    return "\n".join(textwrap.fill(line, 148, subsequent_indent="    ") for line in _notes(data))


def _notes(data: dict[str, Any]) -> list[str]:
    """The settings, facts, how exact search went about it, and how much its bounds let through."""
    facts = (data["settings"], data["facts"])
    lines = [", ".join(f"{key}: {_plain(value)}" for key, value in part.items()) for part in facts if part]
    for row in data["rows"]:
        if "widths" in row:
            words = [f"principal directions {', then '.join(map(str, row['widths'])) or 'none, brute force'}"]
            words += [f"{key} {row[key]:.4g}" for key in ("covering radius",) if key in row]
            words += [f"peak {row['peak when built']:.1f} GiB when built"]
            lines.append(f"{row['method']}: {'; '.join(words)}")
        for width, share in row.get("passing", {}).items():
            shares = ", ".join(f"{100 * value:.2g} % for {kind} queries" for kind, value in share.items())
            lines.append(f"{row['method']}: rows that the bound with {width} directions lets through: {shares}")
        if "recall" in row and "label" in row:
            lines.append(f"{row['method']}: recall {100 * row['recall']:.2f} %, ΔAUROC {_points(row['delta auroc'])}")
    if checked := sorted({row["checked"] for row in data["rows"] if "checked" in row}):
        numbers = " or (brute force) ".join(f"{n:,}" for n in reversed(checked))
        lines.append(f"recall, inflation and Δ are of {numbers} queries; c: rows proposed by faiss that are re-scored")
    return lines


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _points(difference: float) -> str:
    """In points of a hundred, without a sign for what is 0."""
    text = f"{100 * difference:+.2f}"
    return "0.00" if float(text) == 0 else text


def markdown(data: dict[str, Any]) -> str:
    """A JSON file as a Markdown table with its title and notes."""
    growing = "label" in data["rows"][0] if data["rows"] else False
    names, rows = _growth_table(data) if growing else (list(_COLUMNS), [_cells(row) for row in data["rows"]])
    lines = [f"### {data['title']}", "", f"| {' | '.join(names)} |", "|---|" + "--:|" * (len(names) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    if growing:
        lines += ["", "Milliseconds a query; exponent: of N, by least squares on the logarithms.", ""]
    else:
        lines += ["", f"Queries a second (× {data['reference']}), of ID and OOD queries, in batches of 1 and 256.", ""]
    return "\n".join([*lines, *(f"- {line}" for line in _notes(data))])


def _curves(data: dict[str, Any]) -> dict[tuple[str, str], dict[int, float]]:
    """(method, kind and batch) → {N: seconds a query}."""
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for row in sorted(data["rows"], key=lambda row: row["n"]):
        for key, seconds in row["seconds"].items():
            curves.setdefault((row["label"], key), {})[row["n"]] = seconds
    return curves


def _exponent(curve: dict[int, float]) -> float:
    """b of time ~ N^b."""
    if len(curve) < 2:
        return math.nan
    return float(np.polyfit(np.log(list(curve)), np.log(list(curve.values())), 1)[0])


def _growth_table(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    sizes = sorted({row["n"] for row in data["rows"]})
    rows = []
    for (label, key), curve in sorted(_curves(data).items()):
        cells = [f"{1e3 * curve[n]:.3g}" if n in curve else "" for n in sizes]
        rows.append([label, key.replace(" ", ", "), *cells, f"{_exponent(curve):.2f}"])
    return ["method", "batch", *(f"N = {n:,}" for n in sizes), "exponent"], rows


# Okabe and Ito's colours, which the colour-blind can tell apart; the markers differ as well.
_FAMILIES = {
    "brute force": ("#000000", "s"),
    "exact, pruned by bounds": ("#0072B2", "o"),
    "exact, of a tenth of the gradients": ("#56B4E9", "P"),
    "inverted lists": ("#E69F00", "^"),
    "inverted lists, quantized": ("#D55E00", "v"),
    "graph": ("#009E73", "D"),
}
_INK, _FAINT = "#222222", "#8a8a8a"


def _family(method: str) -> str:
    families = list(_FAMILIES)
    if method.startswith("ExactIndex"):
        return families[2 if "10 %" in method else 1]
    if "HNSW" in method:
        return families[5]
    if "IVF" in method:
        return families[3 if ",Flat" in method else 4]
    return families[0]


def figure(results: list[dict[str, Any]]) -> bytes:
    """A PNG: a panel of recall against speed for each data set, and one of time against N.

    Args:
        results: the JSON of each file.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    matplotlib = require("matplotlib", extra="bench")
    figure_module = require("matplotlib.figure", extra="bench")
    canvas = require("matplotlib.backends.backend_agg", extra="bench")
    lines = require("matplotlib.lines", extra="bench")
    n_rows = -(-len(results) // 2)
    with matplotlib.rc_context({"font.size": 9, "axes.edgecolor": _FAINT, "text.color": _INK}):
        drawn = figure_module.Figure(figsize=(13, 0.7 + 5 * n_rows), dpi=150, facecolor="white", layout="constrained")
        canvas.FigureCanvasAgg(drawn)
        panels = drawn.subplots(n_rows, min(2, len(results)), squeeze=False).flatten()
        ordered = sorted(results, key=lambda data: (data["name"].startswith("growth"), data["settings"]["dimension"]))
        labels = [
            (_growth_panel if data["name"].startswith("growth") else _speed_panel)(axes, data)
            for axes, data in zip(panels, ordered, strict=False)
        ]
        for axes in panels[len(results) :]:
            axes.set_axis_off()
        handles = [
            lines.Line2D([], [], color=colour, marker=marker, linestyle="", label=family)
            for family, (colour, marker) in _FAMILIES.items()
        ]
        drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        drawn.canvas.draw()
        drawn.set_layout_engine("none")
        for axes, points in zip(panels, labels, strict=False):
            _place_labels(axes, points)
        buffer = io.BytesIO()
        # Without the software's version, the same figure is the same bytes.
        drawn.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


_Point = tuple[float, float, str, str]


def _speed_panel(axes: Any, data: dict[str, Any]) -> list[_Point]:
    """Points (x, y, label, colour) of the methods."""
    points: list[_Point] = []
    for row in data["rows"]:
        # Rows with more candidates are in the table; they lie close to these.
        if "recall" not in row or row["method"].endswith(", c 32"):
            continue
        # Of as many ID as OOD queries.
        rate = 2 / (1 / row["rates"]["ID 256"] + 1 / row["rates"]["OOD 256"])
        colour, marker = _FAMILIES[_family(row["method"])]
        axes.plot(rate, row["recall"], marker, color=colour, markersize=6)
        points.append((rate, row["recall"], _short(row["method"]), colour))
    # High recalls are what differs.
    shift = 1.003
    axes.set_xscale("log")
    axes.set_yscale("function", functions=(lambda y: -np.log10(np.maximum(shift - y, 1e-9)), lambda y: shift - 10**-y))
    rates, recalls = [p[0] for p in points], [p[1] for p in points]
    low = min([0.9, *recalls])
    bottom = shift - (shift - low) * 1.25
    axes.set_ylim(bottom, 1.0018)
    axes.set_xlim(min(rates) / 2.2, max(rates) * 2.2)
    ticks = [tick for tick in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1) if tick >= bottom]
    axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.grid(color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_title(data["title"], fontsize=9.5, loc="left")
    threads = data["settings"]["torch threads"]
    axes.set_xlabel(
        f"queries a second, in batches of 256, on {threads} thread{'s'[: threads > 1]}   "
        "(faiss: 8 candidates re-scored)"
    )
    axes.set_ylabel("recall: true nearest gradient found")
    return points


def _short(method: str) -> str:
    """The method's name in two lines."""
    method = method.removesuffix(", c 8")
    name, _, rest = method.replace("ExactIndex, ", "exact, ").replace(",Flat, ", ",Flat\n").rpartition("\n")
    if name:
        return f"{name}\n{rest}"
    for parameter in (", nprobe", ", efSearch"):
        rest = rest.replace(parameter, f"\n{parameter[2:]}")
    return rest


def _growth_panel(axes: Any, data: dict[str, Any]) -> list[_Point]:
    points: list[_Point] = []
    curves = _curves(data)
    for label in dict.fromkeys(label for label, _ in curves):
        colour, marker = _FAMILIES[_family(label)]
        for size, style in (("1", "--"), ("256", "-")):
            kinds = [curve for (name, key), curve in curves.items() if name == label and key.split()[1] == size]
            mean = {n: float(np.mean([curve[n] for curve in kinds])) for n in kinds[0]}
            axes.plot(list(mean), [1e3 * t for t in mean.values()], style, marker=marker, color=colour, markersize=4)
            text = f"{label.partition(',Flat, ')[0]}, {'batches of 256' if size == '256' else 'one at a time'}"
            points.append((max(mean), 1e3 * mean[max(mean)], f"{text}: $N^{{{_exponent(mean):.2f}}}$", colour))
    sizes = sorted({row["n"] for row in data["rows"]})
    axes.set(xscale="log", yscale="log", xlim=(sizes[0] / 1.3, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.7))
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.grid(color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_title(data["title"], fontsize=9.5, loc="left")
    axes.set_xlabel("stored gradients N")
    axes.set_ylabel("milliseconds a query")
    return points


def _place_labels(axes: Any, points: list[_Point]) -> None:
    """Write each label as near to its point as it has room, with a line to it if that is not close."""
    to_rgb = require("matplotlib.colors", extra="bench").to_rgb
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    scale = axes.figure.dpi / 72
    places = [axes.transData.transform((x, y)) for x, y, *_ in points]
    markers = [_box(x, y, 9 * scale, 9 * scale) for x, y in places]
    # Every line's points, too: a label does not lie on a curve.
    for line in axes.lines:
        markers += [_box(x, y, 6 * scale, 6 * scale) for x, y in axes.transData.transform(_dense(line))]
    taken: list[tuple[float, float, float, float]] = []
    order = sorted(range(len(points)), key=lambda i: places[i][0])
    for i in order:
        x, y = places[i]
        ink = tuple(0.72 * part for part in to_rgb(points[i][3]))
        text = axes.text(0, 0, points[i][2], color=ink, fontsize=8, ha="center", va="center", linespacing=0.95)
        extent = text.get_window_extent(renderer)
        width, height = extent.width + 3 * scale, extent.height + 2 * scale
        best, best_cost = (x, y, 0.0), math.inf
        for reach in (7, 14, 22, 32, 44, 58, 74, 92, 112, 134):
            for angle in np.arange(24) * (2 * np.pi / 24):
                dx, dy = np.cos(angle), np.sin(angle)
                centre_x = x + dx * (reach * scale + width / 2)
                centre_y = y + dy * (reach * scale + height / 2)
                box = _box(centre_x, centre_y, width, height)
                inside = box[0] > frame.x0 and box[2] < frame.x1 and box[1] > frame.y0 and box[3] < frame.y1
                steps = [(x + t * (centre_x - x), y + t * (centre_y - y)) for t in np.linspace(0.15, 1, 12)]
                # Worst is to leave the panel, then to hide a label, marker or curve, then to strike a label through.
                clashes = 30 * sum(_overlap(box, other) for other in taken)
                clashes += 10 * sum(_overlap(box, other) for other in markers)
                clashes += sum(_overlap(_box(*step, 1, 1), other) for step in steps for other in taken)
                cost = reach + 20 * clashes + 100_000 * (not inside)
                if cost < best_cost:
                    best, best_cost = (centre_x, centre_y, reach), cost
            if best_cost <= reach:
                break
        taken.append(_box(best[0], best[1], width, height))
        text.set_position(axes.transData.inverted().transform(best[:2]))
        if best[2] > 10:
            end = axes.transData.inverted().transform(_edge((x, y), best[:2], width, height))
            axes.plot([points[i][0], end[0]], [points[i][1], end[1]], color=points[i][3], linewidth=0.6, zorder=1)


def _dense(line: Any) -> Any:
    """A line's points, and some between them as it is drawn."""
    x, y = (np.asarray(values, dtype=float) for values in line.get_data())
    if len(x) < 2:
        return np.column_stack([x, y])
    position = np.linspace(0, len(x) - 1, 12 * len(x))
    logs = [np.exp(np.interp(position, np.arange(len(x)), np.log(values))) for values in (x, y)]
    return np.column_stack(logs)


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _edge(point: tuple[float, float], centre: tuple[float, float], width: float, height: float) -> tuple[float, float]:
    """Where the line from a point to a box's centre meets the box."""
    dx, dy = point[0] - centre[0], point[1] - centre[1]
    t = min(width / 2 / max(abs(dx), 1e-9), height / 2 / max(abs(dy), 1e-9), 1.0)
    return centre[0] + t * dx, centre[1] + t * dy
