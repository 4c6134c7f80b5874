"""The tables of the study's page, in Markdown, from choice.json and test.json.

python research/ood_prototype/tables.py research/ood_prototype/results
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {"resnet20": "ResNet-20", "densenet100bc": "DenseNet-BC", "resnet56": "ResNet-56", "resnet18": "ResNet-18"}
MAY_MISS_NEAR, FAR_WANTED, MAY_LOSE_NEAR = 0.3, 95.5, 0.5


def main() -> None:
    """Print them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of choice.json and test.json")
    folder = parser.parse_args().folder
    choice = json.loads((folder / "choice.json").read_text())
    for group in dict.fromkeys(row["group"] for row in choice["candidates"]):
        print(f"\n### {group}\n\n{directions(choice, group)}")
    if (folder / "test.json").exists():
        found = json.loads((folder / "test.json").read_text())
        print(f"\n### test\n\n{test_table(found)}\n\n{targets(found)}")


def directions(choice: dict[str, Any], group: str) -> str:
    """Candidates of a direction, by near + far, with their intervals and near / far of each world."""
    rows = [row for row in choice["candidates"] if row["group"] == group]
    rows.sort(key=lambda row: -row["near"] - row["far"])
    lines = ["| candidate | near / far | " + " | ".join(choice["worlds"]) + " |"]
    lines.append("|---|---:|" + "---:|" * len(choice["worlds"]))
    for row in rows:
        cells = [f"{near:.1f} / {far:.1f}" for near, far in row["worlds"].values()]
        lines.append(f"| {row['name']} | {_cell(row, 1)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_table(found: dict[str, Any]) -> str:
    """Near / far of each classifier, with half the width of the 95 % intervals."""
    lines = ["| candidate | " + " | ".join(NAMES[name] for name in found) + " | mean |"]
    lines.append("|---|" + "---:|" * (len(found) + 1))
    for label in next(iter(found.values()))["rows"]:
        rows = [part["rows"][label] for part in found.values()]
        near, far = (float(np.mean([row[key] for row in rows])) for key in ("near", "far"))
        lines.append(f"| {label} | {' | '.join(_cell(row, 2) for row in rows)} | {near:.2f} / {far:.2f} |")
    return "\n".join(lines)


def targets(found: dict[str, Any]) -> str:
    """Whether the two candidates that were chosen meet each target, by classifier."""
    lines = [
        f"| candidate | classifier | near - real outliers (≥ -{MAY_MISS_NEAR}) | far (≥ {FAR_WANTED}) "
        f"| near - the better of energy and KNN (≥ -{MAY_LOSE_NEAR}) |",
        "|---|---|---:|---:|---:|",
    ]
    judged = [label for label in next(iter(found.values()))["rows"] if label.endswith(("beforehand)", "rule)"))]
    for label in judged:
        for name, part in found.items():
            rows = part["rows"]
            ours = rows[label]
            better = max(row["near"] for other, row in rows.items() if other.startswith(("energy", "KNN")))
            real, rest = ours["near"] - rows["real outliers *"]["near"], ours["near"] - better
            cells = [
                f"{real:+.2f} {_met(real >= -MAY_MISS_NEAR)}",
                f"{ours['far']:.2f} {_met(ours['far'] >= FAR_WANTED)}",
                f"{rest:+.2f} {_met(rest >= -MAY_LOSE_NEAR)}",
            ]
            lines.append(f"| {label} | {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _met(condition: bool) -> str:
    return "met" if condition else "**missed**"


def _cell(row: dict[str, Any], digits: int) -> str:
    half = [(row[f"{kind} interval"][1] - row[f"{kind} interval"][0]) / 2 for kind in ("near", "far")]
    return f"{row['near']:.{digits}f} ± {half[0]:.{digits}f} / {row['far']:.{digits}f} ± {half[1]:.{digits}f}"


if __name__ == "__main__":
    main()
