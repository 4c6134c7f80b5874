"""What the pages presuppose: folders of images, networks, detectors, OpenOOD's layout; all small, all made here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models import patterns, taught_cnn

FLOWERS = ("daisy", "dandelion", "rose", "sunflower", "tulip")
NETWORKS = '''
import torch
from torch import nn


class Small(nn.Module):
    """Its layers bear the names of a ResNet's; the weights tell the number of classes."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.layer1 = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())
        self.fc = nn.Linear(128, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


resnet18 = resnet20 = net = Small
'''
MY_BENCHMARK = """
name = "my"

[id.train]
folder = "flowers/train"

[id.val]
folder = "flowers/val"

[id.test]
folder = "flowers/test"

[val_ood]
folder = "stones"

[near.weeds]
folder = "weeds"
"""
# Pages that make or import all that they use.
FROM_NOTHING = ("docs/add-a-benchmark.md", "docs/benchmark.md", "docs/contract.md", "docs/export.md", "docs/method.md")
FROM_NOTHING += ("docs/tutorial.md", "docs/train.md", "docs/watch.md")
# A network of torchvision whose weights are 1.5 MB: disks are what these tests wait for.
SMALL = "shufflenet_v2_x0_5"
# Published weights, by the names that torchvision looks for; ours are random.
PUBLISHED = {SMALL: "shufflenetv2_x0.5-f707e7126e.pth"}


def write_world(folder: Path, run: Callable[..., Any]) -> Path:
    """All that the pages name, in one folder; `run` is the command line.

    The flowers are handwritten digits, and `flowers.grood` is a detector of a small network that has learned them.
    """
    _write_images(folder)
    for name in ("networks.py", "nets.py"):
        (folder / name).write_text(NETWORKS, encoding="utf-8")
    (folder / "my.toml").write_text(MY_BENCHMARK, encoding="utf-8")
    _write_weights(folder)
    small = ("--transform", "cifar10", "--set", "crop=none", "--set", "flip=false", "--epochs", 15, "--lr", 0.05)
    run("train", SMALL, "--data", folder / "flowers", "--output", folder / "runs/flowers", *small, "--quiet")
    for name in ("model.safetensors", "flowers.safetensors"):
        # Where `grood score flowers.grood` finds them: beside it.
        shutil.copy(folder / "runs/flowers/model.safetensors", folder / name)
    run(
        *("fit", "--model", folder / "runs/flowers", "--output", folder / "flowers.grood", "--quiet"),
        *("--train", folder / "flowers/train", "--calibrate", folder / "flowers/held_out"),
    )
    run("export", folder / "flowers.grood", "--quiet")
    write_openood(folder / "openood")
    return folder


def namespace(page: str, folder: Path) -> dict[str, Any]:
    """Names that the page's Python takes for granted, of that world; a page that begins from nothing gets none."""
    if page in FROM_NOTHING:
        return {}
    if page == "docs/integrations.md":
        return _integrations()
    return _flowers(folder) | ({} if page != "docs/long-fits.md" else _sources(folder))


def _flowers(folder: Path) -> dict[str, Any]:
    from torch_grood import GROOD
    from torch_grood.data import image_loader, read_source
    from torch_grood.models import load_model

    loaded = load_model(str(folder / "runs/flowers"))
    assert loaded.transform is not None
    loaders = {
        name: image_loader(read_source(folder / place), loaded.transform, workers=0)
        for name, place in (("train", "flowers/train"), ("held_out", "flowers/held_out"), ("more", "more"))
    }
    inbox = image_loader(read_source(folder / "inbox", labels="none"), loaded.transform, batch_size=500, workers=0)
    held_out = torch.cat([batch[0] for batch in loaders["held_out"]])
    images = next(iter(inbox))[0]
    return {
        "model": loaded.model,
        "transform": loaded.transform,
        "detector": GROOD.load(folder / "flowers.grood", loaded.model),
        "train_loader": loaders["train"],
        "loader": loaders["more"],
        "held_out_loader": loaders["held_out"],
        "held_out": held_out,
        "images": images[:20],
        "inbox": images,
    }


def _sources(folder: Path) -> dict[str, Any]:
    from torch_grood.data import read_source

    return {"train": read_source(folder / "in/train"), "held_out": read_source(folder / "in/val")}


def _integrations() -> dict[str, Any]:
    labels = torch.arange(90) % 3
    noise = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    features = noise + 4 * nn.functional.one_hot(labels, 8)
    return {
        "net": taught_cnn(),
        "transform": None,
        "train_features": features,
        "train_labels": labels,
        "features": features + 0.1,
    }


def small_benchmark(root: str, transform: Any = None) -> Any:
    """Takes the place of pytorch-ood's benchmark, whose images would have to be downloaded."""
    from pytorch_ood.benchmark import Benchmark
    from torch.utils.data import ConcatDataset, TensorDataset

    images, labels = patterns(150, 3, (3, 8, 8))
    noise = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    strange = TensorDataset(noise, torch.full((40,), -1))

    class Made(Benchmark):  # type: ignore[misc]
        ood_names = ("noise",)

        def train_set(self) -> Any:
            return TensorDataset(images[:90], labels[:90])

        def validation_set(self) -> Any:
            return ConcatDataset([TensorDataset(images[90:120], labels[90:120]), strange])

        def test_sets(self, known: bool = True, unknown: bool = True) -> Any:
            return [ConcatDataset([TensorDataset(images[120:], labels[120:]), strange])]

        def evaluate(self, *arguments: Any, **named: Any) -> Any:
            return super().evaluate(*arguments, device="cpu", **named)

    return Made()


def _write_images(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    shares = {"train": 60, "held_out": 100, "val": 130, "test": 150, "more": 158}
    seen = [0] * 10
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        if label < len(FLOWERS):
            share = next((name for name, end in shares.items() if seen[label] < end), "inbox")
            place = {"inbox": "inbox", "more": f"more/{FLOWERS[label]}"}.get(share, f"flowers/{share}/{FLOWERS[label]}")
        else:
            place = {5: "weeds", 6: "photos", 7: "stones"}.get(label, "inbox" if seen[label] < 8 else "")
            if seen[label] >= 30:
                continue
        seen[label] += 1
        if place:
            target = folder / place
            target.mkdir(parents=True, exist_ok=True)
            _picture(pixels).save(target / f"{i:04}.png")
    shutil.copytree(folder / "flowers/test", folder / "new")
    for name, of in (("train", "train"), ("val", "val")):
        shutil.copytree(folder / "flowers" / of, folder / "in" / name)
    for name in ("odd.jpg", "a.png", "b.png"):
        _picture(digits.images[-1]).save(folder / name)
    _picture(digits.images[-2]).resize((224, 224)).save(folder / "photo.jpg")
    lines = [{"path": f"inbox/{path.name}"} for path in sorted((folder / "inbox").iterdir())[:3]]
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _picture(pixels: Any) -> Image.Image:
    return Image.fromarray((np.asarray(pixels) * 255 / 16).astype("uint8")).resize((32, 32)).convert("RGB")


def _write_weights(folder: Path) -> None:
    import torchvision

    scope: dict[str, Any] = {}
    exec(NETWORKS, scope)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(scope["net"](10).state_dict(), folder / "resnet18.pt")
        torch.save(scope["net"](len(FLOWERS)).state_dict(), folder / "net.pt")
        hub = folder / "torch/hub/checkpoints"
        hub.mkdir(parents=True)
        for name, file in PUBLISHED.items():
            torch.save(torchvision.models.get_model(name).state_dict(), hub / file)


def write_openood(root: Path) -> None:
    """OpenOOD's layout with a handful of images in each set."""
    generator = torch.Generator().manual_seed(3)
    base = torch.rand(10, 32, 32, 3, generator=generator)

    def image(path: Path, pixels: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * pixels.clamp(0, 1)).byte().numpy()).save(path)

    def write(name: str, n: int, place: str, known: bool) -> None:
        lines = []
        for i in range(n):
            noise = torch.rand(32, 32, 3, generator=generator)
            label = i % 10 if known else -1
            path = f"{place}/{name}_{i}.png"
            image(root / "images_classic" / path, 0.7 * base[label] + 0.3 * noise if known else noise)
            lines.append(f"{path} {label}\n")
        lists = root / "benchmark_imglist/cifar10"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{name}.txt").write_text("".join(lines), encoding="utf-8")

    for name, n in (("train_cifar10", 60), ("val_cifar10", 30), ("test_cifar10", 40)):
        write(name, n, f"cifar10/{name.partition('_')[0]}", True)
    for name, place in (
        ("val_tin", "tin/val"),
        ("test_cifar100", "cifar100/test"),
        ("test_tin", "tin/test"),
        ("test_mnist", "mnist/test"),
    ):
        write(name, 20, place, False)
