"""One method's figures: on one OOD set, and as means over the near or far sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from torch_grood.errors import GroodError
from torch_grood.evaluation.metrics import FIGURES
from torch_grood.evaluation.results._checks import Interval, check_interval, check_shares, twice

__all__ = ["OPENOOD_FIGURES", "Figures", "GroupFigures", "OpenOODFigures", "SetFigures"]

OPENOOD_FIGURES = ("fpr95", "auroc", "aupr_in", "aupr_out")


@dataclass(frozen=True)
class OpenOODFigures:
    """What OpenOOD prints for the same scores; see `openood_metrics`. Of a group: the means.

    Attributes:
        fpr95: share of ID flagged when 95 % of OOD is caught.
        auroc: area under the ROC curve.
        aupr_in: trapezoidal area, ID as the positive class.
        aupr_out: trapezoidal area, OOD as the positive class.
    """

    fpr95: float
    auroc: float
    aupr_in: float
    aupr_out: float

    def __post_init__(self) -> None:
        check_shares(vars(self))


@dataclass(frozen=True)
class Figures:
    """See `DetectionMetrics` for the figures; `intervals` has some of them by name: (low, high)."""

    auroc: float
    ood_accepted_at_95_id_kept: float
    id_flagged_at_95_ood_caught: float
    aupr_ood: float
    aupr_id: float
    openood: OpenOODFigures

    def value(self, figure: str) -> float:
        """A figure by its name in `FIGURES`."""
        found: float = getattr(self, figure)
        return found

    def _check(self, intervals: Mapping[str, Interval]) -> None:
        check_shares({figure: self.value(figure) for figure in FIGURES})
        for figure, interval in intervals.items():
            if figure not in FIGURES:
                raise GroodError(f"there is an interval of {figure!r:.80}; expected {', '.join(FIGURES)}")
            check_interval(interval, 0.0, figure)


@dataclass(frozen=True)
class SetFigures(Figures):
    """One method on one OOD set against the ID test set.

    Attributes:
        auroc, ood_accepted_at_95_id_kept, id_flagged_at_95_ood_caught, aupr_ood, aupr_id: see `DetectionMetrics`.
        openood: the same scores by OpenOOD's definitions.
        n_id, n_ood: number of scores.
        intervals: 95 %, (low, high) of some figures.
    """

    n_id: int
    n_ood: int
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check(self.intervals)
        if self.n_id < 1 or self.n_ood < 1:
            raise GroodError(f"figures of {self.n_id} ID and {self.n_ood} OOD scores; expected one of each at least")


@dataclass(frozen=True)
class GroupFigures(Figures):
    """One method on the near or far sets: unweighted means of the sets' figures, as OpenOOD takes them.

    Attributes:
        auroc, ood_accepted_at_95_id_kept, id_flagged_at_95_ood_caught, aupr_ood, aupr_id, openood: means.
        comparable: whether they may stand beside other people's.
        sets: keys of the sets.
        intervals: 95 %, (low, high) of some means.
    """

    comparable: bool
    sets: tuple[str, ...]
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check(self.intervals)
        if not self.sets or twice(self.sets) is not None:
            raise GroodError(f"a mean over the sets {list(self.sets)}; expected one at least, and none twice")

    @classmethod
    def of(
        cls, sets: Mapping[str, SetFigures], comparable: bool, intervals: Mapping[str, Interval] | None = None
    ) -> Self:
        """The means over some sets.

        Raises:
            GroodError: if there is no set.
        """
        if not sets:
            raise GroodError("there is no set to take a mean over; leave the group out")
        found = list(sets.values())
        return cls(
            **{figure: _mean(one.value(figure) for one in found) for figure in FIGURES},
            openood=OpenOODFigures(
                **{name: _mean(getattr(one.openood, name) for one in found) for name in OPENOOD_FIGURES}
            ),
            comparable=comparable,
            sets=tuple(sets),
            intervals=dict(intervals or {}),
        )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
