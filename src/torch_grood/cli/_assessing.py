"""What `grood score` finds out about images from a detector, in one pass of its model.

The features of an image are there once, when the model has seen it. Only those of the images that will be explained
are kept: of the most OOD ones where the output is limited to them; where all are explained, of one batch at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_grood import GROOD, Explanation, Prediction, benjamini_hochberg
from torch_grood.cli._results import Results
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood import Assessment, ConformalThreshold
    from torch_grood.cli._common import Progress
    from torch_grood.cli._decision import Decision
    from torch_grood.data import ImageLoader

__all__ = ["assess_all", "explain_most"]

# Class prototypes in an explanation; the classifier's class is nearly always among them.
N_PROTOTYPES = 5


def assess_all(detector: GROOD, loader: ImageLoader, decision: Decision, progress: Progress) -> Results:
    """Decide about all images of a loader."""
    if detector.threshold_ is None and decision.tau is None:
        assessed = detector.assess(loader, progress=progress)
        return _results(detector, loader, assessed, None, None)
    found = detector.predict(loader, **asdict(decision), progress=progress)
    return _results(detector, loader, found, found.p_value, found.is_ood)


def explain_most(
    detector: GROOD, loader: ImageLoader, decision: Decision, progress: Progress, k: int, most: int | None
) -> Results:
    """Decide about all images of a loader, and explain the most OOD ones, or all; the model sees each image once.

    Args:
        detector: with a model.
        loader: of the images.
        decision: the user's.
        progress: as of `Reporter.progress`.
        k: training images in an explanation.
        most: images to explain; None: all.
    """
    names, n = loader.dataset.source.paths, len(loader.dataset)
    decided, explained, top = _Columns(n), _Columns(n), _Top(most or 0)
    for images, _, positions in progress(loader) if progress else loader:
        if len(images) == 0:
            continue
        _check_shape(detector, images)
        # As one batch, which is how `predict` shows it to the model: another would round differently.
        seen = detector.extract([images], progress=False)
        try:
            decision_here = _decide(detector, seen.features, seen.logits.argmax(1), decision)
        except GroodError as error:
            raise GroodError(f"in the batch that begins with {names[int(positions[0])]}: {error}") from None
        decided.add(decision_here)
        if most is None:
            # The directions are as large as the features, and are not shown.
            parts = detector.explain_features(seen.features, k, N_PROTOTYPES)
            explained.add(parts._replace(direction=parts.direction[:, :0]))
        else:
            top.add(decision_here.score, seen.features)
    if decided.done == 0:
        raise GroodError("there is no image to score; check the path and the loader")
    found = Prediction(*decided.fields())
    is_ood: Tensor | None = found.is_ood
    if detector.threshold_ is None and decision.tau is None:
        is_ood = None
    if decision.fdr is not None and found.p_value is not None:
        # About all images together, so that it waits for the last one.
        is_ood = benjamini_hochberg(found.p_value, decision.fdr)
    results = _results(detector, loader, found, found.p_value, is_ood)
    if most is None:
        return replace(results, explained=range(len(results)), explanation=Explanation(*explained.fields()))
    explanation = detector.explain_features(top.features, k, N_PROTOTYPES)
    return replace(results, explained=top.positions.tolist(), explanation=explanation)


def _decide(detector: GROOD, features: Tensor, label: Tensor, decision: Decision) -> Prediction:
    """About one batch; with --fdr by the calibration's own τ, since the decision is about all batches together."""
    if detector.threshold_ is None and decision.tau is None:
        # For scores and labels; there is no threshold, and what this one says is not shown.
        return detector.predict_features(features, label, tau=0.0)
    return detector.predict_features(features, label, fpr=decision.fpr, tau=decision.tau)


class _Columns:
    """Named tuples of tensors (b, …) one below another, at most n rows in all.

    They are copied into their places: thousands of small tensors, left over from among the large ones of a pass, would
    keep the memory of these from being used again.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._columns: list[Tensor | None] = []
        self.done = 0

    def add(self, parts: Sequence[Tensor | None]) -> None:
        if self.done == 0:
            self._columns = [None if part is None else part.new_empty(self._n, *part.shape[1:]) for part in parts]
        size = next(len(part) for part in parts if part is not None)
        for column, part in zip(self._columns, parts, strict=True):
            if column is not None and part is not None:
                column[self.done : self.done + size] = part
        self.done += size

    def fields(self) -> list[Any]:
        return [None if column is None else column[: self.done] for column in self._columns]


class _Top:
    """Features of the images with the highest scores so far; of equal ones, the first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._done = 0
        self._score = torch.empty(0, dtype=torch.float64)
        self.positions = torch.empty(0, dtype=torch.int64)
        self.features = torch.empty(0)

    def add(self, score: Tensor, features: Tensor) -> None:
        positions = torch.arange(self._done, self._done + len(score))
        features = features if self._done == 0 else torch.cat([self.features, features])
        score, positions = torch.cat([self._score, score]), torch.cat([self.positions, positions])
        best = score.argsort(descending=True, stable=True)[: self._most]
        self._done += len(score) - len(self._score)
        self._score, self.positions, self.features = score[best], positions[best], features[best]


def _check_shape(detector: GROOD, images: Tensor) -> None:
    expected = detector.fit_info_.image_shape
    if expected and tuple(images.shape[1:]) != expected:
        raise GroodError(
            f"images of shape {tuple(images.shape[1:])} cannot be scored: the detector was fitted on images of shape "
            f"{expected}. Apply the same transform to all."
        )


def _results(
    detector: GROOD,
    loader: ImageLoader,
    found: Assessment | Prediction,
    p_value: Tensor | None,
    is_ood: Tensor | None,
) -> Results:
    assert found.label is not None
    threshold = detector.threshold_
    return Results(
        classes=[str(name) for name in detector.classes_],
        paths=loader.names(),
        score=found.score.numpy(),
        p_value=None if p_value is None else p_value.numpy(),
        is_ood=None if is_ood is None else is_ood.numpy(),
        label=found.label.numpy(),
        prototype_label=found.prototype_label.numpy(),
        n_held_out=None if threshold is None else _largest_group(threshold),
        detector=detector,
    )


def _largest_group(threshold: ConformalThreshold) -> int:
    return threshold.n if threshold.groups is None else int(threshold.groups.bincount().max())
