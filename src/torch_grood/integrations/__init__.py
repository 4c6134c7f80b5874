"""GROOD inside other libraries: OpenOOD's evaluator, pytorch-ood's benchmarks, scikit-learn's pipelines.

Each module is imported by its own name, because each needs its own library:

>>> from torch_grood.integrations.openood import GROODPostprocessor  # doctest: +SKIP
>>> from torch_grood.integrations.pytorch_ood import GROODDetector  # doctest: +SKIP
>>> from torch_grood.integrations.scikit_learn import GROODFeatures  # doctest: +SKIP
"""

from __future__ import annotations

__all__: list[str] = []
