"""How a training is computed: device, precision, layout, processes. None of it is meant to change what comes out."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from torch_grood._optional import require
from torch_grood.errors import GroodError

__all__ = ["Computation"]

_DEVICES = ("auto", "cpu", "cuda", "mps")
_PRECISIONS = ("no", "bf16", "fp16")
# accelerate's ways to use processes that leave each of them the whole network.
_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU")


@dataclass(frozen=True)
class Computation:
    """How a training is computed.

    Attributes:
        device: "auto" takes what accelerate finds; "cpu", "cuda" or "mps".
        mixed_precision: "no", "bf16" or "fp16"; None leaves it to ``accelerate launch``.
        channels_last: keep maps in channels-last memory, in which convolutions run faster.
        compile: run the network through `torch.compile`.
        micro_batch: images that a process runs at once, where a batch does not fit; gradients are summed. Batch
            normalisation then sees so many images.
        workers: processes that read image files; None takes one a CPU.
        memory: bytes that decoded images may take.
        checkpoint_seconds: between checkpoints; one is written after each epoch in any case.

    Raises:
        GroodError: if a value is out of range.
    """

    device: str = "auto"
    mixed_precision: str | None = None
    channels_last: bool = True
    compile: bool = False
    micro_batch: int | None = None
    workers: int | None = None
    memory: int = 2 * 2**30
    checkpoint_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.device not in _DEVICES:
            raise GroodError(f"device must be one of {', '.join(_DEVICES)}, not {self.device!r:.100}")
        if self.mixed_precision not in (None, *_PRECISIONS):
            raise GroodError(
                f"mixed_precision must be one of {', '.join(_PRECISIONS)}, not {self.mixed_precision!r:.100}"
            )
        if self.micro_batch is not None and self.micro_batch < 1:
            raise GroodError(f"micro_batch must be at least 1, not {self.micro_batch}")
        if self.workers is not None and self.workers < 0:
            raise GroodError(f"workers must be 0 (read in this process) or more, not {self.workers}")
        if self.memory < 0:
            raise GroodError(f"memory must be 0 (keep no images) or more bytes, not {self.memory}")
        if not self.checkpoint_seconds > 0:
            raise GroodError(f"checkpoint_seconds must be above 0, not {self.checkpoint_seconds}")

    @contextlib.contextmanager
    def accelerator(self) -> Iterator[Any]:
        """An `accelerate.Accelerator` whose settings end with it; accelerate by itself keeps them for the process.

        Raises:
            MissingDependencyError: if accelerate is not installed.
            GroodError: if the device is not there, or cannot do this.
        """
        accelerate = require("accelerate", extra="train")
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not there.get(self.device, True):
            raise GroodError(f"PyTorch finds no {self.device} device here; use device cpu, or auto")
        with _settings_of_its_own(accelerate.state):
            try:
                accelerator = accelerate.Accelerator(cpu=self.device == "cpu", mixed_precision=self.mixed_precision)
            except ValueError as error:
                raise GroodError(f"accelerate cannot compute so here: {error}") from None
            self._check(accelerator)
            try:
                yield accelerator
            finally:
                accelerator.free_memory()

    def _check(self, accelerator: Any) -> None:
        """What the user's configuration of accelerate may say, and this does not do."""
        kind = accelerator.distributed_type.value
        if kind not in _KINDS:
            raise GroodError(f"accelerate is configured for {kind}, and training here needs one of {', '.join(_KINDS)}")
        if accelerator.gradient_accumulation_steps != 1:
            raise GroodError("accelerate is configured to accumulate gradients; use micro_batch (--micro-batch) for it")
        precision, device = accelerator.mixed_precision, accelerator.device.type
        if precision not in _PRECISIONS:
            raise GroodError(f"accelerate is configured for {precision}; expected one of {', '.join(_PRECISIONS)}")
        # accelerate takes it, and computes in float32.
        if precision == "fp16" and device == "cpu":
            raise GroodError("mixed precision fp16 needs an accelerator; on the CPU use bf16, or no")
        if self.device not in ("auto", device):
            raise GroodError(f"accelerate is configured for {device}, not for {self.device}; mend one of the two")

    def described(self, accelerator: Any) -> dict[str, Any]:
        """All that may change the last bits, as JSON-able data."""
        device = accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        return {
            "device": f"{device.type} ({name})",
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "mixed_precision": accelerator.mixed_precision,
            "channels_last": self.channels_last,
            "compile": self.compile,
            "micro_batch": self.micro_batch,
            "torch": torch.__version__,
        }


@contextlib.contextmanager
def _settings_of_its_own(state: Any) -> Iterator[None]:
    """Begin with none of accelerate's settings, and put the caller's back; a group of processes has one for good."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    shared = [kind._shared_state for kind in (state.AcceleratorState, state.GradientState, state.PartialState)]
    before = [dict(settings) for settings in shared]
    try:
        for settings in shared:
            settings.clear()
        yield
    finally:
        for settings, old in zip(shared, before, strict=True):
            settings.clear()
            settings.update(old)
