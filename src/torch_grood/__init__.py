"""torch-grood: gradient-aware out-of-distribution detection (GROOD) for any PyTorch classifier.

>>> from torch_grood import GROOD
>>> detector = GROOD(model).fit(train_loader).calibrate(held_out_loader, fpr=0.05)  # doctest: +SKIP
>>> detector.predict(images).is_ood  # doctest: +SKIP

The names below are imported when they are first used, so that `grood --help` need not wait for torch.
"""

from typing import TYPE_CHECKING

from torch_grood._lazy import importer
from torch_grood.errors import (
    AlteredFileError,
    FormatError,
    GroodError,
    MissingDependencyError,
    ModelMismatchError,
    NewerFormatError,
    NotFittedError,
    TruncatedFileError,
)

if TYPE_CHECKING:
    from torch_grood.detector import GROOD, Assessment, Prediction
    from torch_grood.explanation import Explanation
    from torch_grood.features import Extraction, FeatureExtractor
    from torch_grood.gradients import log_ood_probability, ood_gradient
    from torch_grood.neighbors import ClassSample, ExactIndex, FaissIndex, KCenterCoreset, StoreOptions
    from torch_grood.outliers import HighEnergy, Mixup, OutlierSamples, PrototypeMean, UniformNoise
    from torch_grood.prototypes import ClassPrototypes
    from torch_grood.state import FitInfo
    from torch_grood.threshold import ConformalThreshold, benjamini_hochberg

__version__ = "0.1.0"

__all__ = [
    "GROOD",
    "AlteredFileError",
    "Assessment",
    "ClassPrototypes",
    "ClassSample",
    "ConformalThreshold",
    "ExactIndex",
    "Explanation",
    "Extraction",
    "FaissIndex",
    "FeatureExtractor",
    "FitInfo",
    "FormatError",
    "GroodError",
    "HighEnergy",
    "KCenterCoreset",
    "MissingDependencyError",
    "Mixup",
    "ModelMismatchError",
    "NewerFormatError",
    "NotFittedError",
    "OutlierSamples",
    "Prediction",
    "PrototypeMean",
    "StoreOptions",
    "TruncatedFileError",
    "UniformNoise",
    "__version__",
    "benjamini_hochberg",
    "log_ood_probability",
    "ood_gradient",
]

_MODULE_OF = {
    "GROOD": "detector",
    "Assessment": "detector",
    "Prediction": "detector",
    "Explanation": "explanation",
    "Extraction": "features",
    "FeatureExtractor": "features",
    "log_ood_probability": "gradients",
    "ood_gradient": "gradients",
    "ClassSample": "neighbors",
    "ExactIndex": "neighbors",
    "FaissIndex": "neighbors",
    "KCenterCoreset": "neighbors",
    "StoreOptions": "neighbors",
    "HighEnergy": "outliers",
    "Mixup": "outliers",
    "OutlierSamples": "outliers",
    "PrototypeMean": "outliers",
    "UniformNoise": "outliers",
    "ClassPrototypes": "prototypes",
    "FitInfo": "state",
    "ConformalThreshold": "threshold",
    "benjamini_hochberg": "threshold",
}


__getattr__ = importer(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
