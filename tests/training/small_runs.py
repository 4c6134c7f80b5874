"""Trainings of a second: tiny networks on `models.patterns`, and what two runs must share."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import write_patterns
from torch_grood.training import Computation, Recipe, TrainingRun, train
from torch_grood.training.learner import Learner

NETWORKS = '''
from types import SimpleNamespace

import torch
from torch import nn


def net(num_classes: int = 3) -> nn.Module:
    """With batch normalisation and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, num_classes),
    )


def plain(num_classes: int = 3) -> nn.Module:
    """With neither, so that a batch may be parted."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(128, num_classes),
    )


class _Changed(nn.Module):
    def __init__(self, num_classes, change):
        super().__init__()
        self.body = plain(num_classes)
        self.change = change

    def forward(self, images):
        return self.change(self.body(images))


def with_logits(num_classes: int = 3) -> nn.Module:
    return _Changed(num_classes, lambda logits: SimpleNamespace(logits=logits))


def with_auxiliary(num_classes: int = 3) -> nn.Module:
    return _Changed(num_classes, lambda logits: (logits, logits * torch.nan))


def with_maps(num_classes: int = 3) -> nn.Module:
    return _Changed(num_classes, lambda logits: logits[:, :, None, None])


def half_frozen(num_classes: int = 3) -> nn.Module:
    model = plain(num_classes)
    model[0].requires_grad_(False)
    return model
'''

RECIPE = Recipe(
    "small",
    "nets.py:net",
    transform="cifar10",
    crop="padded",
    padding=4,
    flip=False,
    epochs=3,
    batch_size=8,
    lr=0.05,
    final_lr=1e-4,
    momentum=0.9,
    weight_decay=1e-3,
    seed=5,
)
"""66 images in batches of 8 are 9 steps an epoch, 27 in all."""

CPU = Computation(device="cpu", workers=0)


def write_world(folder: Path) -> Path:
    """nets.py and data/{train,val}/{a,b,c}/*.png, 66 and 30 images of 8 × 8."""
    (folder / "nets.py").write_text(NETWORKS)
    write_patterns(folder / "data" / "train", 66, seed=1)
    write_patterns(folder / "data" / "val", 30, seed=2)
    return folder


def run(recipe: Recipe, output: Path, data: Path, computation: Computation = CPU, **arguments: Any) -> TrainingRun:
    """Train silently."""
    return train(recipe, data, output, computation=computation, progress=False, **arguments)


def weights_of(done: TrainingRun) -> dict[str, Tensor]:
    """The weights on the disk."""
    return load_file(done.folder.weights)


def figures_of(done: TrainingRun) -> list[dict[str, Any]]:
    """Figures without the times, of the run and, as they must be the same, of its record and table."""
    figures = [asdict(one) for one in done.figures]
    assert json.loads((done.folder.path / "run.json").read_text())["history"] == figures
    assert len((done.folder.path / "log.csv").read_text().splitlines()) == 1 + len(figures)
    for one in figures:
        assert one.pop("seconds") >= 0
        assert one.pop("images_per_second") > 0
    return figures


def assert_same_run(found: TrainingRun, expected: TrainingRun) -> None:
    """To the bit: weights, and figures but for times."""
    assert found.complete
    assert expected.complete
    assert found.steps == expected.steps
    assert found.folder.weights.read_bytes() == expected.folder.weights.read_bytes()
    assert figures_of(found) == figures_of(expected)
    assert not found.folder.checkpoint.exists()


def assert_close_weights(found: TrainingRun, expected: TrainingRun, **tolerance: float) -> None:
    ours, theirs = weights_of(found), weights_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, **tolerance)


def at_step(patch: pytest.MonkeyPatch, number: int, do: Callable[[], object]) -> None:
    """Do something right after the network has learnt from the step of this number, 0, 1, …"""
    step = Learner.step

    def wrapped(self: Learner, *arguments: Any) -> None:
        step(self, *arguments)
        if arguments[0].number == number:
            do()

    patch.setattr(Learner, "step", wrapped)


def press_ctrl_c() -> None:
    """As a terminal does."""
    os.kill(os.getpid(), signal.SIGINT)


def cut_power() -> None:
    """Nothing that the library handles."""
    raise PowerCutError


class PowerCutError(BaseException):
    """The end of a process, which no handler sees coming."""
