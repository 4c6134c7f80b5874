"""What a method is: parameters, a fit on a `World`, and a scorer of `Outputs`; higher scores are more OOD.

A method is an immutable description. `fit` gives a function and keeps nothing, so that one method can be fitted on many
worlds at once, and never sees what it is to score.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn

from torch_grood._optional import require
from torch_grood.errors import GroodError
from torch_grood.evaluation.methods.parameters import Kind
from torch_grood.evaluation.outputs import Outputs, World

__all__ = ["Method", "MethodUnavailableError", "Scorer"]

Scorer = Callable[[Outputs], Tensor]

# Numbers that an intermediate result of a scorer may have: 64 MiB in float32.
_BUDGET = 2**24
# Rows that are looked at in one go where a whole training set's copy would be large.
_ROWS = 65536


class MethodUnavailableError(GroodError):
    """The classifier or the data lack what a method needs; the message says what."""


@dataclass(frozen=True)
class Method(ABC):
    """A post-hoc method with its parameters, which are the fields of the subclass.

    Attributes:
        name: on the command line.
        title: in tables.
        reference: the publication.
        grid: values to choose each parameter from.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    _needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            kind: Kind = item.metadata["kind"]
            try:
                value = kind.checked(getattr(self, item.name))
            except ValueError:
                raise GroodError(
                    f"{self.name}: {item.name} is {kind.meaning}; got {getattr(self, item.name)!r}"
                ) from None
            object.__setattr__(self, item.name, value)

    @property
    def needs(self) -> frozenset[str]:
        """What is needed beside training features and logits: "labels", "head", "images", "outliers", "ood"."""
        return self._needs

    @property
    def label(self) -> str:
        """Title, with the parameters that are not at their default."""
        shown = [
            f"{item.name} = {value:g}" if isinstance(value, float) else f"{item.name} = {value}"
            for item in dataclasses.fields(self)
            if (value := getattr(self, item.name)) != item.default
        ]
        return f"{self.title} ({', '.join(shown)})" if shown else self.title

    def config(self) -> dict[str, Any]:
        """Name and parameters, JSON-able; `METHODS[name](**parameters)` makes the method again."""
        return {"name": self.name} | {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    def replace(self, **parameters: Any) -> Self:
        """The same method with other parameters.

        Raises:
            GroodError: for a parameter that it does not have, or a value that is out of range.
        """
        for key in parameters:
            self._check_key(key)
        return dataclasses.replace(self, **parameters)

    def fit(self, world: World) -> Scorer:
        """Fit once, to score any number of sets.

        Args:
            world: all that the method may know.

        Returns:
            A function from outputs of n images to float64 scores (n,) on the CPU, which may be infinite, not NaN.
            It raises GroodError for outputs that are empty, not finite or of other widths than the training outputs.

        Raises:
            MethodUnavailableError: if the world lacks what the method needs.
            GroodError: if the training outputs are empty or not finite.
        """
        _check(world.train, f"{self.title}: the training set")
        with torch.no_grad(), self._explained():
            score = self._fit(world)
        widths = _widths(world.train)

        def checked(outputs: Outputs) -> Tensor:
            _check(outputs, f"{self.title}: the set to be scored")
            if _widths(outputs) != widths:
                raise GroodError(
                    f"{self.title} was fitted on {widths[0]} features and {widths[1]} logits a sample, got "
                    f"{_widths(outputs)[0]} and {_widths(outputs)[1]}; use the same classifier for both"
                )
            with torch.no_grad():
                scores = score(outputs).detach().to("cpu", torch.float64)
            if scores.shape != (len(outputs),):
                raise GroodError(f"{self.title} gave scores {tuple(scores.shape)} for {len(outputs)} samples")
            missing = scores.isnan().nonzero().flatten()
            if len(missing):
                raise GroodError(
                    f"{self.label} gives NaN for {len(missing)} of {len(scores)} samples, the first at index "
                    f"{int(missing[0])}: it is not defined for such features. Use another method, or other parameters"
                )
            return scores

        return checked

    @abstractmethod
    def _fit(self, world: World) -> Scorer:
        """As `fit`, which checks what goes in and comes out; in float32, as pytorch-ood and OpenOOD compute."""

    @classmethod
    def _check_key(cls, key: str) -> None:
        defaults = {item.name: item.default for item in dataclasses.fields(cls)}
        if key not in defaults:
            known = ", ".join(f"{name} (default {value})" for name, value in defaults.items())
            raise GroodError(f"{cls.name} has no parameter {key!r}; it has {known or 'none'}")

    def _unavailable(self, reason: str) -> NoReturn:
        raise MethodUnavailableError(f"{self.title} {reason}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What pytorch-ood raises in a fit is for want of suitable data, as far as it was not foreseen."""
        try:
            yield
        except GroodError:
            raise
        except (ValueError, AssertionError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            text = " ".join(str(error).split()) or type(error).__name__
            raise MethodUnavailableError(f"{self.title} cannot be fitted on these features: {text}") from error

    def _head(self, world: World) -> nn.Linear:
        """The last layer, in float32, as a module of its own."""
        if world.head is None:
            self._unavailable("needs the last layer, and this classifier's is not one linear layer on the features")
        weight, bias = (part.detach().to("cpu", torch.float32) for part in world.head)
        d, n_classes = _widths(world.train)
        if weight.shape != (n_classes, d) or bias.shape != (n_classes,):
            raise GroodError(
                f"expected a last layer with weight ({n_classes}, {d}) and bias ({n_classes},), got "
                f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        # On the meta device, for the random initialisation would draw from the global generator.
        head = nn.Linear(d, n_classes, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        head.bias = nn.Parameter(bias, requires_grad=False)
        return head

    def _labels(self, world: World) -> Tensor:
        """Of the training samples, int64 (n,); each class occurs."""
        labels = world.train.labels
        if labels is None:
            self._unavailable("needs the labels of the training samples")
        n_classes = world.n_classes
        labels = labels.detach().cpu().long()
        if int(labels.min()) < 0 or int(labels.max()) >= n_classes:
            raise GroodError(
                f"the training labels must be 0 to {n_classes - 1}, a class for each logit; got "
                f"{int(labels.min())} to {int(labels.max())}"
            )
        self._need_each_class(labels, n_classes, "has no training sample")
        return labels

    def _need_each_class(self, classes: Tensor, n_classes: int, otherwise: str) -> None:
        missing = (torch.bincount(classes, minlength=n_classes) == 0).nonzero().flatten()
        if len(missing):
            more = f", nor have {len(missing) - 1} others" if len(missing) > 1 else ""
            self._unavailable(f"cannot be used: class {int(missing[0])} {otherwise}{more}")


def detectors() -> Any:
    """pytorch-ood's."""
    return require("pytorch_ood.detector", extra="bench")


def features_of(outputs: Outputs) -> Tensor:
    """(n, d), float32 on the CPU, without a copy if they are so already."""
    return outputs.features.detach().to("cpu", torch.float32)


def logits_of(outputs: Outputs) -> Tensor:
    """(n, C), float32 on the CPU, without a copy if they are so already."""
    return outputs.logits.detach().to("cpu", torch.float32)


def all_known(features: Tensor) -> Tensor:
    """Labels for pytorch-ood, which leaves out what is labelled negative: all rows here are ID by contract."""
    return torch.zeros(len(features), dtype=torch.int64)


def held_out(world: World) -> Outputs:
    """The ID validation outputs, on which OpenOOD fits some methods; the training outputs if there are none."""
    if world.val is None or len(world.val) == 0:
        return world.train
    _check(world.val, "the validation set")
    if _widths(world.val) != _widths(world.train):
        raise GroodError(
            f"the validation set has {_widths(world.val)} features and logits a sample, the training set "
            f"{_widths(world.train)}; use the same classifier for both"
        )
    return world.val


def by_rows(score: Callable[[Tensor], Tensor], numbers_a_row: int) -> Callable[[Tensor], Tensor]:
    """The same function, on so many rows at a time that intermediate results stay small.

    Args:
        score: from (b, ...) to (b,), row by row.
        numbers_a_row: that its largest intermediate result has for each row.
    """
    rows = max(1, _BUDGET // max(numbers_a_row, 1))

    def parted(tensor: Tensor) -> Tensor:
        return torch.cat([score(part) for part in torch.split(tensor, rows)])

    return parted


def _widths(outputs: Outputs) -> tuple[int, int]:
    return outputs.features.shape[1], outputs.logits.shape[1]


def _check(outputs: Outputs, what: str) -> None:
    if len(outputs) == 0:
        raise GroodError(f"{what} has no samples; at least one is needed. Check the data set's path or list.")
    for name, tensor in (("features", outputs.features), ("logits", outputs.logits)):
        for start in range(0, len(tensor), _ROWS):
            part = tensor[start : start + _ROWS]
            # One sum tells, without a copy, that all is well; if it does not, each number is looked at.
            if bool(part.sum(dtype=torch.float64).isfinite()):
                continue
            bad = (~part.isfinite()).any(dim=1).nonzero().flatten()
            if len(bad):
                raise GroodError(
                    f"{what} has {name} that are not finite, the first at index {start + int(bad[0])}; check its "
                    "image and the model"
                )
