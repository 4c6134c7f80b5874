"""What `fit` learns, and the second half of Algorithm 1: from features and prototypes to an index over gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_grood._progress import Progress
from torch_grood.errors import GroodError
from torch_grood.features import ModelFingerprint
from torch_grood.geometry import SquareSum, placed
from torch_grood.gradients import GradientField, PolarGradients
from torch_grood.neighbors import Coverage, GradientIndex, GradientSearcher, GradientStore, StoreOptions, Subset
from torch_grood.neighbors.store import StoreWriter
from torch_grood.outliers import PAPER, OutlierSource, ScoreSettings
from torch_grood.prototypes import ClassPrototypes
from torch_grood.provenance import TrainingRecord

__all__ = [
    "GRADIENT_ROWS",
    "FitInfo",
    "FittedState",
    "StoredPart",
    "build_state",
    "fit_info",
    "gradient_field_of",
    "store_gradients",
    "with_added",
    "with_removed",
]

# Gradients are computed in float64; this many rows at a time bounds that memory.
GRADIENT_ROWS = 8192


@dataclass(frozen=True)
class FitInfo:
    """What a detector was fitted on.

    Attributes:
        n_samples: training samples used.
        n_indexed: those whose gradients are stored: the correctly classified ones, or a subset of them.
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
        n_correct: correctly classified training samples, which a subset was chosen from; 0 in a file of format 1.
        subset: name and arguments of the subset that is stored; None: all.
        covering_radius: ε: no gradient that the subset left out is farther from a stored one, so that no score is more
            than ε larger than with all; None if unknown, or if all are stored.
        rounding_radius: the largest ‖g - ĝ‖₂ of a gradient and what is stored of it: no score is farther off.
        n_added: training samples that came after the fit.
        n_removed: stored gradients that were removed after it.
        geometry: see `torch_grood.geometry`.
        temperature: T of the softmax over distances.
        k: the score is the mean distance to so many nearest stored gradients; no more than were stored.
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
    n_correct: int = 0
    subset: dict[str, Any] | None = None
    covering_radius: float | None = None
    rounding_radius: float = 0.0
    n_added: int = 0
    n_removed: int = 0
    geometry: str = "raw"
    temperature: float = 1.0
    k: int = 1

    @property
    def n_read(self) -> int:
        """Training samples that were read, whose positions are 0 … n_read - 1."""
        return self.n_samples + self.n_left_out


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
        training: what is remembered of the training samples; None in a file of format 1 or 2.
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
    training: TrainingRecord | None = None
    gradient_field: GradientField = field(init=False, repr=False)

    def __post_init__(self) -> None:
        info = self.info
        gradient_field = GradientField(self.class_prototypes, self.ood_prototype, info.geometry, info.temperature)
        object.__setattr__(self, "gradient_field", gradient_field)


def gradient_field_of(
    prototypes: ClassPrototypes,
    squares: SquareSum | None,
    outlier_features: Tensor,
    source: OutlierSource,
    settings: ScoreSettings,
) -> GradientField:
    """Where gradients are taken: class prototypes, OOD prototype, geometry and temperature.

    The prototypes and the squares, that a temperature is made of, are those of the features in the geometry of
    `settings`.
    """
    geometry, temperature = settings.geometry, settings.temperature
    if temperature is None:
        assert squares is not None
        temperature = squares.temperature(prototypes)
    ood_prototype = source.prototype(outlier_features, partial(placed, geometry=geometry)).cpu()
    class_prototypes = prototypes.means.cpu()
    if not bool(ood_prototype.isfinite().all()):
        raise GroodError("the OOD prototype is not finite: an outlier has a NaN or infinite feature; check the source")
    return GradientField(class_prototypes, ood_prototype, geometry, temperature)


