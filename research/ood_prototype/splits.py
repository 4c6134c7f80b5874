"""Classifiers that have never seen some classes: the worlds on which everything in this study is chosen.

    python research/ood_prototype/splits.py --data OPENOOD_FOLDER --output SPLITS

Of CIFAR-10's training images alone. In each split the images of four classes are put aside, and a network is trained
from scratch on nine tenths of the other six; the last tenth tests it. The four classes are near-OOD for this network
as CIFAR-100 is for one trained on CIFAR-10. Over the five splits each class is put aside twice. In a sixth, each of six
classes turned by 0, 90, 180 and 270° is a class of its own: 24 classes, and a less certain network. Two more were
trained for twice as long, nearer to what published checkpoints are.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from torch_grood.data import read_source
from torch_grood.training import Computation, Recipe, train

HERE = Path(__file__).parent
N_PUT_ASIDE = 4
# name: (network, epochs, whether turned images are classes of their own)
SPLITS = {
    "split-0": ("narrow", 15, False),
    "split-1": ("middle", 8, False),
    "split-2": ("narrow", 15, False),
    "split-3": ("middle", 8, False),
    "split-4": ("narrow", 15, False),
    "turned": ("narrow", 12, True),
    "long-0": ("narrow", 30, False),
    "long-1": ("narrow", 30, False),
}
TURNED_SHARE = 0.5


def main() -> None:
    """Make the folders and train; what is there already stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in OpenOOD's layout")
    parser.add_argument("--output", type=Path, required=True, help="folder for the splits")
    parser.add_argument("--only", action="append", choices=list(SPLITS), help="not all of them")
    arguments = parser.parse_args()
    source = read_source(
        arguments.data / "benchmark_imglist/cifar10/train_cifar10.txt", root=arguments.data / "images_classic"
    )
    assert source.labels is not None
    labels = np.array(source.labels)
    for position, (name, (network, epochs, turned)) in enumerate(SPLITS.items()):
        if arguments.only and name not in arguments.only:
            continue
        folder = arguments.output / name
        make_images(folder / "images", [str(path) for path in source.paths], labels, position, turned)
        recipe = Recipe(
            name=f"leave-classes-out {name}",
            model=f"{HERE / 'networks.py'}:{network}",
            transform="cifar10",
            crop="padded",
            padding=4,
            flip=not turned,
            epochs=epochs,
            batch_size=128,
            lr=0.1,
            weight_decay=5e-4,
        )
        run = train(recipe, folder / "images", folder / "run", computation=Computation(mixed_precision="bf16"))
        print(f"{name}: {run.figures[-1].val_accuracy:.2%} of the held-out images", flush=True)


def classes_put_aside(seed: int = 0) -> list[list[int]]:
    """Four classes for each of five splits: each of the ten twice."""
    rng = np.random.default_rng(seed)
    while True:
        order = np.concatenate([rng.permutation(10), rng.permutation(10)])
        found = [sorted(part.tolist()) for part in order.reshape(-1, N_PUT_ASIDE)]
        if all(len(set(part)) == N_PUT_ASIDE for part in found):
            return found


def make_images(folder: Path, paths: list[str], labels: np.ndarray, position: int, turned: bool) -> None:
    """Class folders of links: train/ and val/ of the six classes, aside/ of the four."""
    if (folder / "classes.json").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    aside = classes_put_aside()[position % 5]
    rng = np.random.default_rng(position)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label))
        parts = {"aside": members[:2500]} if label in aside else {"val": members[:500], "train": members[500:]}
        for part, chosen in parts.items():
            for index in chosen:
                if turned and part == "train" and rng.random() > TURNED_SHARE:
                    continue
                for angle in (0, 90, 180, 270) if turned else (0,):
                    if turned and part != "train" and rng.random() > 0.25:
                        continue
                    target = folder / part / (f"{label}-{angle:03}" if turned else str(label)) / f"{index}.png"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if angle:
                        with Image.open(paths[index]) as image:
                            image.rotate(angle).save(target)
                    else:
                        shutil.copyfile(paths[index], target)
    (folder / "classes.json").write_text(json.dumps({"put aside": aside}))


if __name__ == "__main__":
    main()
