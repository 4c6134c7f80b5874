"""A fitted detector at work on images: the same decisions from PyTorch and from an ONNX file.

Batch jobs, the service and whoever watches a folder ask a `Runtime`, and need not know which one it is. The ONNX one
needs no torch.
"""

from typing import TYPE_CHECKING

from torch_grood._lazy import importer
from torch_grood.runtime.base import Decision, Decisions, Runtime, decide_each

if TYPE_CHECKING:
    from torch_grood.runtime.detector import DetectorRuntime
    from torch_grood.runtime.onnx import OnnxRuntime

__all__ = ["Decision", "Decisions", "DetectorRuntime", "OnnxRuntime", "Runtime", "decide_each"]

__getattr__ = importer(__name__, {"DetectorRuntime": "detector", "OnnxRuntime": "onnx"})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
