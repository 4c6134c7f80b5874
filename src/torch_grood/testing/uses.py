"""The two uses of a detector, on images with a classifier and on features, behind one face.

A clause is written once and says `use.fit(detector, use.train)`; here it becomes `detector.fit(loader)` or
`detector.fit_features(features, labels)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torch_grood.testing import world

__all__ = ["DECISION", "FPR", "FeatureUse", "ImageUse", "Make", "Samples", "Use", "use_named"]

Make = Callable[[nn.Module | None], Any]

FPR = 0.1
BATCH = 16
# The fields of a prediction that the contract speaks of.
DECISION = ("score", "p_value", "is_ood")


class Samples(NamedTuple):
    """Inputs (n, ...) and labels (n,)."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Use(ABC):
    """One way to use the detectors that `make` gives.

    Attributes:
        make: given a classifier or None, returns a new detector that is not fitted.
        scale: of the features, a power of two.
        dtype: of inputs and classifier.
        device: of inputs and classifier.
    """

    make: Make
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    name = ""
    _ending = ""

    @abstractmethod
    def draw(self, n: int, seed: int, known: bool = True) -> Samples:
        """Samples that are independent of those of any other seed."""

    @abstractmethod
    def arguments(self, samples: Samples) -> tuple[Any, ...]:
        """The arguments of `fit`."""

    @abstractmethod
    def failing_arguments(self) -> tuple[Any, ...]:
        """Arguments of a `fit` that fails when part of the work is done."""

    @abstractmethod
    def held_out_argument(self, samples: Samples) -> Any:
        """The first argument of `calibrate`."""

    @property
    @abstractmethod
    def model(self) -> nn.Module | None:
        """The classifier that the detectors are made with."""

    @cached_property
    def train(self) -> Samples:
        """To fit on."""
        return self.draw(90, seed=0)

    @cached_property
    def other_train(self) -> Samples:
        """To fit on another time."""
        return self.draw(81, seed=1)

    @cached_property
    def held_out(self) -> Samples:
        """To calibrate on."""
        return self.draw(40, seed=2)

    @cached_property
    def other_held_out(self) -> Samples:
        """To calibrate on another time."""
        return self.draw(31, seed=3)

    @cached_property
    def known(self) -> Tensor:
        """In-distribution inputs that no fit and no calibration has seen."""
        return self.draw(40, seed=4).inputs

    @cached_property
    def unknown(self) -> Tensor:
        """Inputs that are obviously out of distribution."""
        return self.draw(24, seed=5, known=False).inputs

    @cached_property
    def queries(self) -> Tensor:
        """Known and unknown inputs together."""
        return torch.cat([self.known, self.unknown])

    def new(self) -> Any:
        """A detector that is not fitted."""
        return self.make(self.model)

    def method_name(self, method: str) -> str:
        """The name of fit, calibrate, score or predict in this use; save and load have but one."""
        return method if method in ("save", "load") else method + self._ending

    def has(self, detector: Any, method: str) -> bool:
        """Does the detector have the method for this use?"""
        return callable(getattr(detector, self.method_name(method), None))

    def _call(self, detector: Any, method: str, *arguments: Any, **options: Any) -> Any:
        return getattr(detector, self.method_name(method))(*arguments, **options)

    def fit(self, detector: Any, samples: Samples) -> Any:
        """Fit, and return what the detector returns."""
        return self._call(detector, "fit", *self.arguments(samples))

    def fit_raw(self, detector: Any, *arguments: Any) -> Any:
        """Fit on arguments that are wrong on purpose."""
        return self._call(detector, "fit", *arguments)

    def calibrate(self, detector: Any, samples: Samples, fpr: float = FPR) -> Any:
        """Calibrate, and return what the detector returns."""
        return self._call(detector, "calibrate", self.held_out_argument(samples), fpr=fpr)

    def calibrate_raw(self, detector: Any, held_out: Any, fpr: float = FPR) -> Any:
        """Calibrate on an argument that is the caller's own, or wrong on purpose."""
        return self._call(detector, "calibrate", held_out, fpr=fpr)

    def score(self, detector: Any, inputs: Tensor) -> Tensor:
        """Scores, if they are a tensor at all."""
        found = self._call(detector, "score", inputs)
        if not isinstance(found, Tensor):
            raise TypeError(f"{self.method_name('score')} returned {type(found).__name__}; a tensor is required")
        return found

    def predict(self, detector: Any, inputs: Tensor) -> dict[str, Tensor]:
        """The decision, and the score and p-value where the prediction has them."""
        found = self._call(detector, "predict", inputs)
        fields = {name: getattr(found, name) for name in DECISION if isinstance(getattr(found, name, None), Tensor)}
        if "is_ood" not in fields:
            raise TypeError(
                f"{self.method_name('predict')} returned {type(found).__name__} without a tensor `is_ood`; return an "
                "object with is_ood, and if you have them score and p_value"
            )
        return fields

    def load(self, detector: Any, path: Path) -> Any:
        """Another detector of the same class, from a file."""
        return type(detector).load(path, self.model)

    def decides(self, detector: Any) -> bool:
        """Can it be calibrated and predict?"""
        return self.has(detector, "calibrate") and self.has(detector, "predict")

    def fitted(self) -> Any:
        """A new detector, fitted."""
        detector = self.new()
        self.fit(detector, self.train)
        return detector

    def ready(self) -> Any:
        """A new detector, fitted, and calibrated if it can be."""
        detector = self.fitted()
        if self.decides(detector):
            self.calibrate(detector, self.held_out)
        return detector

    def outcome(self, detector: Any, inputs: Tensor | None = None, decide: bool = True) -> dict[str, Tensor]:
        """What the detector says of the inputs: its scores and, if it decides, its predictions."""
        inputs = self.queries if inputs is None else inputs
        found = {"the score": self.score(detector, inputs)}
        if decide and self.decides(detector):
            found |= {f"the prediction's {name}": value for name, value in self.predict(detector, inputs).items()}
        return found


