"""Figures as they were published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch_grood.evaluation.results import Group

__all__ = ["Figure", "Published", "PublishedMethod"]

_EPSILON = 1e-9


class Figure(NamedTuple):
    """A figure as it was printed, in per cent.

    Attributes:
        value: the mean.
        std: standard deviation over runs, or None.
        decimals: of the value.
    """

    value: float
    std: float | None
    decimals: int

    @property
    def rounding(self) -> float:
        """The largest difference that rounding makes."""
        return 0.5 * 10.0**-self.decimals

    def distance(self, value: float) -> float:
        """How far a value lies from it in points, less what floating point may add."""
        return abs(value - self.value) - _EPSILON

    def __str__(self) -> str:
        """As it was printed."""
        std = "" if self.std is None else f" ± {self.std:.{self.decimals}f}"
        return f"{self.value:.{self.decimals}f}{std}"


@dataclass(frozen=True)
class PublishedMethod:
    """The published figures of one method.

    Attributes:
        key: of its table.
        method: name on the command line.
        config: hyper-parameters that a result must have to be held against these figures.
        groups: AUROC of "near" and "far".
        sets: AUROC by key of the set.
        source: whose figures.
        checkpoints: of which networks.
        id_accuracy: of these networks' own labels, or None.
        note: what else is to be known.
    """

    key: str
    method: str
    config: Mapping[str, Any]
    groups: Mapping[Group, Figure]
    sets: Mapping[str, Figure]
    source: str
    checkpoints: str
    id_accuracy: Figure | None = None
    note: str | None = None


@dataclass(frozen=True)
class Published:
    """A file of published figures.

    Attributes:
        name: of the file's figures.
        benchmark: name of the spec.
        source: whose figures.
        checkpoints: of which networks.
        methods: by key of the table.
        tolerance: points that a figure may differ beyond rounding.
        within_std: published standard deviations that a figure may differ.
        id_accuracy: of the networks, or None.
        sets: number of images by group and key of the set, 0 where it is not known; empty: nothing is known.
        weights_sha256: of the checkpoints; empty: not known.
    """

    name: str
    benchmark: str
    source: str
    checkpoints: str
    methods: Mapping[str, PublishedMethod]
    tolerance: float = 0.0
    within_std: float = 2.0
    id_accuracy: Figure | None = None
    sets: Mapping[Group, Mapping[str, int]] = field(default_factory=dict)
    weights_sha256: frozenset[str] = frozenset()
