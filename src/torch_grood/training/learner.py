"""The network and its optimiser: one step, one evaluation, and their state.

The gradient of a batch is that of the mean cross entropy over all its images, on however many processes and in however
many parts they are run.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_grood.data.transforms import ImageTransform
from torch_grood.errors import GroodError
from torch_grood.training.computation import Computation
from torch_grood.training.plan import Step
from torch_grood.training.recipe import Recipe

__all__ = ["Learner", "Means"]


class Means(NamedTuple):
    """Over some images.

    Attributes:
        loss: mean cross entropy.
        accuracy: share of them whose class has the highest logit.
        n_images: how many.
    """

    loss: float
    accuracy: float
    n_images: int


class Learner:
    """Teaches a network, by a recipe's optimiser.

    Args:
        model: the network; it is moved, and taught in place.
        n_classes: outputs that it must have.
        transform: gives the normalisation of pixels.
        recipe: optimiser and loss.
        computation: how.
        accelerator: from `Computation.accelerator`.
    """

    def __init__(
        self,
        model: nn.Module,
        n_classes: int,
        transform: ImageTransform,
        recipe: Recipe,
        computation: Computation,
        accelerator: Any,
    ) -> None:
        self._n_classes = n_classes
        self.model = model.train()
        if computation.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self._transform, self._recipe, self._computation = transform, recipe, computation
        self._accelerator = accelerator
        optimizer = _optimizer(recipe, self.model)
        # Two sizes of batch, the last of an epoch being short: better compiled twice than for any size.
        network = torch.compile(self.model, dynamic=False) if computation.compile else self.model
        self._network, self._optimizer = accelerator.prepare(network, optimizer)
        # The same network, which exchanges nothing with other processes when it runs.
        self._alone = accelerator.unwrap_model(self._network, keep_torch_compile=True)
        self._sums = self._zeros()

    def step(self, step: Step, rate: float, pixels: Tensor, labels: Tensor) -> None:
        """Take one step.

        Args:
            step: which.
            rate: the learning rate.
            pixels: of this process' images, (b, 3, H, W) uint8.
            labels: of them, int64 (b,).
        """
        accelerator = self._accelerator
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # For dropout and its like: a seed for each step and process.
        seed = np.random.SeedSequence([self._recipe.seed, step.number, accelerator.process_index]).generate_state(1)
        torch.manual_seed(int(seed[0]))
        inputs, targets = self._inputs(pixels), labels.to(accelerator.device, non_blocking=True)
        parts = self._parts(inputs, targets)
        self._optimizer.zero_grad()
        for number, (some, classes) in enumerate(parts, start=1):
            # Processes exchange gradients once, with the last part.
            waits = accelerator.no_sync(self._network) if number < len(parts) else contextlib.nullcontext()
            with waits:
                logits = self._logits(self._network, some)
                smoothing = self._recipe.label_smoothing
                loss = functional.cross_entropy(logits, classes, reduction="sum", label_smoothing=smoothing)
                # Processes' gradients are averaged, so that their number cancels.
                accelerator.backward(loss * (accelerator.num_processes / step.n_images))
            self._count(self._sums, logits, classes, loss)
        self._optimizer.step()

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Means:
        """Mean loss and accuracy, in eval mode, over (pixels, labels) of all processes together.

        Processes may have different numbers of batches: they exchange the buffers before, and the sums after them.
        """
        sums = self._zeros()
        self._share_buffers()
        self._network.eval()
        try:
            with torch.no_grad():
                for pixels, labels in batches:
                    for some, classes in self._parts(self._inputs(pixels), labels.to(self._accelerator.device)):
                        logits = self._logits(self._alone, some)
                        self._count(sums, logits, classes, functional.cross_entropy(logits, classes, reduction="sum"))
        finally:
            self._network.train()
        return self._means(sums)

    def loss_is_finite(self) -> bool:
        """Whether all losses of all processes since `take_means` were; an accelerator finishes its work first."""
        return math.isfinite(self._accelerator.reduce(self._sums["loss"].clone()).item())

    def take_means(self) -> Means:
        """Mean loss and accuracy over the steps since the last call, of all processes together."""
        means = self._means(self._sums)
        self._sums = self._zeros()
        return means

    def sums(self) -> dict[str, Tensor]:
        """What `take_means` would divide, of all processes together; every process must call it."""
        return {name: self._accelerator.reduce(value.clone()) for name, value in self._sums.items()}

    def optimizer_state(self) -> dict[int, dict[str, Tensor]]:
        """The optimiser's tensors, by number of the parameter and name."""
        state = self._optimizer.state_dict()["state"]
        return {
            number: {name: value for name, value in own.items() if isinstance(value, Tensor)}
            for number, own in state.items()
        }

    def scaler_state(self) -> dict[str, Any] | None:
        """The gradient scaler's numbers; None without one."""
        scaler = self._accelerator.scaler
        return None if scaler is None else dict(scaler.state_dict())

    def restore(
        self,
        model: dict[str, Tensor],
        optimizer: dict[int, dict[str, Tensor]],
        scaler: dict[str, Any] | None,
        sums: dict[str, Tensor],
    ) -> None:
        """Go back to a state that the methods above told.

        Raises:
            GroodError: if it is that of another network or optimiser.
        """
        try:
            self.model.load_state_dict(model)
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
            self._arrange_optimizer_state()
            if scaler is not None and self._accelerator.scaler is not None:
                self._accelerator.scaler.load_state_dict(scaler)
            # All processes' sums are in one; the others begin at 0.
            if self._accelerator.is_main_process:
                self._sums = {name: sums[name].to(self._accelerator.device) for name in self._sums}
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise GroodError(f"the checkpoint is not one of this network: {reason}; train in a new folder") from None

    def _arrange_optimizer_state(self) -> None:
        """In the parameters' memory layout, without which fused steps are slow: files are contiguous."""
        for parameter, state in self._optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _share_buffers(self) -> None:
        """Those of the first process, which checkpoints hold: batch normalisation's differ since the last step."""
        if self._accelerator.num_processes > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _logits(self, network: Any, inputs: Tensor) -> Tensor:
        """Of what a network returns in training: `.logits`, a tuple's first (others are auxiliary), or all."""
        output = network(inputs)
        output = getattr(output, "logits", output)
        logits = output[0] if isinstance(output, tuple) else output
        if not isinstance(logits, Tensor) or logits.shape != (len(inputs), self._n_classes):
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise GroodError(
                f"expected logits of shape {(len(inputs), self._n_classes)}, an output for each class, and the network "
                f"{self._recipe.model} gave {given}; mend its number of classes, or wrap it"
            )
        # Losses and their sums in full precision.
        return logits.float()

    def _inputs(self, pixels: Tensor) -> Tensor:
        inputs = self._transform.normalise(pixels.to(self._accelerator.device, non_blocking=True))
        layout = torch.channels_last if self._computation.channels_last else torch.contiguous_format
        return inputs.contiguous(memory_format=layout)

    def _parts(self, inputs: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        # Of about one size: a rest of one image would have no variance to be normalised by.
        n_parts = -(-len(labels) // (self._computation.micro_batch or len(labels)))
        return list(zip(inputs.tensor_split(n_parts), labels.tensor_split(n_parts), strict=True))

    def _zeros(self) -> dict[str, Tensor]:
        device = self._accelerator.device
        counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("correct", "images")}
        return {"loss": torch.zeros((), device=device), **counts}

    def _count(self, sums: dict[str, Tensor], logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        # On the device: a number in Python would wait for it at every step.
        sums["loss"] += loss.detach()
        sums["correct"] += (logits.detach().argmax(1) == labels).sum()
        sums["images"] += len(labels)

    def _means(self, sums: dict[str, Tensor]) -> Means:
        loss, correct, images = (self._accelerator.reduce(sums[name]).item() for name in ("loss", "correct", "images"))
        return Means(loss / images, correct / images, int(images))


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay)
    nesterov = recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=nesterov)
