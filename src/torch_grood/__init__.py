"""torch-grood: gradient-aware out-of-distribution detection (GROOD) for any PyTorch classifier.

>>> from torch_grood import GROOD
>>> detector = GROOD(model).fit(train_loader).calibrate(held_out_loader, fpr=0.05)  # doctest: +SKIP
>>> detector.predict(images).is_ood  # doctest: +SKIP
"""

from torch_grood.detector import GROOD, Prediction
from torch_grood.errors import FormatError, GroodError, MissingDependencyError, ModelMismatchError, NotFittedError
from torch_grood.features import Extraction, FeatureExtractor
from torch_grood.gradients import log_ood_probability, ood_gradient
from torch_grood.neighbors import ExactIndex, FaissIndex
from torch_grood.outliers import Mixup, OutlierSamples, PrototypeMean, UniformNoise
from torch_grood.prototypes import ClassPrototypes
from torch_grood.state import FitInfo
from torch_grood.threshold import ConformalThreshold

__version__ = "0.1.0"

__all__ = [
    "GROOD",
    "ClassPrototypes",
    "ConformalThreshold",
    "ExactIndex",
    "Extraction",
    "FaissIndex",
    "FeatureExtractor",
    "FitInfo",
    "FormatError",
    "GroodError",
    "MissingDependencyError",
    "Mixup",
    "ModelMismatchError",
    "NotFittedError",
    "OutlierSamples",
    "Prediction",
    "PrototypeMean",
    "UniformNoise",
    "__version__",
    "log_ood_probability",
    "ood_gradient",
]