class StoredPart(NamedTuple):
    """The stored gradients of training samples, all or some of a training set, and what was counted on the way.

    Attributes:
        gradients: of the correctly classified samples, or of a subset of them.
        sample_ids: theirs, int64.
        n_samples: all of them.
        n_correct: correctly classified.
        n_prototype_correct: whose nearest class prototype is their own.
        coverage: of the subset, if it is one that covers.
    """

    gradients: GradientStore
    sample_ids: Tensor
    n_samples: int
    n_correct: int
    n_prototype_correct: int
    coverage: Coverage | None = None


def store_gradients(
    gradient_field: GradientField,
    *,
    features: Iterable[Tensor],
    labels: Tensor,
    predictions: Tensor | None,
    sample_ids: Tensor,
    class_ids: Tensor,
    store: StoreOptions,
    subset: Subset | None = None,
    keys: Tensor | None = None,
    progress: Progress = None,
) -> StoredPart:
    """The gradients of training samples; arguments as of `build_state`.

    Raises:
        GroodError: if no sample is correctly classified, or they cannot be stored.
    """
    correct = torch.ones_like(labels, dtype=torch.bool) if predictions is None else predictions == class_ids[labels]
    if not bool(correct.any()):
        raise GroodError(
            f"the classifier is wrong on all {len(labels)} training samples, so there is no gradient to store; "
            "are the labels in the order of its outputs, and is the transform its own?"
        )
    kept = correct
    chosen = None if subset is None or keys is None else subset.sample(labels[correct], keys[correct])
    if chosen is not None:
        kept = torch.zeros_like(correct)
        kept[correct.nonzero().flatten()[chosen]] = True
    writer = StoreWriter(int(kept.sum()), len(gradient_field.ood_prototype), store)
    done = n_prototype_correct = 0
    for part in _joined(features):
        found = gradient_field(part.cpu())
        rows = slice(done, done + len(part))
        n_prototype_correct += int((found.nearest == labels[rows]).sum())
        writer.append(found.gradients.take(kept[rows]))
        done = rows.stop
    gradients = writer.finish()
    sample_ids = sample_ids[kept]
    coverage = None if subset is None else subset.cover(gradients, progress=progress)
    if coverage is not None:
        gradients, sample_ids = gradients.select(coverage.rows, store), sample_ids[coverage.rows]
    return StoredPart(gradients, sample_ids, len(labels), int(correct.sum()), n_prototype_correct, coverage)


def fit_info(
    gradient_field: GradientField,
    source: OutlierSource,
    settings: ScoreSettings,
    *,
    n_samples: int,
    n_indexed: int,
    n_correct: int,
    n_prototype_correct: int,
    n_outliers: int,
    predicts: bool,
    log_rounding: float,
    subset: Subset | None = None,
    coverage: Coverage | None = None,
) -> FitInfo:
    """What a fit tells of itself; `predicts` is whether the classifier's predictions are known."""
    return FitInfo(
        n_samples=n_samples,
        n_indexed=n_indexed,
        n_classes=len(gradient_field.class_prototypes),
        n_features=len(gradient_field.ood_prototype),
        n_left_out=0,
        classifier_accuracy=n_correct / n_samples if predicts else None,
        prototype_accuracy=n_prototype_correct / n_samples,
        outlier_source=source.config(),
        uses_ood_data=source.uses_ood_data,
        n_outliers=n_outliers,
        n_correct=n_correct,
        subset=None if subset is None else subset.config(),
        # It bounds what the subset costs the nearest neighbour, and says nothing of the next ones.
        covering_radius=None if coverage is None or settings.k > 1 else math.exp(coverage.log_radius),
        rounding_radius=math.exp(log_rounding),
        geometry=settings.geometry,
        temperature=gradient_field.temperature,
        k=min(settings.k, n_indexed),
    )


