"""The two figures of the study.

    python research/ood_prototype/figures.py --choice research/ood_prototype/results/choice.json --output docs/images

ood-prototype-field.svg: π and the direction of H over a plane with three classes, for three places of p_ood.
ood-prototype-shrinkage.svg: near and far AUROC on the split worlds, as p_ood moves to the origin.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from scoring import Gradients

INK, FAINT, GRID = "#1f2937", "#94a3b8", "#e5e7eb"
# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.edgecolor": FAINT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    # The same figure is the same bytes.
    "svg.hashsalt": "ood-prototype",
    "svg.fonttype": "path",
}
PROTOTYPES = torch.tensor([[5.2, 1.2], [4.3, 4.6], [1.2, 5.3]], dtype=torch.float64)
OUTLIERS = torch.tensor([0.7, 2.4], dtype=torch.float64)
EXTENT = (-0.7, 7.0)


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choice", type=Path, required=True, help="choice.json of study.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the figures")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        draw_field(arguments.output / "ood-prototype-field.svg")
        draw_shrinkage(json.loads(arguments.choice.read_text()), arguments.output / "ood-prototype-shrinkage.svg")


def draw_field(path: Path) -> None:
    """Three panels: arrows of one length in the direction of H, coloured by log π."""
    rng = torch.Generator().manual_seed(0)
    mean = PROTOTYPES.mean(0)
    panels = {
        "mean of the class prototypes": mean,
        "0.3 × that mean": 0.3 * mean,
        "mean of outliers that lie elsewhere": OUTLIERS,
    }
    side = torch.linspace(*EXTENT, 17, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    figure, axes = plt.subplots(1, 3, figsize=(13.2, 5.0), layout="constrained", sharex=True, sharey=True)
    colours = mpl.colors.Normalize(-2.5, 0.0)
    for axis, (title, p_ood) in zip(axes, panels.items(), strict=True):
        gradients = Gradients.of(points, PROTOTYPES, p_ood[None], 1.0)
        log_pi = gradients.log_pi[:, 0] / np.log(10)
        u, v = gradients.direction[:, 0].T
        cloud = PROTOTYPES.repeat_interleave(60, 0)
        cloud = cloud + 0.42 * torch.randn(cloud.shape, generator=rng, dtype=torch.float64)
        axis.scatter(*cloud.T, s=7, color="#cbd5e1", zorder=1, linewidths=0)
        arrows = axis.quiver(
            *points.T, u, v, log_pi, cmap="viridis_r", norm=colours, pivot="mid", scale=25, width=0.0045, zorder=2
        )
        axis.scatter(*PROTOTYPES.T, s=95, color=INK, marker="o", zorder=4, label="class prototypes")
        if p_ood is OUTLIERS:
            outliers = OUTLIERS + 0.5 * torch.randn(60, 2, generator=rng, dtype=torch.float64)
            axis.scatter(*outliers.T, s=9, color=ORANGE, alpha=0.5, zorder=1, linewidths=0)
        axis.scatter(*p_ood, s=330, color=ORANGE, marker="*", edgecolors="white", zorder=5, label="$p_{ood}$")
        axis.plot(0, 0, "+", color=INK, markersize=13, markeredgewidth=1.8, zorder=4, label="origin")
        axis.set_title(f"$p_{{ood}}$ = {title}", fontsize=12)
        axis.set(xlim=EXTENT, ylim=EXTENT, aspect="equal", xticks=[], yticks=[])
    bar = figure.colorbar(arrows, ax=axes, shrink=0.8, pad=0.01, ticks=[-2, -1, 0], extend="min")
    bar.ax.set_yticklabels(["0.01", "0.1", "1"])
    bar.set_label("π, the probability of $p_{ood}$")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_shrinkage(choice: dict[str, Any], path: Path) -> None:
    """Near and far over the share f of the source that p_ood is, with energy and KNN as lines."""
    rows = [row for row in choice["candidates"] if row.get("geometry") == "unit"]
    rows = [row for row in rows if row["temperature"] == 1 and row["k"] == 10]
    base = {row["name"]: row for row in choice["candidates"] if row["group"] == "baseline"}
    origin = next(row for row in rows if row["source"] == "origin")
    curves = {
        "highest energy 2 %": ("2 % of the training images of highest energy", ORANGE, "o"),
        "mean of prototypes": ("mean of the class prototypes", BLUE, "s"),
    }
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    for axis, kind in zip(axes, ("near", "far"), strict=True):
        for source, (label, colour, marker) in curves.items():
            found = {row["share"]: row for row in rows if row["source"] == source} | {0.0: origin}
            shares = sorted(found)
            values = [found[share][kind] for share in shares]
            low, high = zip(*(found[share][f"{kind} interval"] for share in shares), strict=True)
            axis.fill_between(shares, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.plot(shares, values, marker=marker, color=colour, label=label, markersize=6)
        for name, style in (("energy", "--"), (next(name for name in base if name.startswith("KNN")), ":")):
            axis.axhline(base[name][kind], color=INK, linestyle=style, linewidth=1.4, label=name)
        _finish(axis, kind)
    axes[0].axvline(0.5, color=FAINT, linewidth=0.8, zorder=0)
    axes[1].axvline(0.5, color=FAINT, linewidth=0.8, zorder=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _finish(axis: Axes, kind: str) -> None:
    sets = "classes put aside" if kind == "near" else "drawn images"
    axis.set_title(f"{kind}: {sets}", fontsize=12)
    axis.set_xlabel("f:  $p_{ood}$ = f × source  (0: the origin)")
    axis.set_ylabel("AUROC, %, mean of the split worlds")
    axis.grid(color=GRID)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
