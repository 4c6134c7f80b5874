"""`GROODFeatures` keeps scikit-learn's conventions, GROOD's scores and the threshold's promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

from torch_grood import GROOD, HighEnergy, PrototypeMean
from torch_grood.errors import GroodError, NotFittedError
from torch_grood.integrations.scikit_learn import GROODFeatures

Arrays = tuple[NDArray[np.float64], NDArray[np.int64]]


def blobs(n: int = 400, seed: int = 0) -> Arrays:
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    centres = 4 * np.random.default_rng(99).standard_normal((4, 6))
    return centres[labels] + generator.standard_normal((n, 6)), labels


@pytest.mark.parametrize("classifier", [None, LogisticRegression()])
def test_scikit_learns_own_checks(classifier: Any) -> None:
    # Their data sets are small, so that a small rate could not be promised.
    estimator = GROODFeatures(classifier, fpr=0.5, calibration=0.4)
    # An outlier detector of theirs is fitted without classes, which this one needs.
    without_classes = {"check_outliers_train": "fits without y"}
    found = check_estimator(estimator, on_fail=None, on_skip=None, expected_failed_checks=without_classes)
    failed = [f"{one['check_name']}: {one['exception']!r:.300}" for one in found if one["status"] == "failed"]
    assert failed == []
    assert sum(one["status"] == "passed" for one in found) > 40


def test_scores_and_decisions_are_those_of_grood() -> None:
    X, y = blobs()
    estimator = GROODFeatures(random_state=3).fit(X, y)
    train, held_out = train_test_split(np.arange(len(X)), test_size=0.2, random_state=3, stratify=y)
    expected = GROOD(None, seed=3).fit_features(torch.tensor(X[train]), torch.tensor(y[train]))
    expected.calibrate_features(torch.tensor(X[held_out]), fpr=0.05)
    new = np.concatenate([blobs(200, seed=1)[0], 30 * np.ones((5, 6))])
    found = expected.predict_features(torch.tensor(new))
    assert np.array_equal(estimator.score_samples(new), -expected.log_score_features(torch.tensor(new)).numpy())
    assert np.array_equal(estimator.predict(new) == -1, found.is_ood.numpy())
    assert found.p_value is not None
    assert np.array_equal(estimator.p_values(new), found.p_value.numpy())
    assert set(estimator.predict(new)) == {-1, 1}
    assert np.array_equal(estimator.decision_function(new) < 0, estimator.predict(new) == -1)


def test_a_classifier_tells_which_samples_are_stored_and_which_are_uncertain() -> None:
    X, y = blobs()
    wrong = np.flatnonzero(y == 0)[:20]
    y[wrong] = 1
    plain = GROODFeatures().fit(X, y).detector_
    estimator = GROODFeatures(LogisticRegression(C=0.01)).fit(X, y)
    assert isinstance(plain.outliers, PrototypeMean)
    assert isinstance(estimator.detector_.outliers, HighEnergy)
    assert plain.fit_info_.n_indexed == plain.fit_info_.n_samples == 320
    assert estimator.detector_.fit_info_.n_indexed < 320
    # The held-out samples were not for the classifier either.
    train, _ = train_test_split(np.arange(len(X)), test_size=0.2, random_state=0, stratify=y)
    again = LogisticRegression(C=0.01).fit(X[train], y[train])
    assert np.array_equal(estimator.classifier_.coef_, again.coef_)
    assert estimator.classifier is not estimator.classifier_


def test_a_fitted_classifier_stays_as_it_is_and_one_without_probabilities_will_do() -> None:
    X, y = blobs()
    fitted = LogisticRegression().fit(X[:50], y[:50])
    coefficients = fitted.coef_.copy()
    estimator = GROODFeatures(FrozenEstimator(fitted)).fit(X, y)
    assert np.array_equal(estimator.classifier_.coef_, coefficients)
    assert isinstance(GROODFeatures(LinearSVC()).fit(X, y).detector_.outliers, PrototypeMean)


def test_names_of_classes_and_a_file(tmp_path: Path) -> None:
    X, numbers = blobs()
    y = np.array(["cat", "dog", "emu", "fox"])[numbers]
    estimator = GROODFeatures(LogisticRegression()).fit(X, y)
    assert estimator.detector_.classes_ == ("cat", "dog", "emu", "fox")
    estimator.detector_.save(tmp_path / "x.grood")
    again = GROOD.load(tmp_path / "x.grood")
    assert np.array_equal(-again.log_score_features(torch.tensor(X[:9])).numpy(), estimator.score_samples(X[:9]))


def test_it_is_cloned_and_searched_over_in_a_pipeline() -> None:
    X, y = blobs()
    pipeline = make_pipeline(StandardScaler(), GROODFeatures(k=3))
    copy = clone(pipeline)
    assert copy[-1].get_params()["k"] == 3
    assert not hasattr(copy[-1], "detector_")

    def least_false_alarms(fitted: Any, features: Any, labels: Any) -> float:
        return float((fitted.predict(features) == 1).mean())

    search = GridSearchCV(pipeline, {"groodfeatures__fpr": [0.05, 0.4]}, scoring=least_false_alarms, cv=3).fit(X, y)
    assert search.best_params_ == {"groodfeatures__fpr": 0.05}


def test_the_promise_on_digits_and_beside_a_detector_without_classes() -> None:
    X, y = load_digits(return_X_y=True)
    known, unknown = y < 6, X[y >= 6]
    alarms, areas = [], {"grood": [], "lof": []}
    for seed in range(8):
        parts = train_test_split(X[known], y[known], test_size=0.3, random_state=seed, stratify=y[known])
        X_train, X_test, y_train, _ = parts
        for name, estimator in (("grood", GROODFeatures(random_state=seed)), ("lof", LocalOutlierFactor(novelty=True))):
            fitted = make_pipeline(StandardScaler(), estimator).fit(X_train, y_train)
            scores = np.concatenate([fitted.score_samples(X_test), fitted.score_samples(unknown)])
            areas[name].append(roc_auc_score(np.arange(len(scores)) < len(X_test), scores))
            if name == "grood":
                alarms.append(float((fitted.predict(X_test) == -1).mean()))
    # 151 held-out samples a time: their false-alarm rate has a standard deviation of 0.018, the mean of 8 of 0.006.
    assert 0.02 < np.mean(alarms) < 0.07
    assert np.mean(areas["grood"]) > np.mean(areas["lof"]) + 0.01 > 0.9


def test_what_cannot_work_says_so() -> None:
    X, y = blobs(100)
    with pytest.raises(GroodError, match="needs the samples' classes"):
        GROODFeatures().fit(X)
    with pytest.raises(GroodError, match=r"from 20 calibration samples.*Of 100 samples, calibration=0.2 holds these"):
        GROODFeatures(fpr=0.01).fit(X, y)
    with pytest.raises(GroodError, match=r"calibration is the share of samples.*got 1.5"):
        GROODFeatures(calibration=1.5).fit(X, y)
    with pytest.raises(GroodError, match="the classifier knows the classes"):
        GROODFeatures(FrozenEstimator(LogisticRegression().fit(X[y < 3], y[y < 3]))).fit(X, y)
    with pytest.raises(GroodError, match="n_features=1"):
        GROODFeatures(LogisticRegression()).fit(X[:, :1], y)
    without = GROODFeatures(calibration=None).fit(X, y)
    assert without.score_samples(X[:3]).shape == (3,)
    assert without.detector_.fit_info_.n_samples == 100
    for ask in (without.predict, without.decision_function, without.p_values):
        with pytest.raises(NotFittedError, match="nothing was held out"):
            ask(X)


def test_a_copy_of_a_training_sample_has_a_finite_score() -> None:
    X, y = blobs()
    estimator = GROODFeatures(calibration=None).fit(X, y)
    scores = estimator.score_samples(X)
    assert np.isfinite(scores).all()
    assert (scores > 1e38).all()
