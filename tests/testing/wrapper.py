"""A sound detector around GROOD, with its own threshold, that gives each defect one place to go wrong in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from torch_grood import GROOD


class Decision(NamedTuple):
    score: Tensor
    p_value: Tensor
    is_ood: Tensor


class Wrapper:
    """For images and features; a defect overrides one of the methods with an underscore."""

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self._grood = GROOD(model)
        self._held_out: Tensor | None = None
        self._fpr = 0.0

    def fit(self, loader: Any) -> Self:
        return self._fit(self._grood.fit, loader)

    def fit_features(self, features: Tensor, labels: Tensor) -> Self:
        return self._fit(self._grood.fit_features, features, labels)

    def calibrate(self, loader: Any, fpr: float = 0.05) -> Self:
        return self._calibrate(lambda: self.score(loader), fpr)

    def calibrate_features(self, features: Tensor, fpr: float = 0.05) -> Self:
        return self._calibrate(lambda: self.score_features(features), fpr)

    def score(self, images: Any) -> Tensor:
        return self._score(self._grood.score, images)

    def score_features(self, features: Tensor) -> Tensor:
        return self._score(self._grood.score_features, features)

    def predict(self, images: Tensor) -> Any:
        return self._predict(self.score(images))

    def predict_features(self, features: Tensor) -> Any:
        return self._predict(self.score_features(features))

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        fit(*arguments)
        self._held_out = None
        return self

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return score(inputs)

    def _calibrate(self, score: Callable[[], Tensor], fpr: float) -> Self:
        if not 0 < fpr < 1:
            raise ValueError(f"fpr must lie between 0 and 1, got {fpr}")
        held_out = score()
        if len(held_out) == 0:
            raise ValueError("there is no calibration sample")
        self._held_out, self._fpr = held_out, fpr
        return self

    def _predict(self, score: Tensor) -> Any:
        if self._held_out is None:
            raise RuntimeError("not calibrated; call calibrate first")
        p_value = (1 + (self._held_out >= score[:, None]).sum(1)).double() / (len(self._held_out) + 1)
        return Decision(score, p_value, p_value <= self._fpr)

    def save(self, path: Path) -> None:
        held_out = None if self._held_out is None else self._held_out.tolist()
        self._grood.metadata = {"held_out": held_out, "fpr": self._fpr}
        self._grood.save(path)

    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        detector = cls(model)
        detector._grood = GROOD.load(path, model)
        stored = detector._grood.metadata
        detector._fpr = stored["fpr"]
        if stored["held_out"] is not None:
            detector._held_out = torch.tensor(stored["held_out"], dtype=torch.float64)
        return detector


class Reloaded(GROOD):
    """GROOD that goes through a file after every fit and every calibration, as one does that was loaded."""

    folder: Path

    def fit(self, *arguments: Any, **options: Any) -> Self:
        return self._reloaded(super().fit(*arguments, **options))

    def fit_features(self, *arguments: Any, **options: Any) -> Self:
        return self._reloaded(super().fit_features(*arguments, **options))

    def calibrate(self, *arguments: Any, **options: Any) -> Self:
        return self._reloaded(super().calibrate(*arguments, **options))

    def calibrate_features(self, *arguments: Any, **options: Any) -> Self:
        return self._reloaded(super().calibrate_features(*arguments, **options))

    def _reloaded(self, detector: Any) -> Self:
        path = self.folder / f"{id(self)}.grood"
        detector.save(path)
        # All that it learned, and no more: the arguments stay those of the constructor.
        arguments = {name: vars(self)[name] for name in inspect.signature(GROOD).parameters}
        vars(self).update(vars(GROOD.load(path, self.model)) | arguments)
        path.unlink()
        return self
