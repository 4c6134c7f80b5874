"""One ONNX file: the graph, its weights and gradients, and the manifest in its metadata."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torch_grood import GROOD
from torch_grood._files import replacing
from torch_grood._optional import require
from torch_grood.data.transforms import ImageTransform
from torch_grood.errors import GroodError
from torch_grood.export.prepared import Prepared, prepare, reason_of
from torch_grood.runtime.manifest import MANIFEST_KEY
from torch_grood.runtime.onnx import INPUT, session_of

__all__ = ["export_onnx"]

# Protocol buffers end at 2 GiB; the operations themselves take little.
_MOST_BYTES = 2**31 - 2**25


def export_onnx(
    detector: GROOD, path: str | os.PathLike[str], transform: ImageTransform, *, fpr: float | None = None
) -> None:
    """Write a detector, its model and its decision as one ONNX file.

    The graph takes `image`, prepared, float32 (n, 3, H, W), and gives `label`, `prototype_label`, `log_score`, `score`,
    `neighbor` and, of a calibrated detector, `p_value` and `is_ood`, each (n,): the fields of `Prediction`. It searches
    all gradients that the detector holds exactly, whichever index the detector has. `torch_grood.runtime.OnnxRuntime`
    runs it without torch.

    Args:
        detector: fitted, with its model.
        path: of the file, which is replaced if it is there.
        transform: of its images.
        fpr: another false-alarm rate than the calibration's.

    Raises:
        GroodError: if the model cannot be exported, the file would be larger than 2 GiB, the rate cannot be promised,
            or what was exported gives other scores than the detector.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, extra="export")
    prepared = prepare(detector, transform, fpr)
    if prepared.nbytes > _MOST_BYTES:
        raise GroodError(
            f"the model and {prepared.manifest.n_stored:,} gradients take {prepared.nbytes / 2**30:.1f} GiB, and an "
            "ONNX file ends at 2 GiB. Fit with fewer gradients (grood fit --per-class or --coreset), or rounded ones "
            "(--store float16 or int8)"
        )
    program = _traced(prepared)
    program.model.metadata_props[MANIFEST_KEY] = prepared.manifest.to_json()
    with replacing(Path(path)) as temporary:
        program.save(str(temporary), external_data=False)
        session = session_of(temporary.read_bytes(), str(path))

        def run(images: Tensor) -> Sequence[Tensor]:
            return [torch.from_numpy(found) for found in session.run(list(prepared.names), {INPUT: images.numpy()})]

        prepared.compare(run)


def _traced(prepared: Prepared) -> torch.onnx.ONNXProgram:
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                prepared.module,
                (prepared.example,),
                input_names=[INPUT],
                output_names=list(prepared.names),
                dynamic_shapes=(prepared.dynamic,),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    # Of torch's tracer, its translation to ONNX, and the model's own code under a trace.
    except Exception as error:
        raise GroodError(f"the model cannot be exported to ONNX: {reason_of(error)}") from error
    assert program is not None
    for node in program.model.graph.all_nodes():
        # Where each came from in the source code, with the paths of this machine.
        node.metadata_props.clear()
        node.doc_string = None
    return program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracer's remarks about its own workings."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
