"""The training loop: steps, epochs, checkpoints, and the wish to stop.

Every random number is a function of the seed and the number of the step. So a run that is killed and goes on from its
checkpoint ends, on the same machine, with the same bits as one that is not.
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_grood._progress import Progress, track
from torch_grood.data.dataset import default_workers
from torch_grood.data.sources import ImageSource
from torch_grood.data.transforms import ImageTransform
from torch_grood.errors import GroodError
from torch_grood.training.augmentation import Augmentation
from torch_grood.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint, write_weights
from torch_grood.training.computation import Computation
from torch_grood.training.folder import EpochFigures, RunFolder, figures_of
from torch_grood.training.images import TrainingImages
from torch_grood.training.learner import Learner
from torch_grood.training.loading import Images, Wanted, open_images
from torch_grood.training.plan import Plan, Step, learning_rate
from torch_grood.training.recipe import Recipe
from torch_grood.training.timing import Counted, Stopwatch

__all__ = ["Loop"]

log = logging.getLogger(__name__)

# How often losses are looked at and processes agree on going on: an accelerator waits for either.
_STEPS_BETWEEN_CHECKS = 20
# Weights twice and the optimiser's state, and once more while a file takes the place of another.
_COPIES_ON_DISK = 8


@dataclass
class Loop:
    """One call of `train`: `begin`, `run`, `end`.

    Attributes:
        recipe, folder, images, transform, learner, computation, accelerator: what it works with.
        identity: what an earlier call must have had the same, by key.
        record: what the folder's record says beside status and figures.
        progress: of the decoding of images, and of the steps.
        plan: the steps.
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
        self.watch = Stopwatch()
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
        for step in track(Counted(self.plan.steps(self.step), left), self.progress, "training"):
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

    def _open(self, source: ImageSource, augmentation: Augmentation) -> Images:
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
        self.watch = Stopwatch()
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
            self.watch = Stopwatch(float(record["seconds"]))
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
