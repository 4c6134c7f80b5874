"""What `grood score` knows of images in the end, however it was found out; numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_grood._text import encodable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from torch_grood import GROOD, Explanation

__all__ = ["Results", "Row"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """What is known of n images; rows are made one at a time, since a dict for each takes a hundred times more memory.

    Attributes:
        classes: names of the classifier's classes.
        paths: of the images.
        score: float64 (n,).
        p_value: float64 (n,), or None without a calibration.
        is_ood: bool (n,), or None without a threshold.
        label: the classifier's class, int64 (n,).
        prototype_label: class of the nearest prototype, int64 (n,).
        n_held_out: held-out images that a p-value rests on, of the largest group; None without a calibration.
        detector: that can tell of training images; with explanations.
        explained: positions of the images that are explained, m of them; None: nobody asked.
        explanation: of those m images.
    """

    classes: Sequence[str]
    paths: Sequence[str]
    score: NDArray[np.float64]
    p_value: NDArray[np.float64] | None
    is_ood: NDArray[np.bool_] | None
    label: NDArray[np.int64]
    prototype_label: NDArray[np.int64]
    n_held_out: int | None = None
    detector: GROOD | None = None
    explained: Sequence[int] | None = None
    explanation: Explanation | None = None

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def by_score(self) -> list[int]:
        """Positions of the images, the most OOD first."""
        order: list[int] = np.argsort(-self.score, kind="stable").tolist()
        return order

    def row(self, position: int) -> Row:
        """The decision about one image."""

        def at(column: NDArray[Any] | None) -> Any:
            return None if column is None else column[position].item()

        return {
            "path": encodable(self.paths[position]),
            "score": at(self.score),
            "p_value": at(self.p_value),
            "is_ood": at(self.is_ood),
            "label": self.classes[at(self.label)],
            "prototype_label": self.classes[at(self.prototype_label)],
        }

    @cached_property
    def _places(self) -> dict[int, int]:
        return {} if self.explained is None else {p: place for place, p in enumerate(self.explained)}

    def explanation_at(self, position: int) -> Explanation:
        """Of one image that is explained; the fields have lost their first dimension."""
        assert self.explanation is not None
        place = self._places[position]
        return type(self.explanation)(*(field[place] for field in self.explanation))

    def sample_names(self, samples: Any) -> list[str | None]:
        """Names of training samples, where they are known."""
        assert self.detector is not None
        return self.detector.sample_names(samples)
