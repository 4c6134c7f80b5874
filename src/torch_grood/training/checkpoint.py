"""The state of a training between two steps, in one safetensors file: nothing in it can run code.

Order, augmentation, learning rate and dropout follow from the seed and the number of the step (`plan`, `augmentation`),
so that the weights, the optimiser's own tensors and the sums of the epoch so far are all that there is to keep. A
SHA-256 of all of it stands in the header: going on from an altered number would end with other weights, unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_grood._files import replacing
from torch_grood.errors import GroodError

__all__ = ["Checkpoint", "read_checkpoint", "write_checkpoint", "write_weights"]

_KEY = "torch-grood-training"
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a training goes on from.

    Attributes:
        step: steps done.
        model: the network's state dict.
        optimizer: tensors of torch's optimiser state, by number of the parameter and name.
        sums: of the epoch so far, by name.
        record: JSON-able: the epochs' figures, the state of a gradient scaler, and what else the run remembers.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    sums: dict[str, Tensor]
    record: dict[str, Any]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write it whole or not at all.

    Raises:
        GroodError: if it cannot be written, as on a full disk; an older one is still there then.
    """
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint.model.items()}
    tensors |= {f"sums.{name}": tensor for name, tensor in checkpoint.sums.items()}
    for number, state in checkpoint.optimizer.items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
    own = _own(tensors)
    text = json.dumps({"format": _FORMAT, "step": checkpoint.step, "record": checkpoint.record})
    _write(path, own, {_KEY: f"{_digest(text, own)} {text}"})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what `write_checkpoint` wrote.

    Raises:
        GroodError: if it cannot be read, or is of another form.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            digest, _, text = (file.metadata() or {})[_KEY].partition(" ")
            # Cloned: what is memory-mapped would change with the file, which the next checkpoint replaces.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if digest != _digest(text, tensors):
            raise ValueError("it was altered since it was written")
        header = json.loads(text)
        if header["format"] != _FORMAT:
            raise GroodError(
                f"{path} has the form {header['format']}, and this version reads {_FORMAT}; use the one that wrote it"
            )
        optimizer: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below("optimizer.", tensors).items():
            number, _, key = name.partition(".")
            optimizer.setdefault(int(number), {})[key] = tensor
        return Checkpoint(
            int(header["step"]), _below("model.", tensors), optimizer, _below("sums.", tensors), dict(header["record"])
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, GroodError):
            raise
        raise GroodError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}); to begin anew, delete "
            f"the folder {path.parent}"
        ) from None


def write_weights(path: Path, model: nn.Module) -> None:
    """Write a network's state dict as safetensors, whole or not at all.

    Raises:
        GroodError: if it cannot be written.
    """
    _write(path, _own(model.state_dict()), {"format": "pt"})


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and cloned where two names share memory, as safetensors wants it."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise GroodError(f"cannot write {path}: {error}") from error


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
