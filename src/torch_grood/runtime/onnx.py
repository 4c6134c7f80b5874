"""An exported detector at work: numpy and ONNX Runtime, no torch.

A graph is a program: run those that you trust. Whatever it holds, it is read within bounds, reads no other file, and
calls no code but ONNX Runtime's own operations.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from torch_grood._files import read_at_most
from torch_grood._optional import require
from torch_grood.errors import FormatError, GroodError, NotFittedError
from torch_grood.runtime.base import Decisions
from torch_grood.runtime.manifest import MANIFEST_KEY, Manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["INPUT", "OnnxRuntime", "session_of"]

INPUT = "image"
"""Name of the graph's input."""

_MOST_BYTES = 2**31
# Of distances of images to stored gradients, held at a time.
_MOST_PAIRS = 2**25
_OUTPUTS = {
    "label": "tensor(int64)",
    "prototype_label": "tensor(int64)",
    "log_score": "tensor(double)",
    "score": "tensor(double)",
    "neighbor": "tensor(int64)",
}
_DECISIONS = {"p_value": "tensor(double)", "is_ood": "tensor(bool)"}
_FLOAT = "tensor(float)"


class OnnxRuntime:
    """See `Runtime`; from a file that `grood export` wrote.

    Args:
        path: of the file.
        fpr: another false-alarm rate than the file's, promised by the same calibration.
        tau: the caller's own threshold instead, which promises nothing.
        threads: that one call uses; None: as many as there are cores.
        shared: whether other threads, such as those that read images, want these cores, too: ONNX Runtime's do not keep
            them while they wait, then, which takes longer for one image at a time.

    Attributes:
        manifest: what the file says of itself.

    Raises:
        FormatError: if the file is none, or is damaged.
        NotFittedError: for an fpr without a calibration.
        GroodError: if the rate cannot be promised, or τ is no score.
    """

    concurrent = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fpr: float | None = None,
        tau: float | None = None,
        threads: int | None = None,
        shared: bool = False,
    ) -> None:
        content = read_at_most(path, _MOST_BYTES, "an ONNX file, which ends at 2 GiB")
        self._session = session_of(content, str(path), threads, shared=shared)
        try:
            self.manifest = _manifest(self._session)
        except FormatError as error:
            raise type(error)(f"{path}: {error}") from None
        self.classes, self.transform = self.manifest.classes, self.manifest.transform
        calibration = self.manifest.calibration
        self._names = [*_OUTPUTS, *(_DECISIONS if calibration else ())]
        self.n_calibration = None if calibration is None else calibration.n
        self.class_sizes: Mapping[int, int] | None = None
        if calibration is not None and calibration.groups is not None:
            self.class_sizes = dict(zip(calibration.groups, calibration.sizes, strict=True))
        self.fpr = None if calibration is None else calibration.fpr
        self.log_tau: float | None = None
        if calibration is not None and calibration.groups is None:
            self.log_tau = calibration.log_taus[0]
        self._rate: float | None = None
        self._own_tau = False
        if fpr is not None and tau is not None:
            raise GroodError("fpr and tau are different ways to decide; give one of them")
        if fpr is not None:
            if calibration is None:
                raise NotFittedError(f"{path} was exported without a calibration; calibrate the detector, export again")
            self._rate = self.fpr = calibration.promise(fpr, self.classes)
            self.log_tau = None
        if tau is not None:
            if not 0 <= tau < math.inf:
                raise GroodError(f"tau is a score, at least 0; got {tau!r}")
            self._own_tau, self.fpr = True, None
            self.log_tau = math.log(tau) if tau else -math.inf

    def decide(self, pixels: NDArray[np.uint8]) -> Decisions:
        """See `Runtime.decide`."""
        _, height, width = self.manifest.shape
        if pixels.ndim != 4 or pixels.shape[3] != 3 or (height and pixels.shape[1:3] != (height, width)):
            raise GroodError(
                f"images of shape {pixels.shape[1:]} cannot be scored: the detector was fitted on images of "
                f"{height or 'any'} × {width or 'any'} pixels. Apply the same transform to all."
            )
        images = self._normalised(pixels)
        most = max(1, _MOST_PAIRS // self.manifest.n_stored)
        parts = [self._run(images[start : start + most]) for start in range(0, max(len(images), 1), most)]
        found = {name: np.concatenate([part[name] for part in parts]) for name in self._names}
        if not np.isfinite(found["score"]).all():
            bad = int(np.flatnonzero(~np.isfinite(found["score"]))[0])
            raise GroodError(f"image {bad} of {len(images)} has no finite score; check the image and the model")
        is_ood = found.get("is_ood")
        if self._own_tau:
            is_ood = found["log_score"] > self.log_tau
        elif self._rate is not None:
            is_ood = found["p_value"] <= self._rate
        return Decisions(
            label=found["label"],
            prototype_label=found["prototype_label"],
            score=found["score"],
            p_value=found.get("p_value"),
            is_ood=is_ood,
            neighbor=found["neighbor"],
        )

    def neighbors(self, pixels: NDArray[np.uint8], k: int) -> NDArray[np.int64]:
        """See `Runtime.neighbors`; the graph tells the nearest one only."""
        return self.decide(pixels).neighbor[:, None]

    def sample_name(self, sample: int) -> str | None:
        """None: the names of training images stay in the detector's own file."""
        return None

    def _normalised(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The bits of `ImageTransform.normalise`."""
        channels = (self.transform.mean, self.transform.std)
        mean, std = (np.array(values, np.float32)[:, None, None] for values in channels)
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32)
        images /= np.float32(255)
        images -= mean
        images /= std
        return images

    def _run(self, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        try:
            found = self._session.run(self._names, {INPUT: images})
        # ONNX Runtime's errors have no class of their own that it makes public.
        except Exception as error:
            raise GroodError(f"the graph cannot run on images of shape {images.shape[1:]}: {_line(error)}") from error
        named = dict(zip(self._names, found, strict=True))
        if any(values.shape != (len(images),) for values in named.values()):
            raise FormatError("the graph does not give one number for each image; it was not written by grood export")
        return named


def session_of(content: bytes, name: str, threads: int | None = None, *, shared: bool = False) -> Any:
    """ONNX Runtime's session for the content of a file, which can read no other file.

    Args:
        content: of the file.
        name: of it, for an error.
        threads: that one call uses; None: as many as there are cores.
        shared: see `OnnxRuntime`.

    Raises:
        FormatError: if it cannot be read.
    """
    ort = require("onnxruntime", extra="onnx")
    options = ort.SessionOptions()
    # Errors are raised; its remarks go to stderr by themselves.
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0" if shared else "1")
    with tempfile.TemporaryDirectory() as empty:
        # Weights that lie in other files would be looked for here.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", empty)
        try:
            return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # as in _run
            raise FormatError(f"{name} is no ONNX file that can be run, or is damaged: {_line(error)}") from None


def _manifest(session: Any) -> Manifest:
    text = session.get_modelmeta().custom_metadata_map.get(MANIFEST_KEY)
    if text is None:
        raise FormatError("it was not written by grood export: it has no manifest")
    manifest = Manifest.from_json(text)
    inputs = {one.name: one.type for one in session.get_inputs()}
    outputs = {one.name: one.type for one in session.get_outputs()}
    expected = _OUTPUTS | (_DECISIONS if manifest.calibration is not None else {})
    if inputs != {INPUT: _FLOAT} or any(outputs.get(name) != kind for name, kind in expected.items()):
        raise FormatError("its inputs and outputs are not those that grood export writes")
    return manifest


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
