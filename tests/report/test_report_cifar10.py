"""A page on a trained ResNet-20 and tens of thousands of real images; see tests/test_cifar10.py for what it needs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from report_world import Page
from scipy.stats import betabinom

from browser import CHROMIUM, browser_page
from torch_grood import GROOD
from torch_grood._conformal import rank_of
from torch_grood.data import ImageSource, ImageTransform, image_loader, read_source
from torch_grood.models import load_model
from torch_grood.report import Options, ReportSet, detector_report, write_page

DATA = Path(os.environ.get("GROOD_DATA", "~/.cache/torch-grood/openood")).expanduser()
WEIGHTS = Path(os.environ.get("GROOD_WEIGHTS", DATA / "weights"))
NETWORKS = next((p for p in (DATA / "networks.py", WEIGHTS.parent / "networks.py") if p.exists()), DATA / "networks.py")
TRANSFORM = ImageTransform(32, 32, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

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


def source(name: str, every: int = 1) -> ImageSource:
    found = read_source(DATA / "benchmark_imglist" / "cifar10" / f"{name}.txt", root=DATA / "images_classic")
    labels = None if found.labels is None or -1 in found.labels else found.labels[::every]
    return ImageSource(found.paths[::every], labels, None, found.origin)


@pytest.fixture(scope="module")
def text() -> str:
    model = load_model(f"{NETWORKS}:resnet20", WEIGHTS / "resnet20_cifar10.pt").model

    def loader(name: str, every: int = 1) -> object:
        return image_loader(source(name, every), TRANSFORM, batch_size=250, workers=0)

    detector = GROOD(model).fit(loader("train_cifar10", 10), progress=False)
    detector.calibrate(loader("val_cifar10"), fpr=0.05, progress=False)
    sets = [
        ReportSet("CIFAR-10", "known", source("test_cifar10")),
        ReportSet("CIFAR-100", "near", source("test_cifar100", 4)),
        ReportSet("MNIST", "far", source("test_mnist", 10)),
    ]
    options = Options(batch_size=250, draws=100, workers=0, training_root=DATA / "images_classic")
    return detector_report(detector, TRANSFORM, sets, options, progress=lambda name: False)


def test_the_page_is_small(text: str) -> None:
    assert 500_000 < len(text.encode()) < 5_000_000
    assert 'class="gone"' not in text


def test_promised_and_observed_agree(text: str) -> None:
    """9,000 images of the law of the 1,000 that set the threshold; at 99.9 %."""
    page = " ".join(Page(text).texts("main"))
    found = re.search(r"At the promised 5 %, ([\d,]+) of 9,000 known images are flagged", page)
    assert found is not None
    rank = rank_of(0.05, 1000)
    law = betabinom(9000, rank, 1001 - rank)
    assert law.ppf(0.0005) <= int(found[1].replace(",", "")) <= law.ppf(0.9995)
    assert "That does not speak against the promise" in page


def test_far_images_are_told_better_than_near_ones(text: str) -> None:
    tiles = " ".join(Page(text).texts("li"))
    found = [float(one) for one in re.findall(r"AUROC, (?:near|far) unknown images ([\d.]+) %", tiles)]
    assert 85 < found[0] < found[1]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_browser_complains_of_nothing(text: str, tmp_path: Path) -> None:
    pytest.importorskip("playwright")
    write_page(tmp_path / "page.html", text)
    with browser_page() as (page, complaints):
        page.goto((tmp_path / "page.html").as_uri())
        assert page.evaluate("[...document.images].filter(one => one.naturalWidth === 0).length") == 0
        assert complaints == []
