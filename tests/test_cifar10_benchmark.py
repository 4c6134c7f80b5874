"""`grood benchmark` on a trained ResNet-20 and real images: the figures that `test_cifar10.py` finds by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("pytorch_ood")

from test_cifar10 import GOLDEN, NETWORKS, TRANSFORM, WEIGHTS, loader
from test_cifar10 import pytestmark as needs_real_images
from torch_grood.data import FeatureCache
from torch_grood.evaluation.benchmark import Checkpoint, Classifier, Settings, run_benchmark
from torch_grood.evaluation.image_sets import resolve
from torch_grood.evaluation.methods import methods_of
from torch_grood.evaluation.results import BenchmarkResults
from torch_grood.evaluation.spec import read_spec
from torch_grood.models import load_model

pytestmark = needs_real_images

SIZES = {"train_cifar10": 2000, "val_cifar10": 300, "val_tin": 300, "test_cifar10": 1000, "test_cifar100": 1000}
SPEC = """
name = "cifar10-part"
id = {train.list = "train_cifar10.txt", val.list = "val_cifar10.txt", test.list = "test_cifar10.txt"}
val_ood.list = "val_tin.txt"
near = {cifar100.list = "test_cifar100.txt", tin.list = "test_tin.txt"}
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkResults:
    folder = tmp_path_factory.mktemp("benchmark")
    for name, n in {**SIZES, "test_tin": 1000}.items():
        source = loader(name, n).dataset.source
        assert source.labels is not None
        lines = [f"{path} {label}\n" for path, label in zip(source.paths, source.labels, strict=True)]
        (folder / f"{name}.txt").write_text("".join(lines))
    (folder / "part.toml").write_text(SPEC)
    return run_benchmark(
        resolve(read_spec(folder / "part.toml"), folder),
        [Checkpoint(WEIGHTS / "resnet20_cifar10.pt", 0)],
        lambda checkpoint: Classifier(
            load_model(f"{NETWORKS}:resnet20", checkpoint.weights).model, TRANSFORM, "networks.py:resnet20"
        ),
        Settings(
            tuple(
                methods_of(
                    "grood,grood:outliers=mixup:n=100,grood:outliers=mean,grood:outliers=ood,msp,energy,knn,vim,nci"
                )
            ),
            draws=100,
            workers=0,
        ),
        store=FeatureCache(folder / "cache"),
        folder=folder / "found",
    )


def near(results: BenchmarkResults, label: str) -> float:
    method = results.runs[0].method(label)
    assert method is not None
    assert method.status == "done", method.reason
    return 100 * method.groups["near"].auroc


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("GROOD", "energy"),
        ("GROOD (outliers = mixup, n = 100)", "mixup"),
        ("GROOD (outliers = mean)", "mean"),
        ("GROOD (outliers = ood)", "real"),
    ],
)
def test_figures_are_those_found_by_hand(results: BenchmarkResults, label: str, name: str) -> None:
    assert near(results, label) == pytest.approx(GOLDEN[name], abs=0.3)


def test_the_order_of_things_on_a_real_network(results: BenchmarkResults) -> None:
    """What everybody finds on CIFAR-10: energy above MSP, and all far above chance."""
    assert near(results, "energy") > near(results, "MSP") > 80
    assert near(results, "KNN") > 80
    assert results.runs[0].accuracy.classifier == pytest.approx(0.92, abs=0.02)


def test_tests_and_intervals_agree(results: BenchmarkResults) -> None:
    first = results.comparisons[0]
    ours, other = (results.runs[0].method(label) for label in (first.method_a, first.method_b))
    assert ours is not None
    assert other is not None
    assert first.difference == pytest.approx(ours.groups["near"].auroc - other.groups["near"].auroc)
    assert first.interval[0] < first.difference < first.interval[1]
    low, high = ours.groups["near"].intervals["auroc"]
    assert 0.005 < high - low < 0.05
