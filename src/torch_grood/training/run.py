"""A training from first to last: images, network and folder for the loop, on Hugging Face accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_grood._files import sha256_of
from torch_grood._interrupts import interrupts
from torch_grood._progress import Progress
from torch_grood.data.transforms import PRESETS, ImageTransform
from torch_grood.errors import GroodError
from torch_grood.models import new_model
from torch_grood.training.computation import Computation
from torch_grood.training.folder import EpochFigures, RunFolder
from torch_grood.training.images import find_images
from torch_grood.training.learner import Learner
from torch_grood.training.loop import Loop
from torch_grood.training.recipe import Recipe

__all__ = ["TrainingRun", "train"]

# What of a recipe has no say in the result.
_FOR_PEOPLE = ("title", "reference")


@dataclass(frozen=True)
class TrainingRun:
    """What came of a training.

    Attributes:
        folder: with its files, see `torch_grood.training.folder`.
        recipe: what was trained.
        figures: of each epoch.
        complete: False if it was interrupted; the same call goes on.
        steps: done.
        n_steps: of a complete run.
    """

    folder: RunFolder
    recipe: Recipe
    figures: tuple[EpochFigures, ...]
    complete: bool
    steps: int
    n_steps: int


def train(
    recipe: Recipe,
    data: str | Path,
    output: str | Path,
    *,
    weights: str | Path | None = None,
    computation: Computation | None = None,
    progress: Progress = None,
) -> TrainingRun:
    """Train a classifier, or go on with a training that was interrupted.

    Ctrl-C ends it after the step at hand, with a checkpoint and usable weights; a second one ends it at once.

    Args:
        recipe: what to train.
        data: folder of the images, see `find_images`.
        output: folder of the run; made if it is not there.
        weights: a file to start from; a head of another number of classes starts anew.
        computation: how.
        progress: of the decoding of images, and of the steps.

    Returns:
        the run; a complete one of the same recipe and data is returned as it is.

    Raises:
        GroodError: if images, weights or the folder are not in order, a loss is not finite, or a file cannot be
            written; what was kept before is still there.
    """
    computation = computation or Computation()
    folder = RunFolder(output)
    images = find_images(recipe, data)
    identity = {
        "recipe": {name: value for name, value in recipe.to_dict().items() if name not in _FOR_PEOPLE},
        "images": {"digest": images.digest, "train": len(images.train), "val": len(images.val)},
        "start": None if weights is None else _digest(Path(weights)),
    }
    earlier = folder.earlier(identity)
    if earlier is not None and earlier.get("status") == "complete":
        figures = folder.figures(earlier)
        return TrainingRun(folder, recipe, figures, True, figures[-1].steps, figures[-1].steps)
    with computation.accelerator() as accelerator, torch.random.fork_rng(_gpus(computation)):
        torch.manual_seed(recipe.seed)
        start = new_model(recipe.model, images.n_classes, pretrained=recipe.pretrained, weights=weights)
        transform = _transform(recipe, start.transform)
        record = {
            "title": recipe.title or recipe.name,
            **identity,
            "model": {"spec": start.spec, "num_classes": images.n_classes},
            "classes": None if images.train.classes is None else list(images.train.classes),
            "transform": transform.to_dict(),
            "computation": computation.described(accelerator),
        }
        loop = Loop(
            recipe=recipe,
            folder=folder,
            images=images,
            transform=transform,
            learner=Learner(start.model, images.n_classes, transform, recipe, computation, accelerator),
            computation=computation,
            accelerator=accelerator,
            identity=identity,
            record=record,
            progress=progress if accelerator.is_main_process else False,
        )
        for note in (*images.notes, *start.notes):
            loop.say(note)
        with folder.alone() if accelerator.is_main_process else nullcontext(), _enough_memory():
            loop.begin(earlier)
            with interrupts() as interrupted:
                complete = loop.run(interrupted)
            loop.end(complete)
        return TrainingRun(folder, recipe, tuple(loop.figures), complete, loop.step, loop.plan.n_steps)


def _transform(recipe: Recipe, own: ImageTransform | None) -> ImageTransform:
    if recipe.transform is not None:
        if recipe.transform not in PRESETS:
            raise GroodError(f"transform must be one of {', '.join(PRESETS)}, not {recipe.transform!r:.100}")
        return PRESETS[recipe.transform]
    if own is None:
        raise GroodError(
            f"{recipe.model} does not say how its images are prepared; name a preset ({', '.join(PRESETS)}): "
            "--set transform=imagenet"
        )
    return own


def _gpus(computation: Computation) -> range:
    """Whose random state is to be kept; a GPU that is not meant to be used is left alone."""
    return range(torch.cuda.device_count() if computation.device in ("auto", "cuda") else 0)


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise GroodError(f"{path} cannot be read: {error.strerror or error}") from None


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise GroodError(
            f"{reason} Run a batch in parts (--micro-batch 32), or take a smaller one (--set batch_size=32), which is "
            "another training"
        ) from None
