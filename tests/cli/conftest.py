"""A classifier of real images in a folder: scikit-learn's digits 0-3, with 4-9 as out-of-distribution data."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")

import torch
from command import PREPARED, run
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

NETWORK = '''
from torch import nn

def net(num_classes: int = 10) -> nn.Module:
    """A small network; the weights tell the number of classes."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, num_classes),
    )
'''
NAMES = ("zero", "one", "two", "three")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nets.py, net.safetensors, {train,val,test}/<class>/*.png, ood/*.png and a fitted, calibrated net.grood."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "nets.py").write_text(NETWORK)
    digits = load_digits()
    images, labels = (digits.images * 255 / 16).astype("uint8"), digits.target
    (folder / "ood").mkdir()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        split = ("train", "train", "val", "test")[i % 4]
        target = folder / split / NAMES[label] if label < len(NAMES) else folder / "ood"
        target.mkdir(parents=True, exist_ok=True)
        if label < len(NAMES) or i % 20 == 0:
            Image.fromarray(image).save(target / f"{i:04}.png")
    _train(folder)
    fitted = run(
        *("fit", "--model", folder / "nets.py:net", "--weights", folder / "net.safetensors", *PREPARED),
        *("--train", folder / "train", "--calibrate", folder / "val", "--output", folder / "net.grood", "--quiet"),
    )
    assert (fitted.code, fitted.out, fitted.err) == (0, "", "")
    return folder


@pytest.fixture
def digits(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change, as the current folder."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _train(folder: Path) -> None:
    from torch_grood.data import ImageTransform, image_loader, read_source

    spec = importlib.util.spec_from_file_location("digit_nets", folder / "nets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    factory: Callable[[int], torch.nn.Module] = module.net
    transform = ImageTransform(None, None, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    source = read_source(folder / "train")
    images, labels, _ = next(iter(image_loader(source, transform, batch_size=len(source), workers=0)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # The classes are the sorted names: one, three, two, zero.
        model = factory(len(NAMES))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(30):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    save_file(model.state_dict(), folder / "net.safetensors")
