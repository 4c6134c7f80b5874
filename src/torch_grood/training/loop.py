"""The training loop, on Hugging Face accelerate: one process or several, any device, mixed precision.

Every random number is a function of the seed and the number of the step. So a run that is killed and goes on from its
checkpoint ends, on the same machine, with the same bits as one that is not.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_grood._progress import Progress, track
from torch_grood.data.dataset import default_workers
from torch_grood.data.transforms import PRESETS, ImageTransform
from torch_grood.errors import GroodError
from torch_grood.models import new_model
from torch_grood.training.augmentation import Augmentation
from torch_grood.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint, write_weights
from torch_grood.training.computation import Computation
from torch_grood.training.folder import EpochFigures, RunFolder, figures_of
from torch_grood.training.images import TrainingImages, find_images
from torch_grood.training.interrupts import interrupts
from torch_grood.training.learner import Learner
from torch_grood.training.loading import Images, Wanted, open_images
from torch_grood.training.plan import Plan, Step, learning_rate
from torch_grood.training.recipe import Recipe

__all__ = ["TrainingRun", "train"]

log = logging.getLogger(__name__)

# How often losses are looked at and processes agree on going on: an accelerator waits for either.
_STEPS_BETWEEN_CHECKS = 20
# What of a recipe has no say in the result.
_FOR_PEOPLE = ("title", "reference")
# Weights twice and the optimiser's state, and once more while a file takes the place of another.
_COPIES_ON_DISK = 8


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
        loop = _Loop(
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


@dataclass
class _Loop:
    """One call of `train`, between steps.

    Attributes:
        step: steps done.
        figures: of the epochs done.
    """

    recipe: Recipe
    folder: RunFolder
    images: TrainingImages
    transform: ImageTransform
    learner: Learner
    computation: Computation
    accelerator: Any
    identity: dict[str, Any]
    record: dict[str, Any]
    progress: Progress

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.plan = Plan(
            n_images=len(self.images.train),
            batch_size=min(recipe.batch_size, len(self.images.train)),
            epochs=recipe.epochs,
            seed=recipe.seed,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        self.step = 0
        self.figures: list[EpochFigures] = []
        self.watch = _Stopwatch()
        self.resumed: list[int] = []

    def say(self, message: str, level: int = logging.INFO) -> None:
        """A line in the log, from one process of all."""
        if self.accelerator.is_main_process:
            log.log(level, message)

    def begin(self, earlier: dict[str, Any] | None) -> None:
        """Read the checkpoint of an earlier call, or write the first files; then open the images."""
        self.accelerator.wait_for_everyone()
        if earlier is not None and self.folder.checkpoint.is_file():
            self._resume(read_checkpoint(self.folder.checkpoint))
            if earlier.get("computation") != self.record["computation"]:
                self.say("this run began elsewhere or with other settings: last bits may differ", logging.WARNING)
            if self.accelerator.is_main_process:
                self.folder.write_lists(self.images.train, self.images.val)
        elif self.accelerator.is_main_process:
            self.folder.begin(self._record("running"), self.images.train, self.images.val)
            self._check_space()
        self.accelerator.wait_for_everyone()
        recipe = self.recipe
        seen = Augmentation(self.transform, recipe.crop, recipe.padding, recipe.min_area, recipe.flip, recipe.seed)
        self.training = self._open(self.images.train, seen)
        self.validation = self._open(self.images.val, Augmentation(self.transform))

    def run(self, interrupted: threading.Event) -> bool:
        """Take the steps that are left; False if the user interrupted."""
        left = self.plan.n_steps - self.step
        # One list for the loader, which reads ahead, and one for the loop.
        wanted = (Wanted(step.epoch, step.positions) for step in self.plan.steps(self.step))
        batches = self.training.batches(wanted)
        saved = time.monotonic()
        self.watch.start()
        for step in track(_Counted(self.plan.steps(self.step), left), self.progress, "training"):
            rate = learning_rate(self.recipe, step.number, self.plan.steps_per_epoch)
            self.learner.step(step, rate, next(batches), self.training.labels[list(step.positions)])
            self.step = step.number + 1
            is_check = step.ends_epoch or self.step % _STEPS_BETWEEN_CHECKS == 0
            if is_check:
                self._check_losses()
            if step.ends_epoch:
                self._end_epoch(step, rate)
                saved = time.monotonic()
            if self._any_process(interrupted.is_set, is_check):
                break
            due = saved + self.computation.checkpoint_seconds
            if is_check and self._any_process(lambda due=due: time.monotonic() > due, True):  # type: ignore[misc]
                self._save_checkpoint()
                saved = time.monotonic()
        return self.step == self.plan.n_steps

    def end(self, complete: bool) -> None:
        """Write how it ended. A complete run needs its checkpoint no more."""
        if not complete:
            self._save_checkpoint()
            self._save_results("interrupted")
            return
        self._save_results("complete")
        if self.accelerator.is_main_process:
            self.folder.checkpoint.unlink(missing_ok=True)

    def _open(self, source: Any, augmentation: Augmentation) -> Images:
        how = self.computation
        return open_images(
            source,
            augmentation,
            memory=how.memory,
            # Files are read in every epoch.
            workers=default_workers(len(source) * self.recipe.epochs) if how.workers is None else how.workers,
            pin=self.accelerator.device.type == "cuda",
            progress=self.progress,
        )

    def _end_epoch(self, step: Step, rate: float) -> None:
        means = self.learner.take_means()
        trained = self.watch.seconds()
        val = self.learner.evaluate(self._validation_batches())
        if not math.isfinite(val.loss):
            raise self._diverged("the loss of the validation images is not finite")
        figures = EpochFigures(
            epoch=step.epoch + 1,
            steps=self.step,
            lr=rate,
            loss=means.loss,
            accuracy=means.accuracy,
            val_loss=val.loss,
            val_accuracy=val.accuracy,
            seconds=round(self.watch.seconds(), 3),
            images_per_second=round(means.n_images / trained, 1),
        )
        self.figures.append(figures)
        self.watch = _Stopwatch()
        self.say(
            f"epoch {figures.epoch}/{self.recipe.epochs}: loss {means.loss:.4f}, accuracy {means.accuracy:.2%}, "
            f"validation {val.accuracy:.2%}, {figures.images_per_second:,.0f} images/s, {figures.seconds:,.0f} s"
        )
        self._save_checkpoint()
        self._save_results("running")

    def _validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of this process."""
        shares = np.array_split(np.arange(len(self.validation)), self.accelerator.num_processes)
        own = shares[self.accelerator.process_index].tolist()
        size = self.recipe.batch_size
        wanted = [Wanted(0, own[start : start + size]) for start in range(0, len(own), size)]
        for want, pixels in zip(wanted, self.validation.batches(wanted), strict=True):
            yield pixels, self.validation.labels[list(want.positions)]

    def _check_losses(self) -> None:
        if not self.learner.loss_is_finite():
            raise self._diverged(
                f"the loss is no longer finite, at step {self.step:,} or up to {_STEPS_BETWEEN_CHECKS} before it"
            )

    def _diverged(self, what: str) -> GroodError:
        epoch = (self.step - 1) // self.plan.steps_per_epoch + 1
        return GroodError(
            f"{what} (epoch {epoch}); the last checkpoint is from before. Train in a new folder with a lower lr "
            f"(--set lr={self.recipe.lr / 10:g}) or with warmup_epochs, or with bf16 in place of fp16"
        )

    def _any_process(self, wish: Callable[[], bool], is_check: bool) -> bool:
        """Whether any process wishes it; several ask each other at checks only."""
        if self.accelerator.num_processes == 1:
            return wish()
        if not is_check:
            return False
        wishes = torch.tensor(float(wish()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(wishes).item() > 0)

    def _save_checkpoint(self) -> None:
        self._check_losses()
        sums = self.learner.sums()
        self.watch.pause()
        if self.accelerator.is_main_process:
            record = {
                "figures": [asdict(one) for one in self.figures],
                "seconds": self.watch.seconds(),
                "scaler": self.learner.scaler_state(),
                "resumed": self.resumed,
                "identity": self.identity,
                "steps_per_epoch": self.plan.steps_per_epoch,
            }
            write_checkpoint(
                self.folder.checkpoint,
                Checkpoint(self.step, self.learner.model.state_dict(), self.learner.optimizer_state(), sums, record),
            )
        self.accelerator.wait_for_everyone()
        self.watch.start()

    def _save_results(self, status: str) -> None:
        self.watch.pause()
        if self.accelerator.is_main_process:
            write_weights(self.folder.weights, self.learner.model)
            self.folder.write(self._record(status), self.figures)
        self.accelerator.wait_for_everyone()
        self.watch.start()

    def _record(self, status: str) -> dict[str, Any]:
        return {**self.record, "status": status, "steps": self.step, "resumed_at_steps": self.resumed}

    def _resume(self, checkpoint: Checkpoint) -> None:
        record = checkpoint.record
        if record.get("identity") != self.identity:
            raise GroodError(f"{self.folder.checkpoint} is that of another run; train in a new folder")
        if record.get("steps_per_epoch") != self.plan.steps_per_epoch:
            raise GroodError(
                f"with {self.plan.processes} processes an epoch has {self.plan.steps_per_epoch} steps, as each needs "
                f"two images a step, and with those that it began with {record.get('steps_per_epoch')}; go on with as "
                "many as then"
            )
        try:
            self.figures = list(figures_of(record["figures"]))
            self.watch = _Stopwatch(float(record["seconds"]))
            self.resumed = [*record["resumed"], checkpoint.step]
            scaler = record["scaler"]
            if not 0 < checkpoint.step <= self.plan.n_steps:
                raise ValueError(f"step {checkpoint.step}")
        except (KeyError, TypeError, ValueError) as error:
            raise GroodError(f"{self.folder.checkpoint} is damaged ({error}); train in a new folder") from None
        self.learner.restore(checkpoint.model, checkpoint.optimizer, scaler, checkpoint.sums)
        self.step = checkpoint.step
        self.say(f"going on from step {self.step:,} of {self.plan.n_steps:,}")

    def _check_space(self) -> None:
        """Say before a long run, not in it, that the disk is too small."""
        size = sum(tensor.nbytes for tensor in self.learner.model.state_dict().values())
        free = shutil.disk_usage(self.folder.path).free
        if free < _COPIES_ON_DISK * size:
            raise GroodError(
                f"{self.folder.path} has {free / 2**20:,.0f} MiB of free disk, and checkpoints of {self.recipe.model} "
                f"need {_COPIES_ON_DISK * size / 2**20:,.0f}; free some, or choose another folder"
            )


class _Stopwatch:
    """Seconds of work, pauses left out."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = None

    def start(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def pause(self) -> None:
        self._before, self._since = self.seconds(), None

    def seconds(self) -> float:
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)


class _Counted(Iterable[Step]):
    """Steps whose number is known, for a bar that tells the time left."""

    def __init__(self, steps: Iterator[Step], length: int) -> None:
        self._steps, self._length = steps, length

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def __len__(self) -> int:
        return self._length


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
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
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
