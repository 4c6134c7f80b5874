"""What one checkpoint or seed gave: its accuracy, what the pass took, and what became of each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch_grood.errors import GroodError
from torch_grood.evaluation.metrics import FIGURES
from torch_grood.evaluation.results._checks import check_seconds, check_shares, twice
from torch_grood.evaluation.results._records import json_data
from torch_grood.evaluation.results.figures import OPENOOD_FIGURES, GroupFigures, SetFigures
from torch_grood.evaluation.results.sets import Group

__all__ = ["Accuracy", "Extraction", "MethodResult", "Run", "SearchPoint", "Seconds"]

# Means are taken again on reading; they may round differently, no more.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Accuracy:
    """Shares of the ID test set that are labelled right.

    Attributes:
        classifier: by the network's own labels.
        prototype: by the nearest class prototype; None if there are none.
    """

    classifier: float
    prototype: float | None = None

    def __post_init__(self) -> None:
        check_shares({"classifier": self.classifier, "prototype": self.prototype})


@dataclass(frozen=True)
class Extraction:
    """The one pass over all images.

    Attributes:
        seconds: wall time.
        images: all of them.
        images_from_cache: those that the network did not see again.
    """

    seconds: float
    images: int
    images_from_cache: int = 0

    def __post_init__(self) -> None:
        check_seconds(seconds=self.seconds)
        if not 0 <= self.images_from_cache <= self.images:
            raise GroodError(f"{self.images_from_cache} of {self.images} images came from the cache")


@dataclass(frozen=True)
class Seconds:
    """Wall time of a method.

    Attributes:
        fit: on the training outputs.
        score: all test sets.
        choose: trying hyper-parameters.
    """

    fit: float
    score: float
    choose: float = 0.0

    def __post_init__(self) -> None:
        check_seconds(fit=self.fit, score=self.score, choose=self.choose)


@dataclass(frozen=True)
class SearchPoint:
    """One choice of hyper-parameters that was tried.

    Attributes:
        config: the choice.
        value: AUROC on what was chosen on; None if it could not be tried.
        reason: why not.
    """

    config: Mapping[str, Any]
    value: float | None
    reason: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", json_data(self.config, "config"))
        check_shares({"value": self.value})


@dataclass(frozen=True)
class MethodResult:
    """What became of one method in one run.

    Attributes:
        name: on the command line, e.g. "knn".
        label: the row's name, as it was asked for and the same in all runs, e.g. "KNN (k = 200)".
        config: the hyper-parameters that the figures come from, also those that a search chose.
        status: "done"; "unavailable": the classifier or the data lack what it needs; "failed".
        reason: why not done.
        chosen_by: what hyper-parameters were chosen on; None if they were given.
        search: what was tried.
        warnings: for the reader of the figures.
        uses_ood_data: whether it saw real outliers, in fitting or in the choice.
        seconds: None if not done.
        figures: by key of the OOD set; all that are there.
        groups: of "near" and "far", those that have a set.
    """

    name: str
    label: str
    config: Mapping[str, Any]
    status: Literal["done", "unavailable", "failed"] = "done"
    reason: str | None = None
    chosen_by: str | None = None
    search: tuple[SearchPoint, ...] = ()
    warnings: tuple[str, ...] = ()
    uses_ood_data: bool = False
    seconds: Seconds | None = None
    figures: Mapping[str, SetFigures] = field(default_factory=dict)
    groups: Mapping[Group, GroupFigures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", json_data(self.config, f"config of {self.label}"))
        if not self.name or not self.label:
            raise GroodError("a method needs a name and a label")
        if self.status == "done":
            if self.reason is not None or not self.figures:
                raise GroodError(f"{self.label} is done, so it has figures and no reason why not")
        elif not self.reason or self.figures or self.groups:
            raise GroodError(f"{self.label} is {self.status}, so it has a reason and no figures")
        for group, means in self.groups.items():
            self._check_means(group, means)

    def _check_means(self, group: Group, means: GroupFigures) -> None:
        if unknown := [key for key in means.sets if key not in self.figures]:
            raise GroodError(f"{self.label}: the {group} means take in {unknown[0]}, which has no figures")
        again = GroupFigures.of({key: self.figures[key] for key in means.sets}, means.comparable)
        pairs = [(figure, again.value(figure), means.value(figure)) for figure in FIGURES]
        pairs += [
            (f"openood.{figure}", getattr(again.openood, figure), getattr(means.openood, figure))
            for figure in OPENOOD_FIGURES
        ]
        for figure, expected, given in pairs:
            if abs(expected - given) > _ROUNDING:
                raise GroodError(f"{self.label}: {group} {figure} is {given}, but the mean of its sets is {expected}")


@dataclass(frozen=True)
class Run:
    """One checkpoint, or one seed.

    Attributes:
        weights: name of the file; None: as the model is made.
        weights_sha256: of the weights; None if not known.
        seed: of what is random in methods.
        accuracy: on the ID test set.
        extraction: what the pass over the images took.
        methods: in the order given.
        peak_memory_bytes: of the process; None if not known.
    """

    weights: str | None
    weights_sha256: str | None
    seed: int
    accuracy: Accuracy
    extraction: Extraction
    methods: tuple[MethodResult, ...]
    peak_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        if (label := twice([method.label for method in self.methods])) is not None:
            raise GroodError(f"two methods of a run are called {label!r}; their rows could not be told apart")

    def method(self, label: str) -> MethodResult | None:
        """The method of that label, if the run has it."""
        return next((method for method in self.methods if method.label == label), None)
