"""A detector, its model and its decision in one file for other programs: ONNX, or a graph of `torch.export`.

Both hold the same operations, traced from `DetectorModule`, and a manifest with the preprocessing and what the numbers
mean. What was written is run on images before it takes its place, and compared with the detector.
"""

from torch_grood.export.onnx_file import export_onnx
from torch_grood.export.program_file import export_program

__all__ = ["export_onnx", "export_program"]
