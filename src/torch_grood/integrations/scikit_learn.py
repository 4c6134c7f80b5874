"""GROOD on features from anywhere, as an estimator of scikit-learn: text, sound, tables, embeddings of any kind.

    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> detector = make_pipeline(StandardScaler(), GROODFeatures(LogisticRegression(), fpr=0.05))
    >>> detector.fit(X, y).predict(X_new)  # 1: known, -1: unknown  # doctest: +SKIP

The conventions are those of scikit-learn's outlier detectors: a higher score is more normal, 1 is an inlier and -1 an
outlier. Unlike these, it knows classes, and its threshold keeps a promise: a part of what `fit` gets is held out, and
of samples like these at most the share `fpr` is called an outlier, on average (`torch_grood.threshold`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from torch_grood._optional import require
from torch_grood.detector import GROOD
from torch_grood.errors import GroodError, NotFittedError
from torch_grood.integrations._settings import finite
from torch_grood.neighbors import GradientIndex
from torch_grood.outliers import HighEnergy, OutlierSource, PrototypeMean

require("sklearn", extra="sklearn")

from sklearn.base import BaseEstimator, clone  # noqa: E402
from sklearn.model_selection import train_test_split  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_is_fitted, validate_data  # noqa: E402

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["GROODFeatures"]


class GROODFeatures(BaseEstimator):  # type: ignore[misc]
    """GROOD on feature vectors and their classes.

    Args:
        classifier: of scikit-learn's kind, fitted on the samples that are not held out; a `FrozenEstimator` is taken as
            it is. Gradients of samples that it takes for another class are not stored, and the samples that it is least
            sure of give the OOD prototype. None: all are stored, and the prototype is the mean of the classes'.
        outliers: another source of the OOD prototype; None: `HighEnergy()` with a classifier that tells how sure it is,
            else `PrototypeMean()`.
        fpr: share of known samples that may be called outliers, on average.
        calibration: share of the samples that is held out for the threshold, of each class alike; None: there is no
            threshold, and `score_samples` alone can be asked.
        index: see `GROOD`, as are the others.
        geometry: see `GROOD`.
        temperature: see `GROOD`.
        k: see `GROOD`.
        random_state: seed of what is held out, and of everything else that is random.

    Attributes:
        detector_: the fitted `GROOD`, with all that it can do: save, explain, other rates.
        classifier_: the fitted classifier; None without one.
        classes_: (C,), sorted.
        n_features_in_: dimension of a sample.
        offset_: of `decision_function`, -log τ; 0 without a threshold.
    """

    def __init__(
        self,
        classifier: Any = None,
        *,
        outliers: OutlierSource | None = None,
        fpr: float = 0.05,
        calibration: float | None = 0.2,
        index: str | GradientIndex = "exact",
        geometry: str | None = None,
        temperature: float | None = None,
        k: int | None = None,
        random_state: int = 0,
    ) -> None:
        self.classifier = classifier
        self.outliers = outliers
        self.fpr = fpr
        self.calibration = calibration
        self.index = index
        self.geometry = geometry
        self.temperature = temperature
        self.k = k
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike | None = None) -> Self:
        """Fit on samples (n, d) and their classes (n,).

        Raises:
            GroodError: without classes; if too few samples are held out to promise `fpr`; as `GROOD.fit_features`.
            ValueError: for what scikit-learn refuses: NaN, other shapes.
        """
        if y is None:
            raise GroodError("requires y to be passed, but the target y is None; GROOD needs the samples' classes")
        features, targets = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(targets)
        classes, codes = np.unique(targets, return_inverse=True)
        train, held_out = self._split(codes)
        predictions, logits, classifier = self._classify(features[train], targets[train], classes)
        source = self.outliers or (PrototypeMean() if logits is None else HighEnergy())
        detector = GROOD(
            None,
            outliers=source,
            index=self.index,
            seed=self.random_state,
            geometry=self.geometry,
            temperature=self.temperature,
            k=self.k,
        )
        if features.shape[1] == 1 and detector.settings.geometry == "unit":
            raise GroodError("n_features=1: a single feature has no direction to tell samples by; pass geometry='raw'")
        detector.fit_features(
            torch.tensor(features[train]),
            torch.tensor(codes[train]),
            predictions,
            logits=logits if isinstance(source, HighEnergy) else None,
            classes=[name.item() if isinstance(name, np.integer) else str(name) for name in classes],
        )
        if held_out is not None:
            # Tables have equal rows; without those that were fitted on, the threshold errs on the safe side.
            try:
                detector.calibrate_features(torch.tensor(features[held_out]), self.fpr, on_training="drop")
            except GroodError as error:
                raise GroodError(
                    f"{error} Of {len(features)} samples, calibration={self.calibration} holds these out."
                ) from None
        self.detector_, self.classifier_, self.classes_ = detector, classifier, classes
        self.offset_ = 0.0 if detector.threshold_ is None else -_log_tau(detector)
        return self

    def score_samples(self, X: ArrayLike) -> NDArray[np.float64]:
        """-log S(x) of samples (n, d), float64 (n,): the lower, the more abnormal."""
        check_is_fitted(self)
        scores: NDArray[np.float64] = -finite(self.detector_.log_score_features(self._checked(X))).numpy()
        return scores

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """`score_samples` less its threshold, float64 (n,): negative for outliers.

        Raises:
            NotFittedError: if nothing was held out.
        """
        self._need_threshold()
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """1 for known samples, -1 for outliers, int64 (n,); errors as `decision_function`."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def p_values(self, X: ArrayLike) -> NDArray[np.float64]:
        """Conformal p-values, float64 (n,); of known samples at most a share α has p ≤ α, on average.

        Raises:
            NotFittedError: if nothing was held out.
        """
        self._need_threshold()
        found = self.detector_.predict_features(self._checked(X)).p_value
        assert found is not None
        p_values: NDArray[np.float64] = found.numpy()
        return p_values

    # Not `OutlierMixin`: it would bring fit_predict(X), which knows no classes, and a training sample's score is 0.
    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.estimator_type = "outlier_detector"
        tags.target_tags.required = True
        return tags

    def _checked(self, X: ArrayLike) -> torch.Tensor:
        return torch.tensor(validate_data(self, X, dtype=[np.float64, np.float32], reset=False))

    def _split(self, codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Positions of the samples to fit on, and of those held out."""
        rows = np.arange(len(codes))
        if self.calibration is None:
            return rows, None
        if not 0 < self.calibration < 1:
            raise GroodError(
                f"calibration is the share of samples that is held out, in (0, 1); got {self.calibration!r}"
            )
        train, held_out = train_test_split(
            rows, test_size=self.calibration, random_state=self.random_state, stratify=codes
        )
        return train, held_out

    def _classify(
        self, X: NDArray[Any], y: NDArray[Any], classes: NDArray[Any]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, Any]:
        """What the classifier says of the samples: its classes, and how sure it is, where it tells."""
        if self.classifier is None:
            return None, None, None
        classifier = clone(self.classifier).fit(X, y)
        if not np.array_equal(classifier.classes_, classes):
            raise GroodError(f"the classifier knows the classes {classifier.classes_}, and y has {classes}")
        predictions = torch.tensor(np.searchsorted(classes, classifier.predict(X)))
        logits = None
        if hasattr(classifier, "predict_proba"):
            with np.errstate(divide="ignore"):
                logits = torch.tensor(np.log(classifier.predict_proba(X)).clip(-1e4))
        return predictions, logits, classifier

    def _need_threshold(self) -> None:
        check_is_fitted(self)
        if self.detector_.threshold_ is None:
            raise NotFittedError("nothing was held out for a threshold; fit with calibration=0.2, or use score_samples")


def _log_tau(detector: GROOD) -> float:
    assert detector.threshold_ is not None
    return float(finite(torch.tensor(detector.threshold_.log_tau, dtype=torch.float64)))
