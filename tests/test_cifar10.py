"""GROOD on a trained ResNet-20 and real images: golden figures, so that a wrong "fix" shows.

Needs OpenOOD's folder layout with the CIFAR-10, CIFAR-100 and TinyImageNet images, the network and its weights: see
CONTRIBUTING.md. The figures were measured with this code; an independent float32 prototype found the same to 0.5.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_grood import GROOD, Extraction, FaissIndex, GroodError, Mixup, OutlierSamples, PrototypeMean
from torch_grood.data import ImageLoader, ImageSource, ImageTransform, image_loader, read_source
from torch_grood.evaluation.metrics import auroc
from torch_grood.models import load_model

DATA = Path(os.environ.get("GROOD_DATA", "~/.cache/torch-grood/openood")).expanduser()
WEIGHTS = Path(os.environ.get("GROOD_WEIGHTS", DATA / "weights"))
NETWORKS = next((p for p in (DATA / "networks.py", WEIGHTS.parent / "networks.py") if p.exists()), DATA / "networks.py")
TRANSFORM = ImageTransform(32, 32, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Near AUROC in %, 2,000 training images against 1,000 images of each test set.
GOLDEN = {"energy": 86.86, "mixup": 88.19, "mean": 88.13, "real": 89.28}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.skipif(
        not (DATA / "images_classic").is_dir()
        or not (WEIGHTS / "resnet20_cifar10.pt").exists()
        or not NETWORKS.exists(),
        reason=f"no real images and weights in {DATA}",
    ),
]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_model(f"{NETWORKS}:resnet20", WEIGHTS / "resnet20_cifar10.pt").model


def loader(name: str, n: int, batch_size: int = 100) -> ImageLoader:
    """The first n images of a list, in an order drawn by a fixed seed."""
    source = read_source(DATA / "benchmark_imglist" / "cifar10" / f"{name}.txt", root=DATA / "images_classic")
    chosen = np.random.default_rng(0).permutation(len(source))[:n]
    assert source.labels is not None
    part = ImageSource(tuple(source.paths[i] for i in chosen), tuple(source.labels[i] for i in chosen), source.classes)
    return image_loader(part, TRANSFORM, batch_size=batch_size, workers=0)


@pytest.fixture(scope="module")
def extracted(model: torch.nn.Module) -> dict[str, Extraction]:
    detector = GROOD(model)
    sizes = {"test_cifar10": 1000, "test_cifar100": 1000, "test_tin": 1000, "val_cifar10": 500}
    return {name: detector.extract(loader(name, n), progress=False) for name, n in sizes.items()}


@pytest.fixture(scope="module")
def fitted(model: torch.nn.Module) -> GROOD:
    return GROOD(model, outliers=Mixup(n=100, lam=0.9)).fit(loader("train_cifar10", 2000), progress=False)


def near_auroc(detector: GROOD, extracted: dict[str, Extraction]) -> float:
    known = detector.log_score_features(extracted["test_cifar10"].features)
    return float(
        np.mean(
            [auroc(known, detector.log_score_features(extracted[n].features)) for n in ("test_cifar100", "test_tin")]
        )
    )


def test_the_layers_are_those_of_the_paper(fitted: GROOD) -> None:
    assert (fitted.fit_info_.head, fitted.fit_info_.early_layer) == ("linear", "layer1")
    assert fitted.fit_info_.n_features == 64


def test_classifier_and_nearest_prototype_are_as_accurate_as_published(
    fitted: GROOD, extracted: dict[str, Extraction]
) -> None:
    test = extracted["test_cifar10"]
    fitted.calibrate_features(extracted["val_cifar10"].features)
    found = fitted.predict_features(test.features, test.logits.argmax(1))
    assert float((found.label == test.labels).double().mean()) == pytest.approx(0.917, abs=0.02)
    assert float((found.prototype_label == test.labels).double().mean()) == pytest.approx(0.917, abs=0.02)


def test_golden_near_auroc(fitted: GROOD, extracted: dict[str, Extraction]) -> None:
    assert 100 * near_auroc(fitted, extracted) == pytest.approx(GOLDEN["mixup"], abs=0.3)


def test_golden_near_auroc_of_the_prototype_mean(model: torch.nn.Module, extracted: dict[str, Extraction]) -> None:
    detector = GROOD(model, outliers=PrototypeMean()).fit(loader("train_cifar10", 2000), progress=False)
    assert 100 * near_auroc(detector, extracted) == pytest.approx(GOLDEN["mean"], abs=0.3)


def test_golden_near_auroc_of_the_default(model: torch.nn.Module, extracted: dict[str, Extraction]) -> None:
    detector = GROOD(model).fit(loader("train_cifar10", 2000), progress=False)
    assert 100 * near_auroc(detector, extracted) == pytest.approx(GOLDEN["energy"], abs=0.3)


def test_golden_near_auroc_of_real_outliers(model: torch.nn.Module, extracted: dict[str, Extraction]) -> None:
    outliers = OutlierSamples(loader("val_tin", 200))
    detector = GROOD(model, outliers=outliers).fit(loader("train_cifar10", 2000), progress=False)
    assert detector.fit_info_.uses_ood_data
    assert 100 * near_auroc(detector, extracted) == pytest.approx(GOLDEN["real"], abs=0.3)


def test_the_false_alarm_rate_is_kept(fitted: GROOD, extracted: dict[str, Extraction]) -> None:
    fitted.calibrate_features(extracted["val_cifar10"].features, fpr=0.1)
    flagged = fitted.predict_features(extracted["test_cifar10"].features).is_ood.double().mean()
    # Both the 500 calibration and the 1,000 test images vary: ± 4 standard deviations of the difference.
    assert float(flagged) == pytest.approx(0.1, abs=4 * (0.1 * 0.9 * (1 / 500 + 1 / 1000)) ** 0.5)


def test_an_approximate_index_finds_the_same_scores(fitted: GROOD, extracted: dict[str, Extraction]) -> None:
    gradients = fitted._need_state().searcher.gradients
    approximate = FaissIndex("IVF16,Flat", {"nprobe": 16}).build(gradients)
    queries = fitted._need_state().gradient_field(extracted["test_cifar100"].features).gradients
    exact = fitted.log_score_features(extracted["test_cifar100"].features)
    found = approximate.search(queries).log_distance.flatten()
    assert float((found == exact).double().mean()) > 0.95


def test_the_batch_size_and_the_order_change_nothing(model: torch.nn.Module, fitted: GROOD) -> None:
    other = GROOD.paper(model).fit(loader("train_cifar10", 2000, batch_size=77), progress=False)
    # The network's own float32 sums depend on the batch; the outliers drawn do not.
    torch.testing.assert_close(other.ood_prototype_, fitted.ood_prototype_, rtol=1e-4, atol=1e-4)


def test_images_of_another_size_are_refused(fitted: GROOD) -> None:
    with pytest.raises(GroodError, match=r"shape \(3, 64, 64\).*fitted on images of shape \(3, 32, 32\)"):
        fitted.score(torch.zeros(2, 3, 64, 64), progress=False)
