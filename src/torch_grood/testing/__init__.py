"""What any detector of out-of-distribution inputs owes its users, as checks that run.

    from torch_grood.testing import check_detector

    check_detector(lambda model: GROOD(model))

A detector is what has `fit` and `score`, and perhaps `calibrate` with `predict`, and `save` with `load`; for images,
or with the ending `_features` for penultimate features. The laws hold whatever the method, so that a detector by
others can be run through them as well. docs/contract.md lists them.

This module loads nothing but the core; it draws its own tiny data and classifier, and writes to a temporary folder.
"""

from torch_grood.testing.clause import BrokenContractError
from torch_grood.testing.suite import CheckResult, check_detector, detector_checks

__all__ = ["BrokenContractError", "CheckResult", "check_detector", "detector_checks"]
