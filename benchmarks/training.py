"""What the loader and the bookkeeping of a training cost beside the bare training step, as ratios in one run.

    python benchmarks/training.py --data DIR                  # CIFAR-10 in OpenOOD's layout: images kept in memory
    python benchmarks/training.py --data DIR --files 1000     # JPEG files of 500×375 made of them, at 224×224

The bare step is forward, backward and optimiser on one batch that lies normalised in memory, in a loop of five lines.
The loop is `torch_grood.training.train` as users call it: steps are timed from the first to the last of an epoch, with
reading, augmentation, copying, normalisation, learning rate, checks and the progress hook; validation and checkpoints
are left out. Both take turns, so that the machine's moods fall on both; the median of the rounds' ratios is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from torch_grood.data import load_image, read_source
from torch_grood.models import new_model
from torch_grood.training import Computation, Recipe, read_recipe, train

WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="OpenOOD's folder, with CIFAR-10 in it")
    parser.add_argument("--files", type=int, default=0, help="measure so many large JPEG files instead")
    parser.add_argument("--steps", type=int, default=20, help="of each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    computation = Computation(
        device=arguments.device,
        mixed_precision=arguments.mixed_precision,
        compile=arguments.compile,
        workers=arguments.workers,
    )
    with tempfile.TemporaryDirectory() as folder:
        if arguments.files:
            recipe = replace(read_recipe("imagenet200-resnet18"), benchmark=None, batch_size=32)
            data = large_files(arguments.data, Path(folder) / "images", max(arguments.files, recipe.batch_size))
        else:
            recipe, data = read_recipe("cifar10-resnet18"), arguments.data
        measure(recipe, data, Path(folder), computation, arguments.steps, arguments.rounds)


def measure(recipe: Recipe, data: Path, folder: Path, computation: Computation, steps: int, rounds: int) -> None:
    """Print both rates and their ratio."""
    ratios, bare_rates, loop_rates = [], [], []
    for number in range(rounds):
        bare = bare_step(recipe, computation, steps)
        timed = Timed(steps)
        run = folder / f"run{number}"
        with contextlib.suppress(EnoughError):
            train(replace(recipe, epochs=1), data, run, computation=computation, progress=timed)
        looped = statistics.median(timed.seconds[WARM_UP:])
        ratios.append(looped / bare)
        bare_rates.append(recipe.batch_size / bare)
        loop_rates.append(recipe.batch_size / looped)
        print(f"round {number + 1}: bare {bare * 1e3:,.1f} ms a step, loop {looped * 1e3:,.1f} ms, {ratios[-1]:.3f} x")
    print(
        f"{recipe.name}, batch {recipe.batch_size}, {computation.mixed_precision}: bare "
        f"{statistics.median(bare_rates):,.0f} images/s, loop {statistics.median(loop_rates):,.0f}; loop / bare "
        f"{statistics.median(ratios):.3f} x (least {min(ratios):.3f}, most {max(ratios):.3f})"
    )


class EnoughError(Exception):
    """Ends a training when enough steps are timed."""


class Timed:
    """A progress hook that times the steps of the training's loop; other loops pass."""

    def __init__(self, steps: int) -> None:
        self.steps = steps + WARM_UP
        self.seconds: list[float] = []

    def __call__(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            if not hasattr(item, "ends_epoch"):
                yield item
                continue
            began = time.perf_counter()
            yield item
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - began)
            if len(self.seconds) == self.steps:
                raise EnoughError


def bare_step(recipe: Recipe, computation: Computation, steps: int) -> float:
    """Median seconds of forward, backward and optimiser on one batch in memory."""
    use_cuda = computation.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")
    size = 32 if recipe.crop == "padded" else 224
    model = new_model(recipe.model, 10).model.to(device).to(memory_format=torch.channels_last).train()
    network: Any = torch.compile(model) if computation.compile else model
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    images = torch.randn(recipe.batch_size, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (recipe.batch_size,), device=device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(computation.mixed_precision or "no")
    seconds = []
    for _ in range(WARM_UP + steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = functional.cross_entropy(network(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()
        if use_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


def large_files(data: Path, folder: Path, n: int) -> Path:
    """Class folders of JPEG files of 500×375, each a mosaic of real images, as heavy to decode as photographs."""
    source = read_source(data / "benchmark_imglist" / "cifar10" / "test_cifar10.txt", data / "images_classic")
    from PIL import Image

    for number in range(n):
        mosaic = Image.new("RGB", (500, 375))
        for tile in range(12):
            small = load_image(source.paths[(12 * number + tile) % len(source)]).resize((125, 125))
            mosaic.paste(small, (125 * (tile % 4), 125 * (tile // 4)))
        place = folder / ("train" if number % 10 else "val") / str(number // 10 % 10)
        place.mkdir(parents=True, exist_ok=True)
        mosaic.save(place / f"{number}.jpg", quality=90)
    return folder


if __name__ == "__main__":
    main()
