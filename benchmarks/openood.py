"""One extraction for all methods, against each method with forward passes of its own; and equal figures of both.

    python benchmarks/openood.py --model networks.py:resnet20 --weights resnet20.pt \
        --mean .485,.456,.406 --std .229,.224,.225 --root OPENOOD_FOLDER

Our side is what `grood benchmark` runs: `extract_sets` into an empty cache, then all methods. The other side is
pytorch-ood's own way, its `fit` and its `Benchmark.evaluate`, one method after another, measured for MSP, energy, KNN,
MDS and ViM. For the other methods it is estimated from these: one that needs a fit takes as long as MDS, one that needs
none as MSP. Both sides read the same image files with the same loader settings.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_ood import detector as detectors
from pytorch_ood.benchmark import Benchmark
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from torch_grood.data import FeatureCache, ImageDataset, ImageTransform, image_loader
from torch_grood.data.sources import ImageSource
from torch_grood.evaluation.extraction import Sets, extract_sets
from torch_grood.evaluation.image_sets import resolve
from torch_grood.evaluation.methods import methods_of
from torch_grood.evaluation.metrics import auroc
from torch_grood.evaluation.scoring import run_method
from torch_grood.evaluation.spec import read_spec
from torch_grood.features import FeatureExtractor
from torch_grood.models import load_model

# Those that are named where benchmarks are compared; ODIN is none of them, for it has passes of its own on both sides.
NAMES = "grood,msp,mls,energy,mds,rmds,knn,vim,react,dice,ash,she,gen,scale,nnguide,fdbd,nci,gradnorm"
WITHOUT_FIT = {"msp", "mls", "energy", "gen", "ash", "scale", "gradnorm"}


def main() -> None:
    """Measure both sides and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--mean", required=True)
    parser.add_argument("--std", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--train", type=int, default=5000, help="training images, evenly spread over the list")
    parser.add_argument("--test", type=int, default=1000, help="images of each test set, likewise")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    logging.getLogger("pytorch_ood").setLevel(logging.ERROR)

    model = load_model(arguments.model, arguments.weights, 10).model.eval()
    mean, std = (tuple(float(x) for x in text.split(",")) for text in (arguments.mean, arguments.std))
    transform = ImageTransform(32, 32, "bilinear", mean, std)  # type: ignore[arg-type]
    found = resolve(read_spec("cifar10"), arguments.root, allow_missing=True)
    train = _part(found.train.source, arguments.train)
    test = _part(found.test.source, arguments.test)
    ood = {one.key: _part(one.source, arguments.test) for one in (*found.near, *found.far)}

    def loader(source: ImageSource) -> Any:
        return image_loader(source, transform, batch_size=arguments.batch_size, workers=arguments.workers)

    with tempfile.TemporaryDirectory() as folder:
        sets = Sets(loader(train), None, loader(test), None, {key: loader(source) for key, source in ood.items()})
        started = time.perf_counter()
        outputs = extract_sets(model, sets, FeatureCache(folder), std=transform.std, progress=False)
        extraction = time.perf_counter() - started
        ours: dict[str, tuple[float, dict[str, Tensor]]] = {}
        for method in methods_of(NAMES):
            started = time.perf_counter()
            scored = run_method(method, outputs)
            assert scored.scores is not None, scored.reason
            ours[method.name] = time.perf_counter() - started, dict(scored.scores)
    head = outputs.world.head
    assert head is not None
    n_ood = sum(map(len, ood.values()))
    each = 1e3 * extraction / (len(train) + len(test) + n_ood)
    on_it = sum(seconds for seconds, _ in ours.values())
    print(f"{torch.get_num_threads()} threads; {len(train)} training, {len(test)} ID and {n_ood} OOD images")
    print(f"extraction {extraction:.1f} s ({each:.2f} ms an image), all {len(ours)} methods on it {on_it:.1f} s")
    print(", ".join(f"{name} {seconds:.2f}" for name, (seconds, _) in ours.items()))

    benchmark = _Sets(
        _Labelled(ImageDataset(train, transform)),
        _Labelled(ImageDataset(test, transform)),
        {key: _Labelled(ImageDataset(source, transform), label=-1) for key, source in ood.items()},
    )
    options = {"batch_size": arguments.batch_size, "num_workers": arguments.workers}
    encoder = _Encoder(model)
    theirs = {
        "msp": detectors.MaxSoftmax(model),
        "energy": detectors.EnergyBased(model),
        "knn": detectors.KNN(encoder, k=50),
        "mds": detectors.Mahalanobis(encoder),
        "vim": detectors.ViM(encoder, d=min(256, outputs.test.features.shape[1] // 2), w=head.weight, b=head.bias),
    }
    print(f"\n{'own passes':10s} {'seconds':>8s}   largest difference of AUROC over the OOD sets")
    own: dict[str, float] = {}
    for name, detector in theirs.items():
        started = time.perf_counter()
        detector.to("cpu").fit(DataLoader(benchmark.train_set(), **options))
        figures = benchmark.evaluate([detector], loader_kwargs=options, cache=False)
        own[name] = time.perf_counter() - started
        scores = ours[name][1]
        differences = [abs(row["AUROC"] - auroc(scores["test"], scores[row["Dataset"]])) for row in figures]
        print(f"{name:10s} {own[name]:8.1f}   {max(differences):.1e}")
    shared = extraction + sum(ours[name][0] for name in own)
    print(f"\nfive methods, measured: {sum(own.values()):.1f} s / {shared:.1f} s = {sum(own.values()) / shared:.1f} x")
    estimated = sum(own.get(name, own["msp"] if name in WITHOUT_FIT else own["mds"]) for name in ours)
    total, ratio = extraction + on_it, estimated / (extraction + on_it)
    n_estimated = len(ours) - len(own)
    print(f"{len(ours)} methods, {n_estimated} of them estimated: {estimated:.1f} s / {total:.1f} s = {ratio:.1f} x")


def _part(source: ImageSource, n: int) -> ImageSource:
    step = max(1, len(source) // n)
    labels = None if source.labels is None else source.labels[::step][:n]
    return ImageSource(source.paths[::step][:n], labels, source.classes, source.origin)


class _Encoder(nn.Module):
    """The network up to its last layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._extractor = FeatureExtractor(model)

    def forward(self, images: Tensor) -> Tensor:
        return self._extractor(images).features


class _Labelled(Dataset[tuple[Tensor, int]]):
    """Pairs (image, label), as pytorch-ood takes them."""

    def __init__(self, images: ImageDataset, label: int | None = None) -> None:
        self._images, self._label = images, label

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image, label, _ = self._images[position]
        return image, label if self._label is None else self._label


class _Sets(Benchmark):  # type: ignore[misc]
    """The same images as a benchmark of pytorch-ood."""

    def __init__(self, train: Dataset[Any], test: Dataset[Any], ood: dict[str, Dataset[Any]]) -> None:
        self._train, self._test, self._ood = train, test, ood
        self.ood_names = list(ood)

    def train_set(self) -> Dataset[Any]:
        """See `Benchmark`."""
        return self._train

    def test_sets(self, known: bool = True, unknown: bool = True) -> Sequence[Dataset[Any]]:
        """See `Benchmark`."""
        return [ConcatDataset([self._test, found]) for found in self._ood.values()]


if __name__ == "__main__":
    main()
