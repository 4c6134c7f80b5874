"""ID accuracy: of the classifier's logits, and of the nearest class prototype."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_grood.errors import GroodError

__all__ = ["classifier_accuracy", "prototype_accuracy"]

_BLOCK_ROWS = 4096  # bounds the matrix of distances to the prototypes


def classifier_accuracy(logits: Tensor, labels: Tensor | None) -> float:
    """Share of samples whose largest logit is their label's; the first of equal logits counts.

    Args:
        logits: (n, C).
        labels: whole numbers (n,), 0 to C − 1.

    Raises:
        GroodError: if there are no samples or labels, shapes do not fit, a logit is NaN, or a label is no class.
    """
    labels = _checked_labels(logits, labels, classes=logits.shape[-1] if logits.ndim else 0, name="logits")
    _refuse(logits.isnan(), "logits", "NaN")
    return int((logits.argmax(1) == labels.to(logits.device)).sum()) / len(labels)


def prototype_accuracy(features: Tensor, prototypes: Tensor, labels: Tensor | None) -> float:
    """Share of samples whose nearest class prototype is their label's, in float64.

    Of prototypes that are equally near, also after rounding, the first counts.

    Args:
        features: (n, d), penultimate.
        prototypes: (C, d), in the order of the labels.
        labels: whole numbers (n,), 0 to C − 1.

    Raises:
        GroodError: if there are no samples or labels, shapes do not fit, a number is not finite, or a label no class.
    """
    if features.ndim != 2 or prototypes.ndim != 2 or features.shape[1] != prototypes.shape[1]:
        raise GroodError(
            f"expected features (n, d) and prototypes (C, d), got {tuple(features.shape)} and {tuple(prototypes.shape)}"
        )
    labels = _checked_labels(features, labels, classes=len(prototypes), name="features").to(features.device)
    _refuse(~features.isfinite(), "features", "not finite")
    points = prototypes.detach().to(features.device, torch.float64)
    # ‖h − p‖² = ‖h‖² − 2 h·p + ‖p‖²; from the centre of the prototypes little of it cancels.
    origin = points.mean(0)
    points = points - origin
    squares = points.square().sum(1)
    if not bool(squares.isfinite().all()):
        raise GroodError("a class prototype is not finite; check the features that it comes from")
    hits = 0
    for first in range(0, len(features), _BLOCK_ROWS):
        block = slice(first, first + _BLOCK_ROWS)
        h = features[block].detach().to(torch.float64) - origin
        hits += int(((squares - 2 * (h @ points.T)).argmin(1) == labels[block]).sum())
    return hits / len(labels)


def _checked_labels(samples: Tensor, labels: Tensor | None, *, classes: int, name: str) -> Tensor:
    if labels is None:
        raise GroodError("there are no labels, so there is no accuracy; pass the labels of ID samples")
    if samples.ndim != 2 or labels.shape != (len(samples),):
        raise GroodError(
            f"expected {name} with one row and one label a sample, got {name} {tuple(samples.shape)} and labels "
            f"{tuple(labels.shape)}"
        )
    if len(labels) == 0:
        raise GroodError("there are no samples, so there is no accuracy; pass at least one ID sample")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise GroodError(f"labels must be whole numbers, got {labels.dtype}; convert them to int64")
    strange = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(strange):
        row = int(strange[0])
        raise GroodError(
            f"{len(strange)} of {len(labels)} labels are none of the {classes} classes, the first at sample {row}: "
            f"{int(labels[row])}; pass ID samples, labelled 0 to {classes - 1}"
        )
    return labels


def _refuse(bad: Tensor, name: str, fault: str) -> None:
    rows = bad.any(1).nonzero().flatten()
    if len(rows):
        raise GroodError(
            f"the {name} of {len(rows)} of {len(bad)} samples are {fault}, the first at sample {int(rows[0])}; check "
            "the images and the network"
        )
