"""GROOD inside other libraries: `openood` for OpenOOD's evaluator, `pytorch_ood` for pytorch-ood's benchmarks.

Each module is imported by its own name, because each needs its own library:

>>> from torch_grood.integrations.openood import GROODPostprocessor  # doctest: +SKIP
>>> from torch_grood.integrations.pytorch_ood import GROODDetector  # doctest: +SKIP
"""

from __future__ import annotations

__all__: list[str] = []
