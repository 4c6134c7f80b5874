"""Images and networks for trainings of a second."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from small_runs import RECIPE, run, write_world

from torch_grood.training import Recipe, TrainingRun


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nets.py and data/{train,val}/{a,b,c}/*.png."""
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def data(world: Path) -> Path:
    """The folder of the images."""
    return world / "data"


@pytest.fixture(scope="session")
def recipe(world: Path) -> Recipe:
    """Three epochs of nine steps, of a network with batch normalisation and dropout."""
    return replace(RECIPE, model=f"{world / 'nets.py'}:net")


@pytest.fixture(scope="session")
def plain(world: Path) -> Recipe:
    """As `recipe`, of a network without both."""
    return replace(RECIPE, model=f"{world / 'nets.py'}:plain")


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, data: Path, recipe: Recipe) -> TrainingRun:
    """A run of `recipe`, not to be written to."""
    return run(recipe, tmp_path_factory.mktemp("runs") / "done", data)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes longer than a small training: curves, waiting for the disk, and a collection of garbage."""
    monkeypatch.setattr("torch_grood.training.curve.draw_curve", lambda path, *_: path.touch())
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("gc.collect", lambda *_: 0)
