"""What `grood score` finds out about images, in one pass of the model.

The features of an image are there once, when the model has seen it. Only those of the images that will be explained
are kept: of the most OOD ones where the output is limited to them; where all are explained, of one batch at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_grood import GROOD, Explanation, Prediction, benjamini_hochberg
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood import Assessment
    from torch_grood.cli._common import Progress
    from torch_grood.cli._decision import Decision
    from torch_grood.data import ImageLoader

__all__ = ["Results", "Row", "assess_all", "encodable", "explain_most"]

# Class prototypes in an explanation; the classifier's class is nearly always among them.
N_PROTOTYPES = 5

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What is known of n images; rows are made one at a time, since a dict for each takes a hundred times more memory.

    Attributes:
        detector: that found it.
        paths: of the images.
        score: float64 (n,).
        p_value: float64 (n,), or None without a calibration.
        is_ood: bool (n,), or None without a threshold.
        label: the classifier's class, int64 (n,).
        prototype_label: class of the nearest prototype, int64 (n,).
        explained: positions of the images that are explained, int64 (m,); None: nobody asked.
        explanation: of those m images.
    """

    detector: GROOD
    paths: Sequence[str]
    score: Tensor
    p_value: Tensor | None
    is_ood: Tensor | None
    label: Tensor
    prototype_label: Tensor
    explained: Tensor | None = None
    explanation: Explanation | None = None

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def by_score(self) -> list[int]:
        """Positions of the images, the most OOD first."""
        order: list[int] = self.score.argsort(descending=True, stable=True).tolist()
        return order

    @cached_property
    def names(self) -> list[str]:
        """Of the classes."""
        return [str(name) for name in self.detector.classes_]

    def row(self, position: int) -> Row:
        """The decision about one image."""

        def at(column: Tensor | None) -> Any:
            return None if column is None else column[position].item()

        return {
            "path": encodable(self.paths[position]),
            "score": at(self.score),
            "p_value": at(self.p_value),
            "is_ood": at(self.is_ood),
            "label": self.names[at(self.label)],
            "prototype_label": self.names[at(self.prototype_label)],
        }

    @cached_property
    def _places(self) -> dict[int, int]:
        return {} if self.explained is None else {p: place for place, p in enumerate(self.explained.tolist())}

    def explanation_at(self, position: int) -> Explanation:
        """Of one image that is explained; the fields have lost their first dimension."""
        assert self.explanation is not None
        place = self._places[position]
        return Explanation(*(field[place] for field in self.explanation))


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
        return replace(results, explained=torch.arange(len(results)), explanation=Explanation(*explained.fields()))
    explanation = detector.explain_features(top.features, k, N_PROTOTYPES)
    return replace(results, explained=top.positions, explanation=explanation)


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
    paths = loader.dataset.source.paths
    return Results(
        detector=detector,
        paths=[paths[position] for position in loader.kept],
        score=found.score,
        p_value=p_value,
        is_ood=is_ood,
        label=found.label,
        prototype_label=found.prototype_label,
    )


def encodable(path: str) -> str:
    """A file name may hold bytes that are no UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")
