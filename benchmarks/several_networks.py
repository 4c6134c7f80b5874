"""Results of several networks side by side: a Markdown table, and a picture of near against far.

    python benchmarks/several_networks.py --name ResNet-20 found20/results.json --name ResNet-56 found56/results.json \
        --figure near-far.png

Rows are the methods of the first file, sorted by their mean near AUROC; each cell is near / far.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from torch_grood.evaluation.results import read_results

Figures = dict[str, tuple[float, float]]
OURS, OTHERS, OOD = "#c2410c", "#475569", "#a8a29e"


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="results.json of each network")
    parser.add_argument("--name", action="append", required=True, help="of each network, in the same order")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    parser.add_argument(
        "--shown", type=float, default=80.0, help="methods below this near AUROC are left off the picture"
    )
    arguments = parser.parse_args()
    networks = {name: _figures(path) for name, path in zip(arguments.name, arguments.files, strict=True)}
    labels = [label for label in next(iter(networks.values())) if all(label in found for found in networks.values())]
    labels.sort(key=lambda label: -float(np.mean([found[label][0] for found in networks.values()])))
    print("| method | " + " | ".join(f"{name} near / far †" for name in networks) + " | mean near / far † |")
    print("|---|" + "---:|" * (len(networks) + 1))
    for label in labels:
        cells = [found[label] for found in networks.values()]
        near, far = (float(np.mean(column)) for column in zip(*cells, strict=True))
        print(f"| {label} | " + " | ".join(f"{a:.2f} / {b:.2f}" for a, b in cells) + f" | {near:.2f} / {far:.2f} |")
    if arguments.figure is not None:
        _draw(networks, arguments.figure, arguments.shown)


def _figures(path: Path) -> Figures:
    """AUROC near and far in %, by label of the method, of the first run."""
    methods = read_results(path).runs[0].methods
    return {
        method.label + (" *" if method.uses_ood_data else ""): (
            100 * method.groups["near"].auroc,
            100 * method.groups["far"].auroc,
        )
        for method in methods
        if method.status == "done"
    }


def _draw(networks: dict[str, Figures], path: Path, shown: float) -> None:
    figure, axes = plt.subplots(1, len(networks), figsize=(5.2 * len(networks), 5.2), squeeze=False)
    for axis, (name, found) in zip(axes[0], networks.items(), strict=True):
        points = {
            label: point
            for label, point in found.items()
            if point[0] >= shown and not any(name in label for name in ("lam =", "n =", "precision"))
        }
        for label, (near, far) in points.items():
            colour = OOD if label.endswith("*") else OURS if label.startswith("GROOD") else OTHERS
            axis.scatter(near, far, color=colour, s=28 if colour == OTHERS else 44, zorder=3)
        _write_labels(axis, points)
        axis.set_title(name)
        axis.set_xlabel("near AUROC, %")
        axis.grid(color="#e2e8f0")
        axis.margins(0.12)
    axes[0][0].set_ylabel("far AUROC, % (sets that are there)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _write_labels(axis: Axes, points: Figures) -> None:
    """Names beside the points, on the nearest free place around each."""
    axis.figure.canvas.draw()
    scale = 72 / axis.figure.dpi
    places = {label: axis.transData.transform(point) * scale for label, point in points.items()}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places.values()]
    right = axis.get_window_extent().x1 * scale
    for label, (x, y) in sorted(places.items(), key=lambda item: -item[1][1]):
        text = label.replace("GROOD (outliers = ", "GROOD (")
        width, height = 4.3 * len(text), 8.0
        offsets = [
            (dx, dy)
            for distance in (6, 14, 24, 36, 50)
            for dx in (distance, -distance - width)
            for dy in (-3, -3 + distance, -3 - distance)
        ]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in offsets]
        free = [box[2] < right and not any(_overlap(box, other) for other in taken) for box in boxes]
        best = free.index(True) if any(free) else 0
        taken.append(boxes[best])
        axis.annotate(
            text,
            points[label],
            xytext=offsets[best],
            textcoords="offset points",
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": "#94a3b8", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


if __name__ == "__main__":
    main()
