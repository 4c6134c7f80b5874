"""Image sets that a report is about, and the decisions about all of their images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from torch_grood._progress import Progress
from torch_grood._text import shorten
from torch_grood.data.dataset import OnBad, image_loader
from torch_grood.data.sources import ImageSource
from torch_grood.detector import Assessment, Prediction
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from torch_grood import GROOD
    from torch_grood.data.transforms import ImageTransform

_log = logging.getLogger("torch_grood.report")

__all__ = ["ROLES", "ReportSet", "Role", "ScoredSet", "score_set"]

Role = Literal["known", "near", "far", "unknown", "unlabelled"]
ROLES: dict[Role, str] = {
    "known": "known images (ID)",
    "near": "unknown images (near-OOD)",
    "far": "unknown images (far-OOD)",
    "unknown": "unknown images (OOD)",
    "unlabelled": "images of whatever kind",
}


@dataclass(frozen=True)
class ReportSet:
    """Images to report on.

    Attributes:
        name: for people.
        role: what they are; of "unlabelled" ones nothing is known.
        source: the files; the labels of known ones are used.
    """

    name: str
    role: Role
    source: ImageSource


@dataclass(frozen=True)
class ScoredSet:
    """What became of the n images of a set that could be read.

    Attributes:
        name, role: of the `ReportSet`.
        source: its files.
        kept: positions in it of the images, in order.
        bad: files that could not be read, with the reason.
        score: S(x), float64 (n,).
        p_value: float64 (n,); None without a calibration.
        is_ood: bool (n,); None without a threshold.
        label: the classifier's class, int64 (n,).
        prototype_label: class of the nearest prototype, int64 (n,).
        truth: class by the labels, int64 (n,); None where they are not known.
    """

    name: str
    role: Role
    source: ImageSource
    kept: tuple[int, ...]
    bad: tuple[tuple[str, str], ...]
    score: NDArray[np.float64]
    p_value: NDArray[np.float64] | None
    is_ood: NDArray[np.bool_] | None
    label: NDArray[np.int64]
    prototype_label: NDArray[np.int64]
    truth: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.score)

    @property
    def is_unknown(self) -> bool:
        """Whether the classifier was not trained for these images."""
        return self.role in ("near", "far", "unknown")

    @property
    def accuracy(self) -> float | None:
        """Share of images whose class the classifier names; None without labels."""
        return None if self.truth is None else float((self.label == self.truth).mean())

    def path(self, position: int) -> str:
        """Of the image at a position among the n."""
        return self.source.paths[self.kept[position]]


def score_set(
    detector: GROOD,
    transform: ImageTransform,
    one: ReportSet,
    *,
    fpr: float | None = None,
    tau: float | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    on_bad: OnBad = "raise",
    progress: Progress = None,
) -> ScoredSet:
    """Decide about all images of a set.

    Args:
        detector: fitted, with its model.
        transform: of its images.
        one: the set.
        fpr: another false-alarm rate than the calibration's.
        tau: the caller's own threshold instead.
        batch_size: images at a time.
        workers: processes that read files; None: as `image_loader`.
        on_bad: what becomes of unreadable files.
        progress: see `GROOD.fit`.

    Raises:
        GroodError: as `GROOD.predict`; for an unreadable file; for labels that are no classes of the detector.
    """
    labels = _class_positions(one, [str(name) for name in detector.classes_])
    loader = image_loader(one.source, transform, batch_size=batch_size, workers=workers, on_bad=on_bad)
    try:
        found: Assessment | Prediction
        if detector.threshold_ is None and tau is None:
            found = detector.assess(loader, progress=progress)
        else:
            found = detector.predict(loader, fpr=fpr, tau=tau, progress=progress)
    except GroodError as error:
        if loader.bad and not loader.kept:
            raise GroodError(f"{one.name}: none of the {len(loader.bad):,} images can be read") from error
        raise
    kept = tuple(loader.kept)
    if loader.bad:
        shown = shorten([f"{path} ({reason})" for path, reason in loader.bad], "; ")
        _log.warning("%s: left out %d unreadable of %d images: %s", one.name, len(loader.bad), len(one.source), shown)
    p_value, is_ood = (found.p_value, found.is_ood) if isinstance(found, Prediction) else (None, None)
    assert found.label is not None
    return ScoredSet(
        one.name,
        one.role,
        one.source,
        kept,
        tuple(loader.bad),
        found.score.numpy(),
        _array(p_value),
        _array(is_ood),
        found.label.numpy(),
        found.prototype_label.numpy(),
        None if labels is None else labels[list(kept)],
    )


def _class_positions(one: ReportSet, classes: Sequence[str]) -> NDArray[np.int64] | None:
    """The classifier's class of each image, from the names of class folders or from numbers in a list."""
    source = one.source
    if one.role != "known" or source.labels is None:
        return None
    names = classes if source.classes is None else source.classes
    known = {name: position for position, name in enumerate(classes)}
    if source.classes is not None and len(names) == len(classes) and not known.keys() & set(names):
        # The detector knows its classes by number: as in training, folders sorted by name are 0, 1, …
        known = {name: position for position, name in enumerate(names)}
    found = [known.get(names[label]) if 0 <= label < len(names) else None for label in source.labels]
    if None in found:
        label = source.labels[found.index(None)]
        given = label if source.classes is None else names[label]
        raise GroodError(
            f"{source.origin}: the class {given!r} is none of the detector's {len(classes):,}; known images are of its "
            "classes. Give those of other classes as unknown ones"
        )
    return np.array(found, dtype=np.int64)


def _array(values: Tensor | None) -> NDArray[Any] | None:
    return None if values is None else values.numpy()
