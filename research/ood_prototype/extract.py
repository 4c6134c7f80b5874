"""What a classifier says of its images and of all that is made of them, kept for the study.

    python research/ood_prototype/extract.py split --split SPLITS/split-0 --output WORLDS
    python research/ood_prototype/extract.py published --model networks.py:resnet20 --weights resnet20_cifar10.pt \
        --mean .485,.456,.406 --std .229,.224,.225 --data OPENOOD_FOLDER --output WORLDS

A world is a safetensors file. `split` worlds have the four classes put aside, and drawn images as far-OOD.
`published` ones have training and validation images only; their OOD test sets go to a file of their own, which the
last step of the study alone opens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from made import DRAWN, FROM_IMAGES
from safetensors.torch import save_file
from splits import SPLITS
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from torch_grood import GROOD
from torch_grood.data import FeatureCache, ImageLoader, ImageTransform, image_loader, read_source
from torch_grood.data.transforms import PRESETS
from torch_grood.features import FeatureExtractor
from torch_grood.models import load_model
from torch_grood.prototypes import ClassPrototypes
from torch_grood.stored_pass import stored_extractions

N_MADE, N_DRAWN, N_FOR_PROTOTYPES = 1000, 500, 5000
LAMBDAS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
NEAR, FAR = ("cifar100", "tin"), ("mnist", "texture")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    split = commands.add_parser("split")
    split.add_argument("--split", type=Path, required=True)
    published = commands.add_parser("published")
    published.add_argument("--model", required=True)
    published.add_argument("--weights", type=Path)
    published.add_argument("--name")
    published.add_argument("--mean", default="")
    published.add_argument("--std", default="")
    published.add_argument("--data", type=Path, required=True)
    published.add_argument("--cache", type=Path, default=Path("~/.cache/torch-grood/benchmark").expanduser())
    for command in (split, published):
        command.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.command == "split":
        extract_split(arguments.split, arguments.output / f"{arguments.split.name}.safetensors")
    else:
        extract_published(arguments)


def extract_split(folder: Path, output: Path) -> None:
    """A network that has never seen four of the classes."""
    network = f"{Path(__file__).parent / 'networks.py'}:{SPLITS[folder.name][0]}"
    run = folder / "run"
    transform = PRESETS["cifar10"]
    n_classes = len(read_source(folder / "images/train").classes or ())
    model = load_model(network, run / "model.safetensors", num_classes=n_classes).model
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    detector = GROOD(model)
    found: dict[str, Tensor] = {}
    loaders = {
        part: image_loader(read_source(folder / "images" / part), transform, batch_size=200)
        for part in ("train", "val", "aside")
    }
    for part, loader in loaders.items():
        found |= _named(part, detector.extract(loader))
    size = transform.crop
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.mean, transform.std))
    for name, draw in DRAWN.items():
        images = (draw(N_DRAWN, size, torch.Generator().manual_seed(1)) - mean) / std
        found |= _named(f"far/{name}", detector.extract(images))
    found |= made_features(model, loaders["train"])
    save_file(_contiguous(found), output)


def extract_published(arguments: argparse.Namespace) -> None:
    """A published checkpoint: training and validation images, and apart from them the OOD test sets."""
    loaded = load_model(arguments.model, arguments.weights, num_classes=10)
    model = loaded.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    transform = loaded.transform
    if arguments.mean:
        mean, std = (tuple(float(x) for x in text.split(",")) for text in (arguments.mean, arguments.std))
        transform = ImageTransform(resize=32, crop=32, interpolation="bilinear", mean=mean, std=std)  # type: ignore[arg-type]
    assert transform is not None
    name = arguments.name or Path(str(arguments.weights)).stem.partition("_")[0]
    lists = arguments.data / "benchmark_imglist/cifar10"
    extractor, store = FeatureExtractor(model), FeatureCache(arguments.cache)

    def loader(listed: str) -> ImageLoader:
        return image_loader(
            read_source(lists / f"{listed}.txt", root=arguments.data / "images_classic"), transform, batch_size=64
        )

    def read(part: str, listed: str) -> dict[str, Tensor]:
        images = loader(listed)
        parts = [part.found for part in stored_extractions(extractor, images, store, description=listed)]
        found = {
            f"{part}.features": torch.cat([p.features for p in parts]),
            f"{part}.logits": torch.cat([p.logits for p in parts]),
        }
        labels = images.dataset.source.labels
        return found | ({} if labels is None else {f"{part}.labels": torch.tensor(labels)})

    found = read("train", "train_cifar10") | read("val", "val_cifar10")
    found |= made_features(model, loader("train_cifar10"))
    save_file(_contiguous(found), arguments.output / f"{name}.safetensors")
    tests = read("id", "test_cifar10") | read("real", "val_tin")
    for ood in (*NEAR, *FAR):
        tests |= read(ood, f"test_{ood}")
    save_file(_contiguous(tests), arguments.output / f"{name}.test.safetensors")


def made_features(model: nn.Module, loader: ImageLoader) -> dict[str, Tensor]:
    """Features and logits of the outliers that are made of training images, in image space and at each early layer."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(loader.dataset), generator=generator)[:N_FOR_PROTOTYPES].tolist()
    batches = list(DataLoader(Subset(loader.dataset, chosen), batch_size=200))  # type: ignore[arg-type]
    images = torch.cat([batch[0] for batch in batches])
    labels = torch.cat([batch[1] for batch in batches])
    detector = GROOD(model)
    found: dict[str, Tensor] = {}
    for name, make in FROM_IMAGES.items():
        found |= _named(f"made/{name}", detector.extract(make(images[:N_MADE], generator)))
    for layer in early_layers(model, images[:2]):
        extractor = FeatureExtractor(model, early_layer=layer)
        early = ClassPrototypes(int(labels.max()) + 1)
        with extractor.evaluation():
            for part, rows in zip(images.split(200), labels.split(200), strict=True):
                extractor(part, lambda e, rows=rows, into=early: into.update(e, rows))
            runner_up = detector.extract(images[:N_MADE]).logits.topk(2).indices[:, 1]
            for lam in LAMBDAS:
                parts = []
                for part, other in zip(images[:N_MADE].split(200), runner_up.split(200), strict=True):
                    partner = early.means[other].float()
                    parts.append(extractor(part, lambda e, p=partner, w=lam: w * e + (1 - w) * p))
                found[f"made/{layer} {lam}.features"] = torch.cat([p.features for p in parts])
                found[f"made/{layer} {lam}.logits"] = torch.cat([p.logits for p in parts])
    return found


def early_layers(model: nn.Module, images: Tensor) -> list[str]:
    """The first three stages, by depth."""
    names = [name for name, _ in model.named_children() if name.startswith(("layer", "block"))]
    return names[:3]


def _named(part: str, found: object) -> dict[str, Tensor]:
    fields = found._asdict()  # type: ignore[attr-defined]
    return {f"{part}.{name}": tensor for name, tensor in fields.items() if tensor is not None}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    main()
