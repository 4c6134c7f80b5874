"""The study of p_ood from ID data alone: the choice on split worlds, then one look at the test sets.

    python research/ood_prototype/study.py choose --worlds WORLDS --output research/ood_prototype/results
    python research/ood_prototype/study.py test --worlds WORLDS --output research/ood_prototype/results

`choose` runs every direction on the split worlds and writes choice.json. `confirm` compares the geometries on the
worlds of longer trained networks and writes confirm.json. `test` opens the files of the test sets, for
the registered candidates alone, and writes test.json. Both append what they looked at to log.jsonl, `test` before it
opens a file: a candidate whose look is in the log is refused.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from candidates import DIRECTIONS, MADE, SOURCES, TEST, Candidate, mapped
from scoring import Floats, Scores, World, auroc, baselines, interval, load_world, resampled_aurocs, scores
from splits import SPLITS
from torch import Tensor

N_STORED, N_NEAR, K_KNN, REPLICATES = 6_000, 2_500, 20, 100
# Gradients of several OOD prototypes are as many times as long.
N_STORED_SEVERAL = 3_000
N_STORED_TEST, K_KNN_TEST, REPLICATES_TEST = 20_000, 50, 200
CLASSIFIERS = {
    "resnet20": "development",
    "densenet100bc": "development",
    "resnet56": "check",
    "resnet18": "check",
}
NEAR_OF_SPLIT, NEAR_OF_TEST = ("aside",), ("cifar100", "tin")
MAY_LOSE_NEAR, LEVEL = 0.5, 0.3
LONG = "long"
Row = dict[str, Any]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("choose", "confirm", "test"))
    parser.add_argument("--worlds", type=Path, required=True, help="folder of extract.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for choice.json, test.json and log.jsonl")
    parser.add_argument("--again", action="store_true", help="look at the test sets once more, and say so in the log")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.step == "choose":
        choose(arguments.worlds, arguments.output)
    elif arguments.step == "confirm":
        confirm(arguments.worlds, arguments.output)
    else:
        look(arguments.worlds, arguments.output, again=arguments.again)


# ---- the choice


def choose(folder: Path, output: Path, candidates: Sequence[Candidate] = DIRECTIONS) -> None:
    """Every direction on every split world, and the rule."""
    names = [name for name in SPLITS if not name.startswith(LONG) and (folder / f"{name}.safetensors").exists()]
    rows = compared([load_world(folder / f"{name}.safetensors", n_near=N_NEAR) for name in names], output, candidates)
    chosen, floor, level = choose_by_rule(rows)
    _log(output, "choice", chosen["name"], names, chosen)
    # The same rule on the candidates that pass no made images through the classifier.
    from_training = [row for row in rows if not row.get("source", "").startswith((*MADE, "mixup", "all made"))]
    simple, _, level_simple = choose_by_rule(from_training)
    _log(output, "choice, without made images", simple["name"], names, simple)
    choice: Row = {
        "worlds": names,
        "floor of near": floor,
        "chosen": chosen["name"],
        "level": level,
        "chosen without made images": simple["name"],
        "level without made images": level_simple,
        "candidates": rows,
    }
    _write(output / "choice.json", choice)
    print(f"floor of near {floor:.2f}; chosen: {chosen['name']}; level with it: {level}")


def confirm(folder: Path, output: Path) -> None:
    """The geometries, all else equal, on networks that were trained for longer."""
    names = [name for name in SPLITS if name.startswith(LONG)]
    worlds = [load_world(folder / f"{name}.safetensors", n_near=N_NEAR) for name in names]
    candidates = [
        Candidate("geometry", "highest energy 2 %", 0.5, name, 1.0, 10) for name in ("raw", "half power", "unit")
    ]
    rows = compared(worlds, output, candidates, "confirm")
    _write(output / "confirm.json", {"worlds": names, "candidates": rows})


def compared(worlds: Sequence[World], output: Path, candidates: Sequence[Candidate], step: str = "choose") -> list[Row]:
    """Figures of the baselines and of all candidates, over the worlds; each goes to the log."""
    names = [world.name for world in worlds]
    found: dict[str, dict[str, tuple[Floats, Floats]]] = {}
    for world in worlds:
        for name, its in baselines(world, drawn(world, N_STORED), K_KNN).items():
            found.setdefault(name, {})[world.name] = figures(world.name, its, NEAR_OF_SPLIT, REPLICATES)
    rows = [_summary(name, "baseline", found[name]) for name in found]
    for row in rows:
        _log(output, step, row["name"], names, row)
        print(f"{row['near']:.1f} / {row['far']:.1f}  {row['name']}", flush=True)
    for geometry in dict.fromkeys(candidate.geometry for candidate in candidates):
        there = [mapped(world, geometry) for world in worlds]
        for group in by_search(c for c in candidates if c.geometry == geometry):
            results: list[dict[str, tuple[Floats, Floats]]] = [{} for _ in group]
            for world in there:
                for its, result in zip(score(world, group, N_STORED), results, strict=True):
                    result[world.name] = figures(world.name, its, NEAR_OF_SPLIT, REPLICATES)
            for candidate, result in zip(group, results, strict=True):
                row = _summary(candidate.name, candidate.group, result) | asdict(candidate)
                rows.append(row)
                _log(output, step, candidate.name, names, row)
                print(f"{row['near']:.1f} / {row['far']:.1f}  {row['name']}", flush=True)
    return rows


def choose_by_rule(rows: Sequence[Row]) -> tuple[Row, float, list[str]]:
    """The simplest of the best.

    Of all candidates of ID data alone whose near is not more than 0.5 below the better of energy and KNN, as means over
    the worlds, those whose near + far is within 0.3 of the greatest; of these the one with the fewest `departures`.
    Ties go to the greater near + far.

    Returns:
        The row, the least near that is allowed, and the names of the rows that are level.
    """
    floor = max(row["near"] for row in rows if row["name"].startswith(("energy", "KNN"))) - MAY_LOSE_NEAR
    allowed = [row for row in rows if row.get("uses") == "ID" and row["near"] >= floor]
    if not allowed:
        raise ValueError(f"no candidate has near {floor:.2f} or more; try other candidates")
    best = max(row["near"] + row["far"] for row in allowed)
    level = [row for row in allowed if row["near"] + row["far"] >= best - LEVEL]
    level.sort(key=lambda row: (departures(row), -row["near"] - row["far"]))
    return level[0], floor, [row["name"] for row in level]


def departures(row: Row) -> int:
    """How many parts of a candidate are not the plainest ones.

    Plain are one OOD prototype, raw or unit features, T = 1 or 1 rms, k = 10, and of the training images 2 % (it holds
    more samples than 0.5 %) or a source without a share.
    """
    return sum(
        (
            row["group"] == "several OOD prototypes",
            row["geometry"] not in ("raw", "unit"),
            row["temperature"] not in (0.0, 1.0),
            row["k"] != 10,
            " %" in row["source"] and " 2 %" not in row["source"],
            ", balanced" in row["source"],
        )
    )


# ---- the test sets


def look(folder: Path, output: Path, again: bool = False) -> None:
    """Each registered candidate once on each classifier."""
    log = output / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not any(line["step"] == "choice" for line in lines):
        raise SystemExit(f"{log} has no choice; run `study.py choose` before the test sets are opened")
    looked = {(line["candidate"], name) for line in lines if line["step"] == "test" for name in line["worlds"]}
    classifiers = [name for name in CLASSIFIERS if (folder / f"{name}.test.safetensors").exists()]
    refused = sorted(f"{candidate} on {name}" for candidate, name in looked if name in classifiers)
    if refused and not again:
        raise SystemExit(
            f"looked at already: {'; '.join(refused)}. Pass --again to look once more; the log will say so"
        )
    result: dict[str, Any] = {}
    for name in classifiers:
        step = "test, again" if again else "test"
        for candidate in [*TEST, "energy", "MSP", f"KNN, k = {K_KNN_TEST}"]:
            _log(output, step, candidate, [name], None)
        start = time.monotonic()
        world = load_world(folder / f"{name}.safetensors", folder / f"{name}.test.safetensors")
        result[name] = {"role": CLASSIFIERS[name], "rows": test_rows(world)}
        _write(output / "test.json", result)
        print(f"\n{name}, {time.monotonic() - start:.0f} s", flush=True)
        for label, row in result[name]["rows"].items():
            low, high = row["near minus energy interval"]
            print(
                f"{row['near']:6.2f} / {row['far']:.2f}  {label}  (near - energy: {low:+.2f} to {high:+.2f})",
                flush=True,
            )
    print("\n" + table(result))


def test_rows(world: World) -> dict[str, Row]:
    """AUROC by set, near, far, and their paired bootstrap intervals, by candidate."""
    found: dict[str, Scores] = baselines(world, drawn(world, N_STORED_TEST), K_KNN_TEST)
    for geometry in dict.fromkeys(candidate.geometry for candidate in TEST.values()):
        there = mapped(world, geometry)
        for group in by_search(c for c in TEST.values() if c.geometry == geometry):
            for candidate, its in zip(group, score(there, group, N_STORED_TEST), strict=True):
                label = next(label for label, registered in TEST.items() if registered == candidate)
                found[label] = its
    near_of_energy = figures(world.name, found["energy"], NEAR_OF_TEST, REPLICATES_TEST)[0]
    rows = {}
    for label in [*TEST, "energy", "MSP", f"KNN, k = {K_KNN_TEST}"]:
        near, far = figures(world.name, found[label], NEAR_OF_TEST, REPLICATES_TEST)
        sets = {name: 100 * auroc(found[label]["known"], found[label][name]) for name in world.unknown}
        rows[label] = {
            "sets": sets,
            "near": near[0],
            "far": far[0],
            "near interval": interval(near[1:]),
            "far interval": interval(far[1:]),
            "near minus energy": near[0] - near_of_energy[0],
            "near minus energy interval": interval(near[1:] - near_of_energy[1:]),
        } | ({"candidate": asdict(TEST[label])} if label in TEST else {})
    return rows


def table(result: dict[str, Any]) -> str:
    """Near / far of all candidates and classifiers, in Markdown."""
    lines = ["| candidate | " + " | ".join(result) + " | mean |", "|---|" + "---:|" * (len(result) + 1)]
    for label in next(iter(result.values()))["rows"]:
        rows = [found["rows"][label] for found in result.values()]
        cells = [f"{row['near']:.2f} / {row['far']:.2f}" for row in rows]
        near, far = (float(np.mean([row[key] for row in rows])) for key in ("near", "far"))
        lines.append(f"| {label} | {' | '.join(cells)} | {near:.2f} / {far:.2f} |")
    return "\n".join(lines)


# ---- shared


def drawn(world: World, n: int) -> Tensor:
    """Rows of n training samples, by seed."""
    return torch.randperm(len(world.train), generator=torch.Generator().manual_seed(0))[:n]


def by_search(candidates: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    """Candidates that differ in k alone share a search."""
    groups: dict[tuple[object, ...], list[Candidate]] = {}
    for c in candidates:
        groups.setdefault((c.source, c.share, c.geometry, c.temperature, c.apart), []).append(c)
    return iter(groups.values())


def score(world: World, group: Sequence[Candidate], n_stored: int) -> list[Scores]:
    """Scores of candidates that differ in k alone; `world` is in their geometry already."""
    first = group[0]
    p_ood = first.share * SOURCES[first.source](world)
    temperature = first.temperature * world.own_distance() if first.temperature else 1.0
    rows = drawn(world, n_stored if len(p_ood) <= 2 else min(n_stored, N_STORED_SEVERAL))
    ks = tuple(sorted({candidate.k for candidate in group}))
    found = scores(world, p_ood, temperature, rows[world.correct[rows]], ks, first.apart)
    return [found[candidate.k] for candidate in group]


def figures(world: str, found: Scores, near: tuple[str, ...], replicates: int) -> tuple[Floats, Floats]:
    """Near and far AUROC in %, unweighted means over their sets; first of all images, then of each replicate."""
    values: dict[bool, list[Floats]] = {True: [], False: []}
    for name in found:
        if name != "known":
            once = auroc(found["known"], found[name])
            resampled = resampled_aurocs(world, found, name, replicates)
            values[name in near].append(np.concatenate([[once], resampled]))
    return 100 * np.mean(values[True], axis=0), 100 * np.mean(values[False], axis=0)


def _summary(name: str, group: str, found: dict[str, tuple[Floats, Floats]]) -> Row:
    near, far = (np.mean([pair[i] for pair in found.values()], axis=0) for i in (0, 1))
    return {
        "name": name,
        "group": group,
        "near": float(near[0]),
        "far": float(far[0]),
        "near interval": interval(near[1:]),
        "far interval": interval(far[1:]),
        "worlds": {world: [float(near[0]), float(far[0])] for world, (near, far) in found.items()},
    }


def _log(output: Path, step: str, candidate: str, worlds: Sequence[str], row: Row | None) -> None:
    line: Row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "candidate": candidate}
    line |= {"worlds": list(worlds)} | ({"near": round(row["near"], 3), "far": round(row["far"], 3)} if row else {})
    with (output / "log.jsonl").open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _write(path: Path, result: dict[str, Any]) -> None:
    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(part) for key, part in value.items()}
        if isinstance(value, list):
            return [rounded(part) for part in value]
        return round(float(value), 4) if isinstance(value, (float, np.floating)) else value

    path.write_text(json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
