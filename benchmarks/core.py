"""What GROOD costs over the classifier itself: each figure is a ratio of two times taken in turns in one run.

    python benchmarks/core.py            # or: make benchmark

ResNet-18 for 32x32 images (3x3 stem, no max-pool, 512 features) with random weights and images: the weights do not
change the time. Targets are printed beside the figures and nothing fails: a loaded machine is no defect.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from torch_grood import GROOD, Mixup, ood_gradient
from torch_grood.features import FeatureExtractor
from torch_grood.neighbors import ExactIndex
from torch_grood.outliers import OutlierContext
from torch_grood.state import build_state
from torch_grood.training_pass import TrainingPass


def main() -> None:
    """Run all measurements and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5_000, help="training images of the fit")
    parser.add_argument("--stored", type=int, default=50_000, help="gradients searched by the score")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs; the median ratio counts")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = resnet18().eval()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'figure':58s} {'measured':>12s} {'target':>10s}")
    images = torch.rand(arguments.images, 3, 32, 32)
    measure_fit(model, images, arguments.rounds)
    measure_score(model, arguments.stored, 3 * arguments.rounds)
    measure_gradient(arguments.rounds)
    measure_start()


def report(figure: str, measured: str, target: str) -> None:
    """Print one line of the table."""
    print(f"{figure:58s} {measured:>12s} {target:>10s}", flush=True)


def measure_fit(model: nn.Module, images: Tensor, rounds: int) -> None:
    """`fit` against one plain forward pass over the same loader, and what mixing and gradients take of it."""
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in torch.split(images, 200)])
    labels[:10] = torch.arange(10)
    loader = DataLoader(TensorDataset(images, labels), batch_size=128)

    def forward() -> None:
        with torch.no_grad():
            for batch, _ in loader:
                model(batch)

    detector = GROOD.paper(model)
    ratios, shares, plain = [], [], 0.0
    for _ in range(rounds):
        plain = seconds(forward)
        ratios.append(seconds(lambda: detector.fit(loader, progress=False)) / plain)
        shares.append(_mixing_and_gradients(model, loader) / plain)
    report(
        f"fit / forward pass, {len(images):,} images ({plain:.1f} s)", f"{statistics.median(ratios):.3f} x", "1.10 x"
    )
    report("mixing and gradients together / forward pass", f"{100 * statistics.median(shares):.1f} %", "5 %")


def _mixing_and_gradients(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> float:
    """Seconds of `fit` after the pass over the training set."""
    source = Mixup()
    extractor = FeatureExtractor(model)
    passed = TrainingPass(extractor, source, 0, loader, None)
    for images, labels in loader:
        passed.add(images, labels)
    early = passed.early_prototypes
    assert early is not None

    def rest() -> None:
        context = OutlierContext(
            passed.prototypes.means, extractor, early.means, passed.samples(), batch_size=128, progress=False
        )
        build_state(
            ExactIndex(), 0, features=passed.features.drain(), labels=torch.cat(passed.rows),
            predictions=torch.cat(passed.predictions), sample_ids=torch.cat(passed.sample_ids),
            prototypes=passed.prototypes, classes=passed.classes, class_ids=passed.class_ids,
            outlier_features=source.features(context), source=source,
        )  # fmt: skip

    return seconds(rest)


def measure_score(model: nn.Module, n_stored: int, rounds: int) -> None:
    """`score` of 200 images among stored gradients against the plain forward pass."""
    images = torch.rand(200, 3, 32, 32)
    detector = GROOD(model)
    with torch.no_grad():
        centres = detector.extract(images[:10]).features
    labels = torch.arange(n_stored) % 10
    spread = centres.std(0)
    features = centres[labels] + 0.5 * spread * torch.randn(n_stored, centres.shape[1])
    detector.fit_features(features, labels, ood_features=centres.mean(0, keepdim=True))

    def forward() -> None:
        with torch.no_grad():
            model(images)

    ratios = [1 / ratio(forward, lambda: detector.score(images, progress=False)) for _ in range(rounds)]
    report(f"score / forward pass, 200 images, {n_stored:,} gradients", f"{statistics.median(ratios):.3f} x", "1.10 x")


def measure_gradient(rounds: int) -> None:
    """The closed form against autograd, sample by sample."""
    features, prototypes, ood_prototype = torch.randn(200, 512), torch.randn(100, 512), torch.randn(512)
    label = torch.zeros(1, dtype=torch.int64)

    def one_graph() -> None:
        leaf = ood_prototype.clone().requires_grad_()
        distances = (features[:, None] - torch.cat([prototypes, leaf[None]])).norm(dim=2)
        loss = functional.cross_entropy(-distances, label.expand(200), reduction="none")
        for sample in range(200):
            torch.autograd.grad(loss[sample], leaf, retain_graph=True)

    def graph_a_sample() -> None:
        for sample in range(200):
            leaf = ood_prototype.clone().requires_grad_()
            distances = (features[sample] - torch.cat([prototypes, leaf[None]])).norm(dim=1)
            torch.autograd.grad(functional.cross_entropy(-distances[None], label), leaf)

    def closed_form() -> None:
        for _ in range(50):
            ood_gradient(features, prototypes, ood_prototype)

    for name, slow, target in (
        ("of one graph of the batch (the OpenOOD port)", one_graph, "5,000 x"),
        ("of a graph for each sample", graph_a_sample, ""),
    ):
        ratios = [50 * ratio(slow, closed_form) for _ in range(rounds)]
        report(f"autograd {name} / closed form", f"{statistics.median(ratios):,.0f} x", target)


def measure_start() -> None:
    """Importing the library, beyond torch, and the command's help."""
    code = (
        "import time, torch; t = time.perf_counter(); from torch_grood import GROOD; "
        "a = time.perf_counter() - t; print(a)"
    )  # fmt: skip
    runs = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    report("from torch_grood import GROOD, beyond import torch", f"{statistics.median(runs):.3f} s", "0.15 s")
    command = [str(Path(sys.executable).with_name("grood")), "--help"]
    helps = [seconds(lambda: subprocess.check_output(command)) for _ in range(5)]
    report("grood --help", f"{statistics.median(helps):.2f} s", "1.5 s")


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """Time of `slow` over time of `fast`, one right after the other."""
    return seconds(slow) / seconds(fast)


def resnet18() -> nn.Module:
    """ResNet-18 for 32x32 images, from torchvision."""
    from torchvision.models import resnet18 as torchvision_resnet18

    model: nn.Module = torchvision_resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model


if __name__ == "__main__":
    main()
