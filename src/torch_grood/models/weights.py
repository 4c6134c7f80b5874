"""Weights: read from a file as mere data, and put into a network that they fit."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from torch_grood.errors import GroodError
from torch_grood.models.spec import described, one_line

__all__ = ["classes_in", "head_note", "load_exactly", "read_weights", "start_from"]

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
# Checkpoints older than PyTorch 0.4.1 lack the counter; only training needs it.
_OPTIONAL = "num_batches_tracked"
_SAVE = "save one with torch.save(model.state_dict(), …) or safetensors"
_SHOWN = 5
_OTHER_NETWORK = "pass the weights of this very network"


def read_weights(file: Path) -> Mapping[str, Tensor]:
    """The state dict in a .safetensors file, or in one of torch.save, bare or under "state_dict" or "model".

    Raises:
        GroodError: if there is none, or reading it could run code.
    """
    if not file.is_file():
        raise GroodError(f"{file}: no such weights file")
    data = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    for key in _WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping):
        raise GroodError(f"{file} holds {described(data)}, not a state dict; {_SAVE}")
    other = [str(key) for key, value in data.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if other or not data:
        what = f"non-tensors under {', '.join(other[:_SHOWN])}" if other else "no tensors"
        raise GroodError(f"{file} is not a state dict: it has {what}; {_SAVE}")
    state = dict(data)
    # DataParallel and torch.compile wrap a network, one within the other as it happens.
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], spec: str, origin: str) -> None:
    """Load weights that fit in every tensor.

    Args:
        model: the network.
        state: its weights.
        spec: what the network is, for messages.
        origin: where the weights are from, for messages.

    Raises:
        GroodError: if they do not fit.
    """
    misfits = _Misfits.of(model, state)
    if misfits:
        inferred = classes_in(state, model)
        hint = (
            f"the file seems to have {inferred} classes; make the network so, with num_classes={inferred} "
            f"(--num-classes {inferred}) if its factory takes it"
            if inferred is not None and not (misfits.missing or misfits.unexpected)
            else _OTHER_NETWORK
        )
        raise GroodError(f"{origin} does not fit {spec}: {misfits}; {hint}")
    _load(model, state)


def start_from(
    model: nn.Module, state: Mapping[str, Tensor], num_classes: int, spec: str, origin: str
) -> tuple[str, ...]:
    """Load weights, but for a head of another number of classes, which stays as it is.

    Args:
        model: a network of `num_classes` outputs.
        state: weights of a network of as many outputs, or another number.
        num_classes: outputs.
        spec: what the network is, for messages.
        origin: where the weights are from, for messages.

    Returns:
        What the user should hear of.

    Raises:
        GroodError: if they do not fit for another reason than the number of classes.
    """
    misfits = _Misfits.of(model, state)
    theirs = classes_in(state, model)
    ours = model.state_dict()
    if misfits and (
        theirs is None
        or misfits.missing
        or misfits.unexpected
        or any(len(ours[name]) != num_classes for name in misfits.changed)
    ):
        raise GroodError(f"{origin} does not fit {spec}: {misfits}; {_OTHER_NETWORK}")
    _load(model, {name: tensor for name, tensor in state.items() if name not in misfits.changed})
    return () if theirs is None else (head_note(list(misfits.changed), theirs, num_classes),)


def head_note(tensors: Sequence[str], theirs: int, ours: int) -> str:
    """What to say of a head whose weights could not be kept."""
    have = f"the weights have {theirs:,} classes, these images {ours:,}" if theirs else "the weights have none"
    return f"the head ({_listing(tensors)}) starts anew: {have}"


def classes_in(state: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """The number of classes in the weights, if it is all that differs: one change of the first dimension."""
    changes = set()
    for name, tensor in model.state_dict().items():
        if name in state and tensor.shape != state[name].shape:
            if not tensor.ndim or tensor.shape[1:] != state[name].shape[1:] or not state[name].ndim:
                return None
            changes.add((len(tensor), len(state[name])))
    if len(changes) != 1:
        return None
    ((_, theirs),) = changes
    return theirs


@dataclass(frozen=True)
class _Misfits:
    """Tensors that keep weights from fitting: those they lack or have too many, and shapes, theirs and ours."""

    missing: list[str]
    unexpected: list[str]
    changed: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, model: nn.Module, state: Mapping[str, Tensor]) -> Self:
        ours = model.state_dict()
        return cls(
            [name for name in ours if name not in state and not name.endswith(_OPTIONAL)],
            [name for name in state if name not in ours],
            {
                name: (tuple(state[name].shape), tuple(tensor.shape))
                for name, tensor in ours.items()
                if name in state and tensor.shape != state[name].shape
            },
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.changed)

    def __str__(self) -> str:
        shapes = [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in self.changed.items()]
        problems = [
            f"{len(names)} {what} ({_listing(names)})"
            for names, what in (
                (self.missing, "missing"),
                (self.unexpected, "unexpected"),
                (shapes, "of another shape"),
            )
            if names
        ]
        return f"tensors {'; '.join(problems)}"


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    known = OrderedDict(state)
    # The versions of modules, without which MNASNet refuses: names and shapes are those of today, and so are these.
    known._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    model.load_state_dict(known, strict=False)


def _listing(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"


def _read_safetensors(file: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:
        raise GroodError(
            f"{file} cannot be read as safetensors ({one_line(error)}); it may be truncated, copy it again"
        ) from None


def _read_torch(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        message = str(error)
        if "TorchScript" in message:
            raise GroodError(f"{file} is a TorchScript archive, not a state dict; {_SAVE}") from None
        # torch's own words for an instruction that would run code.
        if any(word in message for word in ("GLOBAL", "call reduce", "instantiate")):
            raise GroodError(
                f"{file} contains pickled objects, which could run code, so it is not read; {_SAVE}"
            ) from None
        raise GroodError(
            f"{file} cannot be read as PyTorch weights ({type(error).__name__}); it may be truncated, "
            f"or no weights file; {_SAVE}"
        ) from None
