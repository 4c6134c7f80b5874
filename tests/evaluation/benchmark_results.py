"""Results of a benchmark with made-up figures, small enough to be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch_grood.evaluation.results import (
    Accuracy,
    BenchmarkResults,
    Comparison,
    Extraction,
    GroupFigures,
    MethodResult,
    OpenOODFigures,
    Run,
    SearchPoint,
    Seconds,
    SetFigures,
    SetInfo,
    SpecInfo,
    comparability,
)

SHA = "0123456789abcdef" * 4
SETS = (
    SetInfo("train", "CIFAR-10 train", "train", 50_000, 50_000, list_sha256=SHA),
    SetInfo("val", "CIFAR-10 validation", "val", 1_000, 1_000, list_sha256=SHA),
    SetInfo("test", "CIFAR-10 test", "test", 9_000, 9_000, list_sha256=SHA),
    SetInfo("val_ood", "TinyImageNet validation", "val_ood", 1_000, 1_000, list_sha256=SHA),
    SetInfo("cifar100", "CIFAR-100", "near", 9_000, 9_000, list_sha256=SHA),
    SetInfo("tin", "TinyImageNet", "near", 7_793, 7_793, list_sha256=SHA),
    SetInfo("mnist", "MNIST", "far", 10_000, 70_000, "incomplete", list_sha256=SHA),
    SetInfo("svhn", "SVHN", "far", 0, 26_032, "absent", "no such folder"),
)


def figures(value: float, n_ood: int = 9_000, **intervals: tuple[float, float]) -> SetFigures:
    """All figures follow from the AUROC, so that each can be told from the others."""
    return SetFigures(
        auroc=value,
        ood_accepted_at_95_id_kept=1.5 * (1 - value),
        id_flagged_at_95_ood_caught=1.4 * (1 - value),
        aupr_ood=value - 0.01,
        aupr_id=value - 0.02,
        openood=OpenOODFigures(1.3 * (1 - value), value, value - 0.03, value - 0.04),
        n_id=9_000,
        n_ood=n_ood,
        intervals=intervals,
    )


def done(name: str, title: str, cifar100: float, tin: float, mnist: float, **changes: Any) -> MethodResult:
    found = {
        "cifar100": figures(cifar100, auroc=(cifar100 - 0.004, cifar100 + 0.003)),
        "tin": figures(tin, 7_793),
        "mnist": figures(mnist, 10_000),
    }
    near = {key: found[key] for key in ("cifar100", "tin")}
    mean = (cifar100 + tin) / 2
    groups = {
        "near": GroupFigures.of(near, True, {"auroc": (mean - 0.003, mean + 0.002)}),
        "far": GroupFigures.of({"mnist": found["mnist"]}, False),
    }
    values: dict[str, Any] = {"config": {"name": name}, "seconds": Seconds(1.5, 0.25), "figures": found}
    return MethodResult(name=name, label=title, groups=groups, **(values | changes))  # type: ignore[arg-type]


def methods(shift: float = 0.0) -> tuple[MethodResult, ...]:
    return (
        done("msp", "MSP", 0.88 + shift, 0.89, 0.92),
        done("grood", "GROOD", 0.90 + shift, 0.92, 0.95, warnings=("λ = 0.95 is at the end of its grid",)),
        done(
            "grood",
            "GROOD (outliers = ood)",
            0.91 + shift,
            0.93,
            0.96,
            config={"name": "grood", "outliers": "ood"},
            uses_ood_data=True,
        ),
        done(
            "knn",
            "KNN",
            0.899 + shift,
            0.92,
            0.97,
            config={"name": "knn", "k": 100},
            chosen_by="held-out classes",
            search=(
                SearchPoint({"k": 50}, 0.8),
                SearchPoint({"k": 100}, 0.85),
                SearchPoint({"k": 10**6}, None, "n < k"),
            ),
        ),
        MethodResult(
            "odin", "ODIN", {"name": "odin"}, "unavailable", "it needs the network, and there are features only"
        ),
    )


def run(seed: int = 0, shift: float = 0.0, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "weights": f"r18-s{seed}.safetensors",
        "weights_sha256": SHA[:-1] + str(seed),
        "seed": seed,
        "accuracy": Accuracy(0.95 + shift, 0.94),
        "extraction": Extraction(93.125, 78_793, 1_000),
        "methods": methods(shift),
        "peak_memory_bytes": 3 << 30,
    }
    return Run(**(values | changes))


def comparison(run: int, other: str, difference: float, p: float) -> Comparison:
    interval = (difference - 0.004, difference + 0.004)
    return Comparison(run, "near", "GROOD", other, difference, interval, p / 2, p)


def results(n_runs: int = 1, **changes: Any) -> BenchmarkResults:
    shifts = (0.0, 0.003, -0.003)[:n_runs]
    tests = [
        one
        for place in range(n_runs)
        for one in (comparison(place, "MSP", 0.025, 1e-9), comparison(place, "KNN", 0.0005, 0.4))
    ]
    versions: Mapping[str, str] = {"torch-grood": "0.1.0", "torch": "2.8.0"}
    values: dict[str, Any] = {
        "spec": SpecInfo("cifar10", "CIFAR-10", SHA),
        "created": "2026-01-31T12:00:00+00:00",
        "versions": versions,
        "settings": {"methods": "all", "batch_size": 64, "early_layer": None, "threads": [1, 2], "lam": 0.1},
        "sets": SETS,
        "comparable": comparability(SETS),
        "runs": tuple(run(place, shift) for place, shift in enumerate(shifts)),
        "comparisons": tuple(tests),
    }
    return BenchmarkResults(**(values | changes))