def build_state(
    index: GradientIndex,
    seed: int,
    *,
    features: Iterable[Tensor],
    labels: Tensor,
    predictions: Tensor | None,
    sample_ids: Tensor,
    prototypes: ClassPrototypes,
    classes: tuple[int | str, ...],
    class_ids: Tensor,
    outlier_features: Tensor,
    source: OutlierSource,
    store: StoreOptions = StoreOptions(),  # noqa: B008 (immutable)
    subset: Subset | None = None,
    keys: Tensor | None = None,
    progress: Progress = None,
    settings: ScoreSettings = PAPER,
    squares: SquareSum | None = None,
) -> FittedState:
    """From features to an index over gradients.

    `features` come in parts, which are let go as they are used; `labels` are rows of the prototypes, `predictions`
    positions in `classes`; a subset needs `keys`, see `Subset.sample`; of the rest, see `gradient_field_of`.
    """
    gradient_field = gradient_field_of(prototypes, squares, outlier_features, source, settings)
    stored = store_gradients(
        gradient_field,
        features=features,
        labels=labels,
        predictions=predictions,
        sample_ids=sample_ids,
        class_ids=class_ids,
        store=store,
        subset=subset,
        keys=keys,
        progress=progress,
    )
    info = fit_info(
        gradient_field,
        source,
        settings,
        n_samples=stored.n_samples,
        n_indexed=len(stored.gradients),
        n_correct=stored.n_correct,
        n_prototype_correct=stored.n_prototype_correct,
        n_outliers=len(outlier_features),
        predicts=predictions is not None,
        log_rounding=stored.gradients.log_rounding,
        subset=subset,
        coverage=stored.coverage,
    )
    return FittedState(
        classes=classes,
        class_ids=class_ids,
        class_prototypes=gradient_field.class_prototypes,
        ood_prototype=gradient_field.ood_prototype,
        index=index,
        searcher=index.build(stored.gradients, seed=seed),
        sample_ids=stored.sample_ids,
        fingerprint=None,
        info=info,
    )


def _joined(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Small parts together, so that each has enough rows to be worth a computation."""
    joined: list[Tensor] = []
    for part in parts:
        joined.append(part)
        if sum(map(len, joined)) >= GRADIENT_ROWS:
            yield torch.cat(joined)
            joined.clear()
    if joined:
        yield torch.cat(joined)


def with_added(
    state: FittedState,
    seed: int,
    gradients: PolarGradients,
    sample_ids: Tensor,
    *,
    n_used: int,
    n_left_out: int,
    store: StoreOptions,
    record: TrainingRecord,
) -> FittedState:
    """`state` with the gradients of more training samples; its prototypes stay.

    Args:
        state: to start from; unchanged.
        seed: of the index.
        gradients: of correctly classified samples.
        sample_ids: theirs, int64.
        n_used: samples of classes that take part, right or wrong.
        n_left_out: samples of other classes.
        store: where the stored gradients go.
        record: of all samples that came.
    """
    searcher = state.searcher.with_added(gradients, store, seed=seed)
    info = replace(
        state.info,
        n_samples=state.info.n_samples + n_used,
        n_left_out=state.info.n_left_out + n_left_out,
        n_indexed=len(searcher.gradients),
        n_added=state.info.n_added + n_used,
        rounding_radius=math.exp(searcher.gradients.log_rounding),
    )
    return replace(
        state,
        searcher=searcher,
        sample_ids=torch.cat([state.sample_ids, sample_ids]),
        info=info,
        training=None if state.training is None else state.training.extended(record),
    )


def with_removed(state: FittedState, seed: int, sample_ids: Tensor, store: StoreOptions) -> FittedState:
    """`state` without what is stored of some training samples; its prototypes stay."""
    if state.training is not None:
        state = replace(state, training=state.training.without(sample_ids))
    kept = (~torch.isin(state.sample_ids, sample_ids)).nonzero().flatten()
    n_removed = len(state.sample_ids) - len(kept)
    if len(kept) == 0:
        raise GroodError("no stored gradient would be left; a detector needs at least one")
    if n_removed == 0:
        return state
    searcher = state.searcher.with_only(kept, store, seed=seed)
    info = replace(
        state.info,
        n_indexed=len(kept),
        n_removed=state.info.n_removed + n_removed,
        k=min(state.info.k, len(kept)),
        # What a removed gradient stood for may be farther from those that stay.
        covering_radius=None,
    )
    return replace(state, searcher=searcher, sample_ids=state.sample_ids[kept], info=info)
