"""Explanations for people and for programs: blocks of text, nested JSON, and flat columns for CSV and Parquet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch_grood._text import encodable, plain
from torch_grood.cli._results import Results, Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

__all__ = ["FLAT_COLUMNS", "decision_word", "explanation_of", "flat_explanation_of", "power", "print_blocks"]

# Beside the class of the nearest prototype, which is there in any case.
FLAT_COLUMNS = (
    *("log_magnitude", "direction_share", "ood_distance", "prototype_distance"),
    *("neighbor", "neighbor_path", "neighbor_distance", "neighbor_angle_degrees"),
)
# exp() of less is 0 in float64.
_LEAST = -700.0
_NEIGHBOR_COLUMNS: dict[str, Literal["left", "right"]] = {
    "number": "right",
    "image": "left",
    "distance": "left",
    "angle": "right",
}
_COLOURS = {"OOD": "bold red", "ID": "green"}


def explanation_of(results: Results, position: int) -> Row:
    """Why an image has its score, JSON-able: the parts of S², class prototypes and training images, nearest first."""
    found = results.explanation_at(position)
    samples = found.neighbor.tolist()
    neighbors = zip(
        samples,
        results.sample_names(samples),
        found.neighbor_log_distance.tolist(),
        found.neighbor_log_magnitude.tolist(),
        found.neighbor_angle.tolist(),
        strict=True,
    )
    return {
        "log_score": _finite(found.log_score.item()),
        "log_magnitude": found.log_magnitude.item(),
        "direction_share": found.direction_share.item(),
        "ood_distance": found.ood_distance.item(),
        "prototypes": [
            {"label": results.classes[c], "distance": distance}
            for c, distance in zip(found.prototype.tolist(), found.prototype_distance.tolist(), strict=True)
        ],
        "neighbors": [
            {
                "sample": sample,
                "path": None if name is None else encodable(name),
                "distance": math.exp(log_distance),
                "log_distance": _finite(log_distance),
                "log_magnitude": log_magnitude,
                "angle_degrees": math.degrees(angle),
            }
            for sample, name, log_distance, log_magnitude, angle in neighbors
        ],
    }


def flat_explanation_of(results: Results, position: int) -> Row:
    """The same in `FLAT_COLUMNS`, with the nearest prototype and training image only."""
    full = explanation_of(results, position)
    nearest, prototype = full["neighbors"][0], full["prototypes"][0]
    return {
        **{name: full[name] for name in ("log_magnitude", "direction_share", "ood_distance")},
        "prototype_distance": prototype["distance"],
        "neighbor": nearest["sample"],
        "neighbor_path": nearest["path"],
        "neighbor_distance": nearest["distance"],
        "neighbor_angle_degrees": nearest["angle_degrees"],
    }


def decision_word(row: Row) -> str:
    """Of the decision about an image."""
    return {True: "OOD", False: "ID", None: "no decision"}[row["is_ood"]]


def power(log_value: float | None) -> str:
    """exp(log_value) in four digits, or as a power of e where float64 ends; None: -∞."""
    if log_value is None:
        return "0"
    return f"{math.exp(log_value):.4g}" if log_value > _LEAST else f"e^{log_value:.0f}"


def print_blocks(results: Results, positions: Sequence[int], console: Console) -> None:
    """For each of the given images a block: its name, the decision, and below it the reasons."""
    from rich.text import Text

    for place, position in enumerate(positions):
        row, why = results.row(position), explanation_of(results, position)
        with console.capture() as capture:
            console.print(Text(plain(row["path"]), style="bold"), overflow="fold")
            console.print(_block(row, why))
        # rich fills lines up with blanks.
        block = "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())
        console.file.write(block if place == 0 else f"\n{block}")


def _block(row: Row, why: Row) -> Table:
    from rich.table import Table

    nearest, share = why["neighbors"][0], round(100 * why["direction_share"])
    prototypes = ", ".join(f"{plain(p['label'])} at {p['distance']:.4g}" for p in why["prototypes"])
    block = Table.grid(padding=(0, 2))
    block.add_column()
    block.add_column(style="dim", no_wrap=True)
    block.add_column(overflow="fold")
    block.add_row("", "decision", _decision(row, why))
    block.add_row("", "class", _class(row))
    block.add_row(
        "",
        "score",
        f"π = {power(why['log_magnitude'])}, the nearest gradient's {power(nearest['log_magnitude'])}; directions "
        f"{nearest['angle_degrees']:.1f}° apart; {share} % of the score² is direction, {100 - share} % magnitude",
    )
    block.add_row("", "prototypes", f"{prototypes}; OOD prototype at {why['ood_distance']:.4g}")
    block.add_row("", "training", _neighbors(why["neighbors"]))
    return block


def _neighbors(neighbors: Sequence[Row]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for heading, side in _NEIGHBOR_COLUMNS.items():
        table.add_column(heading, justify=side, overflow="fold")
    for neighbor in neighbors:
        path = "(no name)" if neighbor["path"] is None else plain(neighbor["path"])
        angle = f"{neighbor['angle_degrees']:.1f}°"
        table.add_row(str(neighbor["sample"]), path, power(neighbor["log_distance"]), angle)
    return table


def _decision(row: Row, why: Row) -> Text:
    from rich.text import Text

    word = decision_word(row)
    p_value = "" if row["p_value"] is None else f", p-value {row['p_value']:.4g}"
    return Text.assemble((word, _COLOURS.get(word, "")), f", score {power(why['log_score'])}{p_value}")


def _class(row: Row) -> str:
    label, nearest = (plain(row[name]) for name in ("label", "prototype_label"))
    return label if label == nearest else f"{label}; nearest prototype: {nearest}"


def _finite(log_value: float) -> float | None:
    """JSON has no -∞, the logarithm of a distance of 0."""
    return log_value if math.isfinite(log_value) else None
