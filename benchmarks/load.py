"""How soon a saved detector of ImageNet-1k's size scores: from `GROOD.load` to the first score, and what it holds.

    python benchmarks/load.py --cache DIR    # writes a detector of 1.28 million images there, once: 10 GB
    python benchmarks/load.py --cache DIR --images 100000

The file's pages are in the machine's memory, as after a copy or an earlier use; the gradients are synthetic (see
synthetic.py), their dimension is 2,048. Each measurement is a fresh process. `verify=True`, which reads everything, is
measured beside the default; two processes at once show what they share.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from search import synthetic_gradients
from synthetic import N_CLASSES, N_FEATURES, SyntheticImageNet

from torch_grood import GROOD, FitInfo
from torch_grood.neighbors import ExactIndex
from torch_grood.provenance import Names, TrainingRecord
from torch_grood.state import FittedState

_CHILD = """
import json, sys, time
from pathlib import Path
import torch
from torch_grood import GROOD, detector, storage  # imports are not measured
features = torch.load(sys.argv[3], weights_only=True)
start = time.perf_counter()
loaded = GROOD.load(sys.argv[1], verify=sys.argv[2] == "verify")
middle = time.perf_counter()
scores = loaded.log_score_features(features[:1]).tolist()
first = time.perf_counter()
scores += loaded.log_score_features(features[1:2]).tolist()
second = time.perf_counter()
memory = {key: 0 for key in ("Rss", "Pss", "Private_Dirty", "Anonymous")}
for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
    key, value = line.split(":")
    if key in memory:
        memory[key] = int(value.split()[0]) / 1024
times = {"load": middle - start, "first": first - middle, "second": second - first}
print(json.dumps(times | {"scores": scores} | memory))
sys.stdout.flush()
sys.stdin.read()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the synthetic gradients and the detector")
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--store", choices=["float32", "float16", "int8"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.hard = False
    path = arguments.cache / f"detector-{arguments.images}-{arguments.store}.grood"
    if not path.exists():
        make = multiprocessing.get_context("spawn").Process(target=write_detector, args=(arguments, path))
        make.start()
        make.join()
        if make.exitcode:
            sys.exit("the detector could not be written")
    queries = arguments.cache / "load-queries.pt"
    torch.save(next(iter(SyntheticImageNet().training_set(8192, chunk=8192)))[0][:2].clone(), queries)
    with path.open("rb") as file:
        while file.read(2**26):
            pass
    print(f"{path.stat().st_size / 1e9:.2f} GB, {GROOD.load(path).fit_info_.n_indexed:,} gradients")
    print(f"{'':12} {'load':>8} {'first score':>12} {'together':>9} {'second score':>13} {'own memory':>11}")
    for how in ("lazy", "verify"):
        found = [finish(start(path, how, queries)) for _ in range(arguments.rounds if how == "lazy" else 1)]
        best = min(found, key=lambda one: one["load"] + one["first"])
        report(how, best)
        worst = max(found, key=lambda one: one["load"] + one["first"])
        if len(found) > 1:
            report("  slowest", worst)
    both = [start(path, "verify", queries) for _ in range(2)]
    told = [json.loads(child.stdout.readline()) for child in both if child.stdout]
    print("two processes that have read the whole file, MiB:")
    for child in both:
        memory = rollup(child.pid)
        print("  " + ", ".join(f"{key} {value:,.0f}" for key, value in memory.items()))
    for child in both:
        child.communicate()
    assert told[0]["scores"] == told[1]["scores"]


def start(path: Path, how: str, queries: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CHILD, str(path), how, str(queries)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = child.communicate()
    found: dict[str, Any] = json.loads(out)
    return found


def report(name: str, one: dict[str, Any]) -> None:
    both = one["load"] + one["first"]
    print(
        f"{name:12} {one['load']:7.3f}s {one['first']:11.3f}s {both:8.3f}s {one['second']:12.4f}s "
        f"{one['Anonymous']:8,.0f} MiB"
    )


def rollup(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    table = {key: int(value.split()[0]) / 1024 for key, value in (line.split(":") for line in lines)}
    return {key: table[key] for key in ("Rss", "Pss", "Anonymous")}


def write_detector(arguments: argparse.Namespace, path: Path) -> None:
    store, field, facts = synthetic_gradients(arguments, arguments.images)
    index, n = ExactIndex(), arguments.images
    info = FitInfo(
        n_samples=n,
        n_indexed=len(store),
        n_classes=N_CLASSES,
        n_features=N_FEATURES,
        n_left_out=0,
        classifier_accuracy=facts["training accuracy"],
        prototype_accuracy=facts["training accuracy"],
        outlier_source={"name": "Mixup", "n": None, "lam": 0.9},
        uses_ood_data=False,
        n_outliers=1000,
    )
    names = Names.of([f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i // 1000}.JPEG" for i in range(n)])
    hashes = torch.randint(1, 2**62, (n,), generator=torch.Generator().manual_seed(0))
    ood_prototype = field._origin
    state = FittedState(
        classes=tuple(range(N_CLASSES)),
        class_ids=torch.arange(N_CLASSES),
        class_prototypes=field._classes + ood_prototype,
        ood_prototype=ood_prototype,
        index=index,
        searcher=index.build(store),
        sample_ids=torch.arange(len(store)),
        fingerprint=None,
        info=info,
        training=TrainingRecord(hashes, names),
    )
    detector = GROOD(None)
    detector._adopt(state)
    detector.save(path)


if __name__ == "__main__":
    main()
