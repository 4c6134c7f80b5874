"""What the formats have in common: the detector as a module, its manifest, and the comparison with the detector."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_grood import GROOD, ConformalThreshold, __version__
from torch_grood.data.transforms import ImageTransform
from torch_grood.errors import GroodError, ModelMismatchError
from torch_grood.export.module import DetectorModule, Outputs
from torch_grood.features import FeatureExtractor
from torch_grood.runtime.manifest import Calibration, Manifest
from torch_grood.summary import facts, threshold_facts

__all__ = ["Prepared", "prepare", "reason_of"]

_CHANNELS = 3
# Of an image whose size is free.
_SIDE = 64
_OTHER_SIDE = 16
# Two images are traced: a batch of one would be taken for a constant.
_TRACED, _COMPARED = 2, (1, 5)
_TOLERANCE = 1e-4

Shapes = dict[int, torch.export.Dim]


@dataclass(frozen=True)
class Prepared:
    """A detector that is ready to be traced.

    Attributes:
        module: all that it does.
        names: of the module's outputs.
        example: images to trace it with.
        dynamic: axes of an image batch that may have any length.
        manifest: what the file says of itself.
        detector: to compare with, at the same operating point.
        fpr: the operating point, if it is not the detector's own.
    """

    module: DetectorModule
    names: tuple[str, ...]
    example: Tensor
    dynamic: Shapes
    manifest: Manifest
    detector: GROOD
    fpr: float | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.module.parameters(), *self.module.buffers()))

    def compare(self, run: Callable[[Tensor], Sequence[Tensor]]) -> None:
        """Compare what was written with the detector.

        Args:
            run: from prepared images to the outputs, in the order of `names`.

        Raises:
            GroodError: if the scores differ by more than 1e-4 of themselves, or other classes come out.
        """
        height, width = self.example.shape[2:]
        other = (height, width) if 2 not in self.dynamic else (height + _OTHER_SIDE, width + 2 * _OTHER_SIDE)
        for n, size in zip(_COMPARED, ((height, width), other), strict=True):
            images = _images(n, *size)
            try:
                found = dict(zip(self.names, run(images), strict=True))
            # Of whatever runs it; ONNX Runtime's errors have no public class.
            except Exception as error:
                raise GroodError(
                    f"what was exported cannot run on {n} images of {size[0]} × {size[1]}, so that nothing was "
                    f"written: {reason_of(error)}"
                ) from error
            expected = self.detector.assess(images, progress=False)
            assert expected.label is not None
            difference = (found["score"] - expected.score).abs()
            if not bool((difference <= _TOLERANCE * expected.score + torch.finfo(torch.float64).tiny).all()):
                worst = float((difference / expected.score).max())
                raise GroodError(
                    f"what was exported gives scores that differ by {worst:.1g} of themselves from the detector's; "
                    "nothing was written. Does the model behave the same each time it runs?"
                )
            if not torch.equal(found["label"], expected.label):
                raise GroodError("what was exported gives other classes than the model; nothing was written")


def prepare(detector: GROOD, transform: ImageTransform, fpr: float | None) -> Prepared:
    """Make a detector ready to be traced.

    Args:
        detector: fitted, with its model.
        transform: of its images.
        fpr: another false-alarm rate than the calibration's.

    Raises:
        GroodError: if it has no model, takes other images than the transform makes, or cannot promise the rate.
    """
    if detector.model is None:
        raise GroodError("the detector has no model, which is exported with it; GROOD.load(path, model) gives it one")
    threshold = _threshold(detector, fpr)
    size = _size(detector, transform)
    example = _images(_TRACED, *(size or (_SIDE, _SIDE)))
    model = detector.model
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model).cpu()
    extractor = FeatureExtractor(model, detector.fit_info_.head)
    # Once before the trace, to find the head.
    extractor(example)
    module = DetectorModule(detector, extractor, threshold)
    # Of itself alone: the model's modes are the caller's, and `extractor` sets them for each run.
    module.training = False
    dynamic: Shapes = {0: torch.export.Dim("batch")}
    if size is None:
        dynamic |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    names = Outputs._fields if threshold is not None else Outputs._fields[:-2]
    manifest = Manifest(
        classes=tuple(map(str, detector.classes_)),
        transform=transform,
        shape=(_CHANNELS, *(size or (0, 0))),
        n_stored=len(detector.state_.searcher.gradients),
        calibration=None if threshold is None else _calibration(threshold),
        facts=facts(detector) | {"threshold": None if threshold is None else threshold_facts(detector, threshold)},
        version=__version__,
    )
    return Prepared(module, names, example, dynamic, manifest, detector, fpr)


def reason_of(error: Exception) -> str:
    """What was wrong in the first place, in a line; torch wraps errors in pages of advice."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:500]}"


def _threshold(detector: GROOD, fpr: float | None) -> ConformalThreshold | None:
    if fpr is None:
        return detector.threshold_
    # For its errors.
    detector.predict_features(torch.empty(0, detector.fit_info_.n_features), fpr=fpr)
    assert detector.threshold_ is not None
    return detector.threshold_.at(fpr)


def _size(detector: GROOD, transform: ImageTransform) -> tuple[int, int] | None:
    """Height and width of every image; None: any."""
    shape, size = detector.fit_info_.image_shape, transform.output_size
    if not shape:
        return size
    if len(shape) != _CHANNELS or shape[0] != _CHANNELS:
        raise GroodError(f"only detectors of RGB images can be exported, and this one takes inputs of shape {shape}")
    if size is not None and tuple(shape[1:]) != tuple(size):
        raise ModelMismatchError(
            f"the transform makes images of {size[0]} × {size[1]}, and the detector was fitted on {shape[1]} × "
            f"{shape[2]}; pass the transform that it was fitted with"
        )
    return shape[1], shape[2]


def _calibration(threshold: ConformalThreshold) -> Calibration:
    groups = threshold.groups
    sizes = (threshold.n,)
    if groups is not None:
        sizes = tuple(torch.unique_consecutive(groups, return_counts=True)[1].tolist())
    return Calibration(
        fpr=threshold.fpr,
        log_taus=tuple(threshold.log_taus.tolist()),
        sizes=sizes,
        groups=None if groups is None else tuple(threshold.group_ids.tolist()),
    )


def _images(n: int, height: int, width: int) -> Tensor:
    """Smooth noise, which networks take for images rather than for noise."""
    generator = np.random.default_rng(n)
    coarse = torch.from_numpy(generator.normal(size=(n, _CHANNELS, 5, 5)).astype(np.float32))
    fine = torch.from_numpy(generator.normal(size=(n, _CHANNELS, height, width)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth + fine / math.pi
