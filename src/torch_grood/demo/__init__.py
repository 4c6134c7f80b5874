"""``grood demo``: GROOD from training to decision on real images that need no download, in seconds on a CPU.

A small CNN learns the handwritten digits 0 to 5; GROOD is fitted and calibrated on it and then meets the digits 6 to 9
(near-OOD), tiles of photographs and noise (far-OOD). The extra ``bench`` is needed, except for `DigitsCNN`.
"""

from __future__ import annotations

from torch_grood.demo.network import DigitsCNN
from torch_grood.demo.run import DemoResult, FalseAlarms, run_demo

__all__ = ["DemoResult", "DigitsCNN", "FalseAlarms", "run_demo"]
