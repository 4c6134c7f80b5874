"""What `fit` learns, and the second half of Algorithm 1: from features and prototypes to an index over gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_grood.errors import GroodError
from torch_grood.features import ModelFingerprint
from torch_grood.gradients import GradientField, PolarGradients
from torch_grood.neighbors import GradientIndex, GradientSearcher
from torch_grood.outliers import OutlierSource
from torch_grood.prototypes import ClassPrototypes

__all__ = ["GRADIENT_ROWS", "FitInfo", "FittedState", "build_state"]

# Gradients are computed in float64; this many rows at a time bounds that memory.
GRADIENT_ROWS = 8192


@dataclass(frozen=True)
class FitInfo:
    """What a detector was fitted on.

    Attributes:
        n_samples: training samples used.
        n_indexed: those whose gradients are stored: the correctly classified ones.
        n_classes: classes with a prototype.
        n_features: dimension d of the penultimate feature.
        n_left_out: training samples of classes that were left out.
        classifier_accuracy: on the training samples; None without predictions.
        prototype_accuracy: of the nearest class prototype, on the training samples.
        outlier_source: name and arguments.
        uses_ood_data: real OOD data are part of the detector.
        n_outliers: outliers whose mean is p_ood.
        image_shape: shape of one training image, () in features-only use or for several sizes.
        head: module whose input is the penultimate feature.
        early_layer: module whose output was mixed.
        seconds: duration of the fit.
    """

    n_samples: int
    n_indexed: int
    n_classes: int
    n_features: int
    n_left_out: int
    classifier_accuracy: float | None
    prototype_accuracy: float
    outlier_source: dict[str, Any]
    uses_ood_data: bool
    n_outliers: int
    image_shape: tuple[int, ...] = ()
    head: str | None = None
    early_layer: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class FittedState:
    """All that `fit` learns; replaced whole by another fit.

    Attributes:
        classes: names of the classifier's classes.
        class_ids: position in `classes` of each prototype, int64 (C,).
        class_prototypes: float64 (C, d).
        ood_prototype: float64 (d,).
        index: configuration of the searcher.
        searcher: over the stored gradients.
        sample_ids: position in the training set of each stored gradient, int64 (N,).
        fingerprint: of the model, None in features-only use.
        info: see `FitInfo`.
    """

    classes: tuple[int | str, ...]
    class_ids: Tensor
    class_prototypes: Tensor
    ood_prototype: Tensor
    index: GradientIndex
    searcher: GradientSearcher
    sample_ids: Tensor
    fingerprint: ModelFingerprint | None
    info: FitInfo
    gradient_field: GradientField = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "gradient_field", GradientField(self.class_prototypes, self.ood_prototype))


def build_state(
    index: GradientIndex,
    seed: int,
    *,
    chunks: list[Tensor],
    labels: Tensor,
    predictions: Tensor | None,
    sample_ids: Tensor,
    prototypes: ClassPrototypes,
    classes: tuple[int | str, ...],
    class_ids: Tensor,
    outlier_features: Tensor,
    source: OutlierSource,
) -> FittedState:
    """From features to an index over gradients; `chunks` is emptied, so that no second copy of it lives.

    `labels` are rows of the prototypes, `predictions` positions in `classes`.
    """
    ood_prototype = outlier_features.double().mean(0).cpu()
    class_prototypes = prototypes.means.cpu()
    if not bool(ood_prototype.isfinite().all()):
        raise GroodError("the OOD prototype is not finite: an outlier has a NaN or infinite feature; check the source")
    gradient_field = GradientField(class_prototypes, ood_prototype)
    correct = torch.ones_like(labels, dtype=torch.bool) if predictions is None else predictions == class_ids[labels]
    if not bool(correct.any()):
        raise GroodError(
            f"the classifier is wrong on all {len(labels)} training samples, so there is no gradient to store; "
            "are the labels in the order of its outputs, and is the transform its own?"
        )
    n, d = len(labels), len(ood_prototype)
    stored = PolarGradients(
        torch.empty(int(correct.sum()), dtype=torch.float64),
        torch.empty(int(correct.sum()), d, dtype=torch.float32),
    )
    done = written = n_prototype_correct = 0
    chunks.reverse()
    joined: list[Tensor] = []
    while chunks:
        joined.append(chunks.pop())
        if chunks and sum(map(len, joined)) < GRADIENT_ROWS:
            continue
        geometry = gradient_field(torch.cat(joined).cpu())
        rows = slice(done, done + len(geometry.nearest))
        n_prototype_correct += int((geometry.nearest == labels[rows]).sum())
        kept = geometry.gradients.take(correct[rows])
        target = slice(written, written + len(kept.log_magnitude))
        stored.log_magnitude[target] = kept.log_magnitude
        stored.direction[target] = kept.direction
        done, written = rows.stop, target.stop
        joined.clear()
    info = FitInfo(
        n_samples=n,
        n_indexed=written,
        n_classes=len(class_prototypes),
        n_features=d,
        n_left_out=0,
        classifier_accuracy=None if predictions is None else float(correct.double().mean()),
        prototype_accuracy=n_prototype_correct / n,
        outlier_source=source.config(),
        uses_ood_data=source.uses_ood_data,
        n_outliers=len(outlier_features),
    )
    return FittedState(
        classes=classes,
        class_ids=class_ids,
        class_prototypes=class_prototypes,
        ood_prototype=ood_prototype,
        index=index,
        searcher=index.build(stored, seed=seed),
        sample_ids=sample_ids[correct],
        fingerprint=None,
        info=info,
    )