class FeatureUse(Use):
    """`fit_features(features, labels)`, `calibrate_features(features, fpr=…)`, and so on; no classifier."""

    name = "features"
    _ending = "_features"

    @property
    def model(self) -> None:
        """There is none."""
        return None

    def draw(self, n: int, seed: int, known: bool = True) -> Samples:
        inputs, labels = world.features(n, seed, known)
        return Samples((inputs * self.scale).to(self.device, self.dtype), labels)

    def arguments(self, samples: Samples) -> tuple[Any, ...]:
        return samples.inputs, samples.labels

    def failing_arguments(self) -> tuple[Any, ...]:
        inputs = self.other_train.inputs.clone()
        inputs[-1, 0] = torch.nan
        return inputs, self.other_train.labels

    def held_out_argument(self, samples: Samples) -> Any:
        return samples.inputs


class ImageUse(Use):
    """`fit(loader)`, `calibrate(loader, fpr=…)`, `score(images)`, `predict(images)`, with a classifier."""

    name = "images"

    @cached_property
    def model(self) -> world.Classifier:
        """The classifier of this use, in eval mode."""
        return world.classifier(self.scale).to(self.device, self.dtype)

    def draw(self, n: int, seed: int, known: bool = True) -> Samples:
        inputs, labels = world.images(n, seed, known)
        return Samples(inputs.to(self.device, self.dtype), labels)

    def arguments(self, samples: Samples) -> tuple[Any, ...]:
        return (self.held_out_argument(samples),)

    def failing_arguments(self) -> tuple[Any, ...]:
        def loader() -> Iterator[Any]:
            yield from self.held_out_argument(self.other_train)
            raise RuntimeError("the disk with the training images has gone")

        return (loader(),)

    def held_out_argument(self, samples: Samples) -> Any:
        n = len(samples.inputs)
        return [tuple(part[i : i + BATCH] for part in samples) for i in range(0, n, BATCH)]


def use_named(name: str) -> type[Use]:
    """The class of a use.

    Raises:
        KeyError: for a name that is none.
    """
    return {kind.name: kind for kind in (FeatureUse, ImageUse)}[name]
