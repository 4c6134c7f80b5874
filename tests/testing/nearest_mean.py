"""A detector by others: the distance to the nearest class mean, on features; docs/contract.md shows it."""

from __future__ import annotations

import hashlib
from collections import namedtuple

import torch
from safetensors.torch import load, save

Decision = namedtuple("Decision", ["score", "p_value", "is_ood"])


class NearestMean:
    def __init__(self):
        self._learned = {}

    def fit_features(self, features, labels):
        features = self._checked(features)
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.shape != features.shape[:1]:
            raise ValueError("expected one integer label a sample")
        if len(labels) == 0 or labels.min() < 0:
            raise ValueError("expected at least one sample, and labels from 0")
        self._learned = {"means": torch.stack([features[labels == c].mean(0) for c in labels.unique()])}
        return self

    def score_features(self, features):
        if not self._learned:
            raise RuntimeError("not fitted; call fit_features(features, labels) first")
        features = self._checked(features, self._learned["means"].shape[1])
        return torch.stack([(features - mean).norm(dim=1) for mean in self._learned["means"]]).amin(0)

    def calibrate_features(self, features, fpr=0.05):
        held_out = self.score_features(features)
        if not 0 < fpr < 1 or fpr * (len(held_out) + 1) < 1:
            raise ValueError(f"fpr={fpr} must lie between 1/(n + 1) and 1, for n = {len(held_out)} held-out samples")
        self._learned = {**self._learned, "held_out": held_out, "fpr": torch.tensor(fpr, dtype=torch.float64)}
        return self

    def predict_features(self, features):
        score = self.score_features(features)
        if "held_out" not in self._learned:
            raise RuntimeError("not calibrated; call calibrate_features(held_out) first")
        held_out = self._learned["held_out"]
        p_value = (1 + (held_out >= score[:, None]).sum(1)).double() / (len(held_out) + 1)
        return Decision(score, p_value, p_value <= self._learned["fpr"])

    def save(self, path):
        content = save(self._learned)
        path.write_bytes(hashlib.sha256(content).digest() + content)

    @classmethod
    def load(cls, path, model=None):
        detector = cls()
        detector._learned = cls._parsed(path.read_bytes())
        return detector

    @staticmethod
    def _parsed(content):
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            raise ValueError("the file is damaged")
        return load(content[32:])

    @staticmethod
    def _checked(features, d=None):
        if features.ndim != 2 or (d is not None and features.shape[1] != d):
            raise ValueError(f"expected features (n, {d or 'd'}), got {tuple(features.shape)}")
        if not features.isfinite().all():
            raise ValueError("a feature is NaN or infinite")
        # Float64, contiguous and on the CPU: the same arithmetic, whatever came in.
        return features.detach().cpu().double().contiguous()
