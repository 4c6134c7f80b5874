"""The detectors that GROOD is held against: pytorch-ood's, on features and logits that are already extracted.

    MSP     −max softmax(z)                    Hendrycks and Gimpel, ICLR 2017
    MLS     −max z                             Hendrycks et al., ICML 2022
    energy  −log Σ exp(z)                      Liu et al., NeurIPS 2020
    KNN     ‖h/‖h‖ − its 50th neighbour‖₂      Sun et al., ICML 2022

One forward pass over the images (`GROOD.extract`) serves GROOD and every baseline. To add one, write a function that
takes the training outputs and returns a scorer, and enter it in `BASELINES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from torch_grood._optional import require
from torch_grood.errors import GroodError

__all__ = ["BASELINES", "Outputs", "Scorer", "baseline_scores", "fit_baseline"]

KNN_NEIGHBORS = 50  # the paper's and OpenOOD's choice for CIFAR-10


class Outputs(Protocol):
    """What a classifier computes for n images; `GROOD.extract` returns such an object."""

    @property
    def features(self) -> Tensor:
        """(n, d) penultimate features."""

    @property
    def logits(self) -> Tensor:
        """(n, C) logits."""

    @property
    def labels(self) -> Tensor | None:
        """(n,) int64 class labels, or None where they are not known."""


Scorer = Callable[[Outputs], Tensor]


def fit_baseline(name: str, train: Outputs) -> Scorer:
    """Fit a baseline once, to score any number of sets.

    Args:
        name: a key of `BASELINES`.
        train: features (n, d) and logits (n, C) of the ID training samples.

    Returns:
        A function from outputs (m, d), (m, C) to float64 scores (m,) on the CPU, higher = more OOD.

    Raises:
        GroodError: if there is no such baseline, or the training outputs are malformed, not finite or too few.
            The scorer raises it for malformed outputs, too.
    """
    if name not in BASELINES:
        raise GroodError(f"there is no baseline {name!r}; there are: {', '.join(BASELINES)}")
    _check(train, "training")
    scorer = BASELINES[name](train)
    n_features, n_classes = train.features.shape[1], train.logits.shape[1]

    def checked(outputs: Outputs) -> Tensor:
        _check(outputs, "scored")
        got = outputs.features.shape[1], outputs.logits.shape[1]
        if got != (n_features, n_classes):
            raise GroodError(
                f"{name} was fitted on {n_features} features and {n_classes} logits a sample, got {got[0]} and "
                f"{got[1]}; extract both sets with the same model"
            )
        return scorer(outputs).detach().to("cpu", torch.float64)

    return checked


def baseline_scores(name: str, train: Outputs, outputs: Outputs) -> Tensor:
    """Fit the baseline `name` on `train` and score `outputs`; see `fit_baseline`, which fits once for many sets."""
    return fit_baseline(name, train)(outputs)


def _msp(train: Outputs) -> Scorer:
    detector = require("pytorch_ood.detector", extra="bench").MaxSoftmax(None)
    # In float32 every softmax above 1 − 6e-8 rounds to 1, and the surest predictions all tie.
    return lambda outputs: detector.predict_logits(outputs.logits.double())


def _mls(train: Outputs) -> Scorer:
    detector = require("pytorch_ood.detector", extra="bench").MaxLogit(None)
    return lambda outputs: detector.predict_logits(outputs.logits.double())


def _energy(train: Outputs) -> Scorer:
    detector = require("pytorch_ood.detector", extra="bench").EnergyBased(None)
    return lambda outputs: detector.predict_logits(outputs.logits.double())


def _knn(train: Outputs) -> Scorer:
    n = len(train.features)
    if n < KNN_NEIGHBORS:
        raise GroodError(
            f"KNN takes the distance to the {KNN_NEIGHBORS}th nearest training sample, but there are only {n}; "
            f"give it at least {KNN_NEIGHBORS} or leave this baseline out"
        )
    detector = require("pytorch_ood.detector", extra="bench").KNN(None, k=KNN_NEIGHBORS, normalize=True)
    # pytorch-ood leaves out what is labelled negative; all rows here are ID by contract.
    detector.fit_features(train.features.detach().float().cpu(), torch.zeros(n, dtype=torch.int64))
    return lambda outputs: detector.predict_features(outputs.features.detach().float().cpu())


BASELINES: dict[str, Callable[[Outputs], Scorer]] = {"MSP": _msp, "MLS": _mls, "energy": _energy, "KNN": _knn}


def _check(outputs: Outputs, what: str) -> None:
    features, logits = outputs.features, outputs.logits
    if features.ndim != 2 or logits.ndim != 2 or len(features) != len(logits):
        raise GroodError(
            f"expected features (n, d) and logits (n, C) of the {what} samples, got shapes {tuple(features.shape)} "
            f"and {tuple(logits.shape)}"
        )
    if len(features) == 0:
        raise GroodError(f"there are no {what} samples; at least one is needed. Check the data set's path or list.")
    for name, tensor in (("features", features), ("logits", logits)):
        bad = (~torch.isfinite(tensor)).any(dim=1).nonzero().flatten()
        if len(bad):
            raise GroodError(
                f"the {name} of {len(bad)} {what} samples are not finite, the first at index {int(bad[0])}; "
                f"check its image and the model"
            )
