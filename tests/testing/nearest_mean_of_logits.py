"""A detector by others, for images: the distance of a classifier's logits to the nearest class mean."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from nearest_mean import NearestMean
from torch import Tensor, nn


class NearestMeanOfLogits(NearestMean):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._lock = threading.Lock()

    def fit(self, loader: Any) -> Self:
        logits, labels = zip(*((self._logits(images), labels) for images, labels in loader), strict=True)
        if max(int(part.max()) for part in labels if len(part)) >= logits[0].shape[1]:
            raise ValueError("a label is none of the classifier's outputs")
        return self.fit_features(torch.cat(logits), torch.cat(labels))

    def score(self, images: Tensor) -> Tensor:
        return self.score_features(self._logits(images))

    def calibrate(self, loader: Any, fpr: float = 0.05) -> Self:
        return self.calibrate_features(torch.cat([self._logits(images) for images, _ in loader]), fpr)

    def predict(self, images: Tensor) -> Any:
        return self.predict_features(self._logits(images))

    def save(self, path: Path) -> None:
        super().save(path)
        path.write_bytes(self._fingerprint() + path.read_bytes())

    @classmethod
    def load(cls, path: Path, model: nn.Module) -> Self:
        detector = cls(model)
        whole = path.read_bytes()
        if whole[:32] != detector._fingerprint():
            raise ValueError(f"{path} is damaged, or was fitted on another model")
        detector._learned = cls._parsed(whole[32:])
        return detector

    def _logits(self, images: Tensor) -> Tensor:
        with self._evaluation(), torch.no_grad():
            return self.model(images)

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        with self._lock:
            modes = {module: module.training for module in self.model.modules()}
            try:
                self.model.eval()
                yield
            finally:
                for module, mode in modes.items():
                    module.training = mode

    def _fingerprint(self) -> bytes:
        state = self.model.state_dict().values()
        return hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in state)).digest()
