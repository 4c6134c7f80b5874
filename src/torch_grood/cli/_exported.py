"""`grood score` and `grood info` for what `grood export` wrote; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_grood._conformal import flagged
from torch_grood.cli._decision import Decision, need_calibration
from torch_grood.cli._results import Results
from torch_grood.errors import GroodError
from torch_grood.runtime.base import Decisions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from torch_grood.cli._common import Progress
    from torch_grood.data.pixels import PixelLoader
    from torch_grood.runtime.onnx import OnnxRuntime

__all__ = ["decide_all", "opened"]


def opened(path: Path, decision: Decision) -> OnnxRuntime:
    """The exported detector, at the user's operating point.

    Raises:
        GroodError: if the file cannot be used, or cannot decide so.
    """
    from torch_grood.runtime.onnx import OnnxRuntime

    runtime = OnnxRuntime(path, fpr=decision.fpr, tau=decision.tau, shared=True)
    need_calibration(decision, runtime.manifest.calibration is not None)
    if decision.fdr is not None:
        # For its errors.
        flagged(np.empty(0), decision.fdr)
    return runtime


def decide_all(runtime: OnnxRuntime, loader: PixelLoader, decision: Decision, progress: Progress) -> Results:
    """Decide about all images of a loader."""
    parts: list[Decisions] = []
    batches: Iterable[NDArray[np.uint8]] = progress(loader) if progress else loader
    for pixels in batches:
        if len(pixels):
            parts.append(runtime.decide(pixels))
    if not parts:
        raise GroodError("there is no image to score; check the path")
    fields: list[Any] = [None if field[0] is None else np.concatenate(field) for field in zip(*parts, strict=True)]
    found = Decisions(*fields)
    is_ood, calibration = found.is_ood, runtime.manifest.calibration
    if decision.fdr is not None and found.p_value is not None:
        is_ood = flagged(found.p_value, decision.fdr)
    return Results(
        classes=runtime.classes,
        paths=loader.names(),
        score=found.score,
        p_value=found.p_value,
        is_ood=is_ood,
        label=found.label,
        prototype_label=found.prototype_label,
        n_held_out=None if calibration is None else max(calibration.sizes),
    )
