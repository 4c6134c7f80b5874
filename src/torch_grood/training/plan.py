"""Which images make up which step, and the learning rate of it: functions of the step's number alone.

A run that goes on after a kill therefore needs nothing but that number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from torch_grood.errors import GroodError
from torch_grood.training.recipe import Recipe

__all__ = ["Plan", "Step", "learning_rate"]

# Batch normalisation needs two images.
_LEAST = 2


@dataclass(frozen=True)
class Step:
    """One step of one process.

    Attributes:
        number: 0, 1, … over all epochs.
        epoch: 0, 1, …
        positions: of the images of this process.
        n_images: of all processes together.
        ends_epoch: whether it is an epoch's last.
    """

    number: int
    epoch: int
    positions: tuple[int, ...]
    n_images: int
    ends_epoch: bool


@dataclass(frozen=True)
class Plan:
    """The steps of a training.

    Every epoch is one permutation of the images, by (seed, epoch); its last batch is shorter, or is left out if there
    are not two images for each process.

    Attributes:
        n_images: training images.
        batch_size: images a step, of all processes together.
        epochs: passes.
        seed: of the permutations.
        process: this process, of 0, …, processes − 1.
        processes: how many share a batch.

    Raises:
        GroodError: if there are not two images for each process.
    """

    n_images: int
    batch_size: int
    epochs: int
    seed: int
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if min(self.n_images, self.batch_size) < _LEAST * self.processes:
            raise GroodError(
                f"{self.n_images} training images in batches of {self.batch_size} do not give each of "
                f"{self.processes} processes {_LEAST} images a step; raise batch_size or use fewer processes"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch."""
        full, rest = divmod(self.n_images, self.batch_size)
        return full + (rest >= _LEAST * self.processes)

    @property
    def n_steps(self) -> int:
        """Steps of all epochs."""
        return self.steps_per_epoch * self.epochs

    def steps(self, first: int = 0) -> Iterator[Step]:
        """The steps from number `first` on."""
        for epoch in range(first // self.steps_per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_images)
            begin = max(first - epoch * self.steps_per_epoch, 0)
            for step in range(begin, self.steps_per_epoch):
                batch = order[step * self.batch_size : (step + 1) * self.batch_size]
                own = np.array_split(batch, self.processes)[self.process]
                number = epoch * self.steps_per_epoch + step
                yield Step(number, epoch, tuple(own.tolist()), len(batch), step + 1 == self.steps_per_epoch)


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """lr of a step: a linear rise over the warm-up, then half a cosine down to `final_lr`."""
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    progress = (step - warmup) / max(recipe.epochs * steps_per_epoch - warmup, 1)
    return recipe.final_lr + (recipe.lr - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
