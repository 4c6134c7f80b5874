"""Laws of the detector, and Algorithms 1 and 2 against the plainest re-implementation, with 60 digits."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from models import MLP, batches, cnn, left_alone, patterns, taught_cnn, taught_mlp
from torch_grood import GROOD, FitInfo, Mixup, OutlierSamples, Prediction, PrototypeMean, UniformNoise
from torch_grood.errors import GroodError, ModelMismatchError, NotFittedError


def gaussians(n: int = 60, classes: int = 3, d: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (n, d) float32 around one centre a class, and labels."""
    centres = 3 * torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    return centres[labels] + torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), labels


def on_features(n: int = 60, **arguments: Any) -> GROOD:
    return GROOD(None, **arguments).fit_features(*gaussians(n))


# --- Algorithms 1 and 2, as plainly as they can be written ---------------------------------------------------------


class Oracle:
    """GROOD in 60 digits: lists and loops alone."""

    def __init__(self, features: Tensor, labels: Tensor, predictions: Tensor, ood: Tensor, classes: int) -> None:
        self.features = [self.exact(row) for row in features]
        self.prototypes = [
            self.mean([h for h, y in zip(self.features, labels.tolist(), strict=True) if y == c])
            for c in range(classes)
        ]
        self.ood = self.mean([self.exact(row) for row in ood])
        self.stored = {
            i: self.gradient(h) for i, h in enumerate(self.features) if int(labels[i]) == int(predictions[i])
        }

    @staticmethod
    def exact(row: Tensor) -> list[mpmath.mpf]:
        return [mpmath.mpf(value) for value in row.double().tolist()]

    @staticmethod
    def mean(rows: list[list[mpmath.mpf]]) -> list[mpmath.mpf]:
        return [mpmath.fsum(column) / len(rows) for column in zip(*rows, strict=True)]

    @staticmethod
    def distance(a: list[mpmath.mpf], b: list[mpmath.mpf]) -> mpmath.mpf:
        return mpmath.sqrt(mpmath.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)))

    def gradient(self, h: list[mpmath.mpf]) -> list[mpmath.mpf]:
        ood_distance = self.distance(h, self.ood)
        weights = [mpmath.exp(-self.distance(h, p)) for p in self.prototypes]
        pi = mpmath.exp(-ood_distance) / (mpmath.fsum(weights) + mpmath.exp(-ood_distance))
        return [pi * (x - p) / ood_distance for x, p in zip(h, self.ood, strict=True)]

    def score(self, row: Tensor) -> tuple[mpmath.mpf, int, mpmath.mpf]:
        """S(x), the training sample that attains it, and the sizes of the two gradients together."""
        gradient = self.gradient(self.exact(row))
        best = min(self.stored, key=lambda i: self.distance(gradient, self.stored[i]))
        zero = [mpmath.mpf(0)] * len(gradient)
        size = self.distance(gradient, zero) + self.distance(self.stored[best], zero)
        return self.distance(gradient, self.stored[best]), best, size


def oracle_data(scale: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    features, labels = gaussians(24, seed=seed)
    predictions = labels.clone()
    predictions[::5] = (predictions[::5] + 1) % 3
    generator = torch.Generator().manual_seed(seed + 1)
    ood = torch.randn(7, 5, generator=generator) + 1
    queries = torch.cat([gaussians(6, seed=seed + 2)[0], 6 * torch.randn(6, 5, generator=generator)])
    return scale * features, labels, predictions, scale * ood, scale * queries


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0, 100.0])
def test_scores_are_those_of_the_algorithm_at_every_feature_scale(scale: float, seed: int) -> None:
    features, labels, predictions, ood, queries = oracle_data(scale, seed)
    detector = GROOD(None).fit_features(features, labels, predictions, ood_features=ood)
    detector.calibrate_features(queries, fpr=0.5)
    log_scores = detector.log_score_features(queries)
    found = detector.predict_features(queries)
    with mpmath.workdps(60):
        oracle = Oracle(features, labels, predictions, ood, 3)
        for i, row in enumerate(queries):
            expected, neighbor, size = oracle.score(row)
            error = abs(mpmath.exp(mpmath.mpf(float(log_scores[i]))) - expected)
            # Directions are stored in float32: an error of 2^-24 of the gradients' size in each component.
            assert error <= 3e-7 * size
            # π near 1 beside gradients smaller by hundreds of orders: all training samples are equally far in 300 bits.
            nearest = oracle.distance(oracle.gradient(oracle.exact(row)), oracle.stored[int(found.neighbor[i])])
            assert int(found.neighbor[i]) == neighbor or nearest - expected <= 3e-7 * size
            assert scale > 1 or int(found.neighbor[i]) == neighbor
            if expected > 1e-280:
                assert float(found.score[i]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_scores_order_as_the_algorithm_says(scale: float) -> None:
    """At scale 100 the scores span hundreds of orders, and float64 holds few of them."""
    features, labels, predictions, ood, queries = oracle_data(scale, 3)
    detector = GROOD(None).fit_features(features, labels, predictions, ood_features=ood)
    order = detector.log_score_features(queries).argsort().tolist()
    with mpmath.workdps(60):
        oracle = Oracle(features, labels, predictions, ood, 3)
        true = [oracle.score(queries[i])[0] for i in order]
        for smaller, larger in itertools.pairwise(true):
            assert smaller <= larger * (1 + mpmath.mpf("1e-6"))
        if scale == 100.0:
            assert true[0] < mpmath.mpf("1e-30") * true[-1], "the test needs scores of very different size"


# --- Laws, on features ---------------------------------------------------------------------------------------------


def test_a_batch_of_one_is_a_batch_of_a_thousand_bit_for_bit() -> None:
    detector = on_features(200)
    queries = 4 * torch.randn(1000, 5, generator=torch.Generator().manual_seed(1))
    together = detector.log_score_features(queries)
    alone = torch.cat([detector.log_score_features(row[None]) for row in queries])
    in_parts = torch.cat([detector.log_score_features(part) for part in queries.split(77)])
    assert torch.equal(together, alone)
    assert torch.equal(together, in_parts)


@pytest.mark.parametrize("d", [64, 513])
def test_a_batch_of_one_is_a_batch_of_a_thousand_in_high_dimension(d: int) -> None:
    features, labels = gaussians(300, 10, d)
    detector = GROOD(None).fit_features(features, labels)
    queries = torch.randn(1000, d, generator=torch.Generator().manual_seed(1))
    together = detector.log_score_features(queries)
    some = range(0, 1000, 17)
    assert torch.equal(together[list(some)], torch.cat([detector.log_score_features(queries[i : i + 1]) for i in some]))


def test_permuting_the_training_samples_changes_no_bit() -> None:
    features, labels = gaussians(600, 3, 16)
    predictions = labels.clone()
    predictions[::7] = 0
    queries = 4 * torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    expected = GROOD(None).fit_features(features, labels, predictions).log_score_features(queries)
    for seed in range(4):
        order = torch.randperm(600, generator=torch.Generator().manual_seed(seed))
        found = GROOD(None).fit_features(features[order], labels[order], predictions[order])
        # Sums of float64 in another order.
        torch.testing.assert_close(found.log_score_features(queries), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            found.class_prototypes_,
            GROOD(None).fit_features(features, labels).class_prototypes_,
            rtol=1e-13,
            atol=1e-13,
        )


def test_permuting_the_classes_changes_nothing() -> None:
    features, labels = gaussians(300, 4, 16)
    queries = 4 * torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    ood = torch.randn(3, 16)
    expected = GROOD(None).fit_features(features, labels, ood_features=ood)
    for order in ([1, 0, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]):
        relabel = torch.tensor(order)
        found = GROOD(None).fit_features(features, relabel[labels], ood_features=ood)
        torch.testing.assert_close(
            found.log_score_features(queries), expected.log_score_features(queries), rtol=0, atol=1e-6
        )
        assert torch.equal(found.class_prototypes_[relabel], expected.class_prototypes_)


def test_fit_a_then_b_is_fit_b(tmp_path: Path) -> None:
    a, b = gaussians(60, 3, 5, seed=0), gaussians(45, 5, 8, seed=1)
    queries = torch.randn(10, 8)
    refitted = GROOD(None).fit_features(*a, ood_features=torch.randn(4, 5))
    refitted.calibrate_features(a[0] + 1, fpr=0.1)
    refitted.fit_features(*b)
    fresh = GROOD(None).fit_features(*b)
    assert refitted.threshold_ is None
    assert torch.equal(refitted.log_score_features(queries), fresh.log_score_features(queries))
    assert refitted.classes_ == fresh.classes_
    for name in ("n_samples", "n_indexed", "n_classes", "n_features", "outlier_source", "uses_ood_data", "n_outliers"):
        assert getattr(refitted.fit_info_, name) == getattr(fresh.fit_info_, name), name
    refitted.save(tmp_path / "a.grood")
    assert torch.equal(GROOD.load(tmp_path / "a.grood").log_score_features(queries), fresh.log_score_features(queries))


def test_fit_a_then_b_is_fit_b_on_a_model() -> None:
    model = taught_cnn()
    a, b = patterns(30, seed=1), patterns(45, seed=2)
    queries, _ = patterns(9, seed=3)
    refitted = GROOD(model).fit(batches(*a, 10)).calibrate(patterns(30, seed=4)[0])
    refitted.fit(batches(*b, 15))
    fresh = GROOD(model).fit(batches(*b, 15))
    assert refitted.threshold_ is None
    assert torch.equal(refitted.score(queries), fresh.score(queries))
    assert torch.equal(refitted.ood_prototype_, fresh.ood_prototype_)


@pytest.mark.parametrize("fails", ["labels", "features", "index"])
def test_a_failed_fit_keeps_the_old_state(fails: str) -> None:
    detector = on_features().calibrate_features(gaussians(60, seed=5)[0], fpr=0.1)
    queries, _ = gaussians(9, seed=7)
    before, text = detector.predict_features(queries), repr(detector)
    features, labels = gaussians(30, seed=6)
    predictions = labels.clone()
    if fails == "labels":
        labels[4] = -1
    elif fails == "features":
        features[4, 2] = torch.nan
    else:
        predictions = (labels + 1) % 3
    with pytest.raises(GroodError):
        detector.fit_features(features, labels, predictions)
    after = detector.predict_features(queries)
    assert repr(detector) == text
    for one, other in zip(before, after, strict=True):
        assert one is None or torch.equal(one, other)


def test_features_are_not_changed_and_not_kept_as_views() -> None:
    features, labels = gaussians()
    copy = features.clone()
    detector = GROOD(None).fit_features(features, labels)
    assert torch.equal(features, copy)
    queries, _ = gaussians(9, seed=7)
    before = detector.score_features(queries)
    features.zero_()
    labels.zero_()
    assert torch.equal(detector.score_features(queries), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_of_features(dtype: torch.dtype) -> None:
    features, labels = gaussians()
    features = features.to(dtype)
    detector = GROOD(None).fit_features(features, labels)
    queries = gaussians(9, seed=7)[0].to(dtype)
    expected = GROOD(None).fit_features(features.double(), labels).log_score_features(queries.double())
    assert torch.equal(detector.log_score_features(queries), expected)
    assert detector.score_features(queries).dtype == torch.float64
    assert (detector.score_features(features) == 0).all()


def test_numpy_and_lists_are_features_and_labels_too() -> None:
    features, labels = gaussians()
    expected = on_features().score_features(features[:7] + 1)
    for made in (
        GROOD(None).fit_features(features.numpy(), labels.numpy()),
        GROOD(None).fit_features(features.tolist(), labels.tolist()),
    ):
        torch.testing.assert_close(made.score_features((features[:7] + 1).numpy()), expected, rtol=1e-12, atol=0)


def test_a_sample_at_the_ood_prototype_has_a_finite_score() -> None:
    features, labels = gaussians()
    detector = GROOD(None).fit_features(features, labels, ood_features=torch.zeros(1, 5))
    score = detector.score_features(torch.zeros(1, 5))
    # Its gradient is the zero vector: S is the smallest norm stored.
    assert score.isfinite().all()
    assert float(score) == pytest.approx(float(detector._need_state().searcher.gradients.log_magnitude.min().exp()))


def test_a_class_of_one_sample_and_a_training_set_of_one_sample() -> None:
    features, _ = gaussians(5)
    detector = GROOD(None).fit_features(features, [0, 0, 0, 0, 1])
    assert torch.equal(detector.class_prototypes_[1], features[4].double())
    single = GROOD(None).fit_features(features[:1], [0], ood_features=features[1:])
    assert single.score_features(features).shape == (5,)


def test_training_samples_score_exactly_zero_and_calibration_refuses_them() -> None:
    features, labels = gaussians()
    predictions = labels.clone()
    predictions[:10] = (labels[:10] + 1) % 3
    detector = GROOD(None).fit_features(features, labels, predictions)
    scores = detector.score_features(features)
    assert (scores[10:] == 0).all()
    assert (scores[:10] > 0).all(), "wrongly classified samples are not stored"
    with pytest.raises(GroodError, match=r"60 of 60 calibration samples are training samples \(sample 0, sample 1, "):
        detector.calibrate_features(features, fpr=0.1)
    assert detector.threshold_ is None
    held_out = gaussians(60, seed=4)[0]
    detector.calibrate_features(torch.cat([held_out, features[5:15]]), fpr=0.1, on_training="drop")
    assert detector.threshold_ is not None
    assert detector.calibration_ is not None
    assert (detector.threshold_.n, detector.calibration_.n, detector.calibration_.n_left_out) == (60, 60, 10)
    expected = detector.log_score_features(held_out).sort().values
    assert torch.equal(detector.threshold_.log_scores, expected)
    with pytest.raises(GroodError, match="'raise' or 'drop', got 'ignore'"):
        detector.calibrate_features(held_out, on_training="ignore")  # type: ignore[arg-type]


def test_calibration_refuses_training_images_whatever_the_batch_size() -> None:
    model = taught_cnn(width=16)
    inputs, labels = patterns(60)
    detector = GROOD(model).fit(batches(inputs, labels, 20))
    for size in (20, 60, 7, 1):
        with pytest.raises(GroodError, match="60 of 60 calibration samples are training samples"):
            detector.calibrate(batches(inputs, labels, size), fpr=0.1)


def test_only_correct_samples_are_indexed_and_neighbor_is_the_position_in_the_training_set() -> None:
    features, labels = gaussians(60)
    predictions = labels.clone()
    predictions[[0, 1, 5, 30, 31]] = (labels[[0, 1, 5, 30, 31]] + 1) % 3
    detector = GROOD(None).fit_features(features, labels, predictions)
    assert detector.fit_info_.n_samples == 60
    assert detector.fit_info_.n_indexed == 55
    assert detector.fit_info_.classifier_accuracy == pytest.approx(55 / 60)
    # All samples, right or wrong, shape the prototypes.
    torch.testing.assert_close(detector.class_prototypes_[0], features[labels == 0].double().mean(0))
    detector.calibrate_features(gaussians(40, seed=3)[0], fpr=0.1)
    found = detector.predict_features(features, predictions)
    right = (predictions == labels).nonzero().flatten()
    assert torch.equal(found.neighbor[right], right)
    assert not set(found.neighbor.tolist()) & {0, 1, 5, 30, 31}
    assert found.label is not None
    assert torch.equal(found.label, predictions)


def test_prototype_accuracy_and_labels_by_brute_force() -> None:
    features, labels = gaussians(90, 3, 5)
    features = features + 2 * torch.randn(90, 5, generator=torch.Generator().manual_seed(2))
    detector = GROOD(None).fit_features(features, labels)
    means = torch.stack([features[labels == c].double().mean(0) for c in range(3)])
    nearest = torch.tensor([min(range(3), key=lambda c: float((h - means[c]).norm())) for h in features.double()])
    assert 0.3 < detector.fit_info_.prototype_accuracy < 1
    assert detector.fit_info_.prototype_accuracy == pytest.approx(float((nearest == labels).double().mean()))
    detector.calibrate_features(gaussians(40, seed=3)[0], fpr=0.1)
    assert torch.equal(detector.predict_features(features).prototype_label, nearest)


def test_predict_features_without_predictions_has_no_label() -> None:
    detector = on_features().calibrate_features(gaussians(40, seed=3)[0], fpr=0.1)
    found = detector.predict_features(gaussians(9, seed=5)[0])
    assert isinstance(found, Prediction)
    assert found.label is None
    for name in ("score", "p_value", "is_ood", "prototype_label", "neighbor"):
        assert getattr(found, name).shape == (9,), name
        assert getattr(found, name).device.type == "cpu"
    assert (found.score.dtype, found.p_value.dtype, found.is_ood.dtype) == (torch.float64, torch.float64, torch.bool)


@pytest.mark.parametrize("fpr", [0.02, 0.05, 0.1, 0.5, 0.9])
def test_the_decision_is_the_p_value_and_the_rate_is_kept_on_the_calibration_set(fpr: float) -> None:
    held_out = gaussians(99, seed=3)[0]
    detector = on_features().calibrate_features(held_out, fpr=fpr)
    queries = torch.cat([held_out, 5 * torch.randn(50, 5, generator=torch.Generator().manual_seed(0))])
    found = detector.predict_features(queries)
    assert torch.equal(found.is_ood, found.p_value <= fpr + 1e-12)
    assert torch.equal(found.score, detector.score_features(queries))
    assert float(found.is_ood[:99].double().mean()) <= fpr
    scores = detector.score_features(held_out)
    for score, p_value in zip(found.score, found.p_value, strict=True):
        assert float(p_value) == pytest.approx((1 + int((scores >= score).sum())) / 100)


def test_decisions_work_where_scores_underflow() -> None:
    features, labels = gaussians()
    held_out, queries = gaussians(99, seed=3)[0], 4 * torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    detector = GROOD(None).fit_features(5000 * features, labels).calibrate_features(5000 * held_out, fpr=0.1)
    found = detector.predict_features(5000 * queries)
    assert (detector.score_features(5000 * held_out) == 0).any(), "the test needs scores that underflow"
    assert detector.log_score_features(5000 * queries).isfinite().all()
    assert 0 < int(found.is_ood.sum()) < 40
    assert len(found.p_value.unique()) > 5


def test_string_classes_on_features() -> None:
    features, labels = gaussians(30)
    names = ["ship", "cat", "dog"]
    strings = [names[y] for y in labels.tolist()]
    detector = GROOD(None).fit_features(features, strings)
    assert list(detector.classes_) == ["cat", "dog", "ship"]
    torch.testing.assert_close(detector.class_prototypes_[2], features[labels == 0].double().mean(0))
    named = GROOD(None).fit_features(features, strings, classes=names)
    by_number = GROOD(None).fit_features(features, labels)
    assert list(named.classes_) == names
    assert torch.equal(named.class_prototypes_, by_number.class_prototypes_)
    queries = features[:5] + 1
    assert torch.equal(named.score_features(queries), by_number.score_features(queries))


def test_ood_features_are_used_by_their_mean_and_marked() -> None:
    features, labels = gaussians()
    ood = torch.randn(11, 5)
    detector = GROOD(None).fit_features(features, labels, ood_features=ood)
    torch.testing.assert_close(detector.ood_prototype_, ood.double().mean(0))
    assert detector.fit_info_.n_outliers == 11
    assert detector.fit_info_.uses_ood_data
    assert "uses OOD data" in repr(detector)


def test_number_of_threads_changes_no_bit() -> None:
    features, labels = gaussians(500, 10, 128)
    queries = torch.randn(300, 128, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(GROOD(None).fit_features(features, labels).log_score_features(queries))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_more_rows_than_one_block() -> None:
    features, labels = gaussians(9000, 3, 4)
    rows = [0, 8191, 8192, 8999]
    large = GROOD(None).fit_features(features, labels).calibrate_features(gaussians(40, 3, 4, seed=3)[0], fpr=0.1)
    assert large.predict_features(features[rows]).neighbor.tolist() == rows
    small = GROOD(None).fit_features(features[:30], labels[:30])
    assert torch.equal(small.score_features(features)[rows], small.score_features(features[rows]))


# --- On a model ----------------------------------------------------------------------------------------------------


SOURCES = [Mixup(n=20), UniformNoise(n=20), PrototypeMean()]


@pytest.mark.parametrize("outliers", SOURCES, ids=str)
def test_fit_on_a_model_is_fit_features_on_its_features(outliers: Any) -> None:
    model = taught_cnn()
    inputs, labels = patterns(60)
    labels[[2, 9, 40]] = (labels[[2, 9, 40]] + 1) % 3
    queries, _ = patterns(20, seed=5)
    whole = GROOD(model, outliers=outliers).fit(batches(inputs, labels, 20))
    found = whole.extract(batches(inputs, labels, 20))
    assert found.labels is not None
    assert torch.equal(found.labels, labels)
    parts = GROOD(None).fit_features(
        found.features, found.labels, found.logits.argmax(1), ood_features=whole.ood_prototype_[None]
    )
    assert torch.equal(parts.class_prototypes_, whole.class_prototypes_)
    assert torch.equal(parts.log_score_features(whole.extract(queries).features), whole.log_score(queries))
    for name in ("n_samples", "n_indexed", "n_classes", "n_features", "classifier_accuracy", "prototype_accuracy"):
        assert getattr(parts.fit_info_, name) == getattr(whole.fit_info_, name), name


def test_extract_is_the_models_features_and_logits() -> None:
    model = taught_mlp()
    inputs, labels = patterns(30, shape=(6,))
    found = GROOD(model).extract(batches(inputs, labels, 7))
    with torch.no_grad():
        torch.testing.assert_close(found.logits, model(inputs))
        torch.testing.assert_close(found.features, model.second(model.first(inputs).relu()).relu())
    assert found.labels is not None
    assert torch.equal(found.labels, labels)
    assert GROOD(model).extract(inputs).labels is None
    assert GROOD(model).extract([inputs]).labels is None


def test_fit_info_of_a_model() -> None:
    model = taught_cnn()
    inputs, labels = patterns(60)
    labels[[2, 9, 40]] = (labels[[2, 9, 40]] + 1) % 3
    detector = GROOD(model, outliers=Mixup(n=7, lam=0.4)).fit(batches(inputs, labels, 20))
    info = detector.fit_info_
    with torch.no_grad():
        right = int((model(inputs).argmax(1) == labels).sum())
    assert isinstance(info, FitInfo)
    assert (info.n_samples, info.n_indexed, info.n_classes, info.n_features) == (60, right, 3, 32)
    assert 50 < right < 60
    assert info.classifier_accuracy == pytest.approx(right / 60)
    assert (info.head, info.early_layer, info.image_shape, info.n_outliers) == ("8", "1", (3, 8, 8), 7)
    assert info.outlier_source == {"name": "Mixup", "n": 7, "lam": 0.4}
    assert (detector.head, detector.early_layer) == (None, None), "the constructor's arguments stay as given"


@pytest.mark.parametrize("size", [1, 7, 60, 1000])
@pytest.mark.parametrize("outliers", SOURCES, ids=str)
def test_batch_size_and_order_of_the_loader_do_not_matter(size: int, outliers: Any) -> None:
    model = taught_cnn()
    inputs, labels = patterns(60)
    queries, _ = patterns(20, seed=5)
    expected = GROOD(model, outliers=outliers).fit(batches(inputs, labels, 20)).log_score(queries)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    found = GROOD(model, outliers=outliers).fit(batches(inputs[order], labels[order], size)).log_score(queries)
    # The model itself rounds differently in another batch.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_neighbor_counts_left_out_samples_and_wrong_predictions() -> None:
    model = taught_cnn(4)
    inputs, labels = patterns(80, 4)
    with torch.no_grad():
        predictions = model(inputs).argmax(1)
    labels = predictions.clone()
    labels[[1, 3, 21, 43]] = 4 - labels[[1, 3, 21, 43]].clamp(1, 3)
    loader: list[Any] = [(inputs[:0], labels[:0]), *batches(inputs, labels, 11)]
    loader.insert(3, (inputs[:0], labels[:0]))
    detector = GROOD(model).fit(loader, classes=[1, 3]).calibrate(patterns(40, 4, seed=2)[0], fpr=0.2)
    taking_part = (labels == 1) | (labels == 3)
    indexed = (taking_part & (predictions == labels)).nonzero().flatten()
    assert detector.fit_info_.n_left_out == int((~taking_part).sum())
    assert detector.fit_info_.n_samples == int(taking_part.sum())
    assert detector.fit_info_.n_indexed == len(indexed)
    found = torch.cat([detector.predict(batch).neighbor for batch, _ in loader if len(batch)])
    assert torch.equal(found[indexed], indexed)
    assert set(found.tolist()) <= set(indexed.tolist())


class Named(Dataset[tuple[Tensor, int]]):
    """A data set with class names, as torchvision's."""

    classes = ("ant", "bee", "cow")

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.labels[index])


@pytest.mark.parametrize("chosen", [["ant", "cow"], [0, 2], ["cow", "ant"], [2, "ant"], ["ant", 0, 2]])
def test_classes_may_be_chosen_by_name_or_position(chosen: list[int | str]) -> None:
    model = taught_cnn()
    inputs, labels = patterns(60)
    detector = GROOD.paper(model).fit(DataLoader(Named(inputs, labels), batch_size=16), classes=chosen)
    assert detector.classes_ == ("ant", "bee", "cow")
    assert detector.fit_info_.n_classes == 2
    assert detector.fit_info_.n_left_out == 20
    features = detector.extract(inputs).features.double()
    expected = torch.stack([features[labels == c].mean(0) for c in (0, 2)])
    torch.testing.assert_close(detector.class_prototypes_, expected, rtol=1e-6, atol=1e-7)
    detector.calibrate(patterns(30, seed=1)[0], fpr=0.2)
    found = detector.predict(inputs)
    assert set(found.prototype_label.tolist()) == {0, 2}
    assert found.label is not None
    with torch.no_grad():
        assert torch.equal(found.label, model(inputs).argmax(1)), "the classifier may still say 'bee'"


def test_left_out_labels_may_be_of_any_class_but_must_be_in_range() -> None:
    model = taught_cnn()
    inputs, labels = patterns(30)
    labels[4] = 3
    with pytest.raises(GroodError, match="label 3 of sample 4 is out of range"):
        GROOD(model).fit([(inputs, labels)], classes=[0, 1])


def test_a_class_without_samples_is_left_out_by_name() -> None:
    model = taught_cnn()
    inputs, labels = patterns(30)
    two = labels != 1
    loader = DataLoader(Named(inputs[two], labels[two]), batch_size=8)
    with pytest.raises(GroodError, match=r"no training sample has label 1 \('bee'\); .*classes=\[…\]"):
        GROOD(model).fit(loader)
    assert GROOD(model).fit(loader, classes=["ant", "cow"]).fit_info_.n_samples == 20


@pytest.mark.parametrize("chosen", [["dog"], [3], [-1], ["ant", 7]])
def test_unknown_classes(chosen: list[Any]) -> None:
    loader = DataLoader(Named(*patterns(30)), batch_size=8)
    with pytest.raises(GroodError, match=r"is none of the classifier's 3 classes: \('ant', 'bee', 'cow'\)"):
        GROOD(taught_cnn()).fit(loader, classes=chosen)


@pytest.mark.parametrize("chosen", [[], 2, "ant"])
def test_classes_that_are_no_list_of_classes(request: pytest.FixtureRequest, chosen: Any) -> None:
    loader = DataLoader(Named(*patterns(30)), batch_size=8)
    with pytest.raises(GroodError):
        GROOD(taught_cnn()).fit(loader, classes=chosen)


def as_tuple(x: Tensor, y: Tensor) -> Any:
    return x, y


def as_list(x: Tensor, y: Tensor) -> Any:
    return [x, y]


def as_long_tuple(x: Tensor, y: Tensor) -> Any:
    return x, y, {"path": ["a.png"] * len(x)}


def as_hugging_face(x: Tensor, y: Tensor) -> Any:
    return {"pixel_values": x, "labels": y}


def as_openood(x: Tensor, y: Tensor) -> Any:
    return {"data": x, "label": y, "index": torch.arange(len(x))}


def as_list_labels(x: Tensor, y: Tensor) -> Any:
    return {"image": x, "target": y.tolist()}


def as_column_labels(x: Tensor, y: Tensor) -> Any:
    return x, y[:, None].to(torch.int16)


def as_numpy_labels(x: Tensor, y: Tensor) -> Any:
    return x, y.numpy()


@pytest.mark.parametrize(
    "form",
    [
        as_tuple, as_list, as_long_tuple, as_hugging_face, as_openood, as_list_labels, as_column_labels, as_numpy_labels
    ],
)  # fmt: skip
def test_forms_of_batches(form: Any) -> None:
    model = taught_cnn()
    inputs, labels = patterns(60)
    loader = [form(x, y) for x, y in batches(inputs, labels, 20)]
    held_out = [form(x, y) for x, y in batches(*patterns(60, seed=1), 20)]
    expected = GROOD(model).fit(batches(inputs, labels, 20)).calibrate(patterns(60, seed=1)[0])
    found = GROOD(model).fit(loader).calibrate(held_out)
    assert torch.equal(found.class_prototypes_, expected.class_prototypes_)
    torch.testing.assert_close(
        found.log_score(held_out), expected.log_score(patterns(60, seed=1)[0]), rtol=0, atol=1e-4
    )
    assert found.predict(held_out).is_ood.shape == (60,)
    extracted = found.extract(loader)
    assert extracted.labels is not None
    assert torch.equal(extracted.labels, labels)


def test_string_labels_name_the_classes_of_the_data_set() -> None:
    model = taught_cnn()
    data = Named(*patterns(60))

    class Strings(list[Any]):
        dataset = data

    names = [Named.classes[y] for y in data.labels.tolist()]
    loader = Strings([(data.inputs[i : i + 20], names[i : i + 20]) for i in range(0, 60, 20)])
    found = GROOD(model).fit(loader)
    assert torch.equal(
        found.class_prototypes_, GROOD(model).fit(batches(data.inputs, data.labels, 20)).class_prototypes_
    )
    with pytest.raises(GroodError, match=r"label 'ant' of sample 0 is not one of the classes \(0, 1, 2\)"):
        GROOD(model).fit(list(loader))


def test_extract_with_string_labels_gives_features_or_a_clear_error() -> None:
    inputs, _ = patterns(6)
    try:
        found = GROOD(taught_cnn()).extract([(inputs, ["ant", "bee", "cow"] * 2)])
    except GroodError:
        return
    assert found.features.shape == (6, 32)


def test_score_ignores_labels_of_every_kind() -> None:
    inputs, labels = patterns(30)
    detector = GROOD(taught_cnn()).fit(batches(inputs, labels, 10)).calibrate(patterns(30, seed=1)[0])
    queries, _ = patterns(10, seed=2)
    expected = detector.score(queries)
    for ignored in (None, ["x"] * 10, torch.full((10,), -1), torch.rand(10), "nonsense"):
        assert torch.equal(detector.score([(queries, ignored)]), expected)
        assert torch.equal(detector.predict([(queries, ignored)]).score, expected)


def test_a_tensor_is_scored_in_batches_and_a_loader_in_its_order() -> None:
    inputs, labels = patterns(30)
    detector = GROOD(taught_cnn()).fit(batches(inputs, labels, 10))
    queries, _ = patterns(600, seed=2)
    scores = detector.score(queries)
    assert scores.shape == (600,)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(detector.score(DataLoader(TensorDataset(queries), 64)), scores, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(detector.score(iter(queries.split(100))), scores, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(detector.log_score(queries).exp(), scores, rtol=1e-12, atol=0)


def test_batches_of_no_image_are_skipped() -> None:
    inputs, labels = patterns(30)
    empty = (inputs[:0], labels[:0])
    model = taught_cnn()
    loader = [empty, *batches(inputs, labels, 10), empty]
    detector = GROOD(model).fit(loader).calibrate([empty, *batches(*patterns(30, seed=1), 10), empty])
    expected = GROOD(model).fit(batches(inputs, labels, 10))
    queries, _ = patterns(10, seed=2)
    assert torch.equal(detector.score([empty, (queries, None), empty]), expected.score(queries))
    assert detector.fit_info_.n_samples == 30
    assert len(detector.extract(loader).features) == 30


def test_a_loader_that_fails_keeps_the_old_state() -> None:
    inputs, labels = patterns(30)
    model = taught_cnn()
    detector = GROOD(model).fit(batches(inputs, labels, 10)).calibrate(patterns(30, seed=1)[0])
    queries, _ = patterns(10, seed=2)
    before, text = detector.predict(queries), repr(detector)

    def broken() -> Iterator[Any]:
        yield inputs[:10] + 5, labels[:10]
        raise OSError("disk")

    for act in (detector.fit, detector.calibrate, detector.score):
        with pytest.raises(OSError, match="disk"):
            act(broken())
    after = detector.predict(queries)
    assert repr(detector) == text
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


def test_the_loader_is_read_once() -> None:
    inputs, labels = patterns(30)
    reads: list[int] = []

    def once() -> Iterator[Any]:
        for i, batch in enumerate(batches(inputs, labels, 10)):
            reads.append(i)
            yield batch

    GROOD(taught_cnn()).fit(once())
    assert reads == [0, 1, 2]


def test_scoring_never_mutates() -> None:
    inputs, labels = patterns(30)
    model = taught_cnn()
    detector = GROOD(model).fit(batches(inputs, labels, 10)).calibrate(patterns(30, seed=1)[0])
    queries, _ = patterns(10, seed=2)
    copy, state = queries.clone(), detector._learned.state
    with left_alone(model):
        first = detector.predict(queries)
        second = detector.predict(queries)
    assert detector._learned.state is state
    assert torch.equal(queries, copy)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


def test_two_detectors_on_one_model_do_not_meet() -> None:
    model = taught_cnn()
    a, b = patterns(30, seed=1), patterns(30, seed=2)
    first = GROOD(model, outliers=Mixup(n=5), seed=1).fit(batches(*a, 10))
    before = first.score(b[0])
    second = GROOD(model, outliers=PrototypeMean(), early_layer="4").fit(batches(*b, 10))
    assert torch.equal(first.score(b[0]), before)
    assert not torch.equal(second.score(a[0]), first.score(a[0]))


class Meeting(nn.Module):
    """A classifier in which two threads wait for each other before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.head = nn.Linear(12, 3)
        self.barrier: threading.Barrier | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        self.meet()
        z: Tensor = self.head(h)
        self.meet()
        return z

    def meet(self) -> None:
        """Wait for the other thread; a library that lets one thread in at a time breaks the barrier after a second."""
        if self.barrier is not None:
            with contextlib.suppress(threading.BrokenBarrierError):
                self.barrier.wait(timeout=1)


def test_two_threads_may_score_at_once() -> None:
    """A service scores in threads; each must get the features of its own images."""
    torch.manual_seed(0)
    model = Meeting()
    inputs, labels = patterns(30, shape=(6,))
    with torch.no_grad():
        labels[3:] = model(inputs[3:]).argmax(1)
    detector = GROOD(model, outliers=PrototypeMean()).fit(batches(inputs, labels, 10))
    queries = [patterns(4, shape=(6,), seed=seed)[0] for seed in (1, 2)]
    expected = [detector.score(query) for query in queries]
    found: dict[int, Any] = {}

    def score(i: int) -> None:
        try:
            found[i] = detector.score(queries[i])
        except Exception as error:
            found[i] = error

    model.barrier = threading.Barrier(2)
    threads = [threading.Thread(target=score, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert isinstance(found[i], Tensor), found[i]
        torch.testing.assert_close(found[i], expected[i], rtol=1e-5, atol=0)


# --- Life cycle ----------------------------------------------------------------------------------------------------


def test_before_fit_everything_says_so() -> None:
    detector = GROOD(taught_cnn())
    images, _ = patterns(4)
    features = torch.randn(4, 32)
    for act in (
        lambda: detector.score(images),
        lambda: detector.log_score(images),
        lambda: detector.predict(images),
        lambda: detector.calibrate(images),
        lambda: detector.score_features(features),
        lambda: detector.predict_features(features),
        lambda: detector.calibrate_features(features),
        lambda: detector.classes_,
        lambda: detector.class_prototypes_,
        lambda: detector.ood_prototype_,
        lambda: detector.fit_info_,
        lambda: detector.index_quality_,
        lambda: detector.save("never-written.grood"),
    ):
        with pytest.raises(NotFittedError, match=r"not fitted; call fit\(loader\) or fit_features"):
            act()
    assert not Path("never-written.grood").exists()
    assert "not fitted" in repr(detector)
    assert detector.threshold_ is None


def test_predict_before_calibrate_says_so_and_score_works() -> None:
    inputs, labels = patterns(30)
    detector = GROOD(taught_cnn()).fit(batches(inputs, labels, 10))
    assert "not calibrated" in repr(detector)
    assert detector.score(inputs).shape == (30,)
    for act in (lambda: detector.predict(inputs), lambda: detector.predict_features(torch.randn(4, 32))):
        with pytest.raises(NotFittedError, match=r"not calibrated.*calibrate\(held_out, fpr=0.05\).*score\(\)"):
            act()


def test_without_a_model_the_methods_for_images_say_what_to_use() -> None:
    inputs, labels = patterns(9)
    detector = on_features()
    detector.calibrate_features(gaussians(40, seed=2)[0], fpr=0.1)
    for act, name in (
        (lambda: detector.fit(batches(inputs, labels, 3)), "fit_features"),
        (lambda: detector.score(inputs), "score_features"),
        (lambda: detector.predict(inputs), "predict_features"),
        (lambda: detector.calibrate(inputs), "calibrate_features"),
    ):
        with pytest.raises(GroodError, match=rf"has no model; use .*{name}"):
            act()
    with pytest.raises(GroodError, match=r"has no model.*GROOD\(model\)"):
        detector.extract(inputs)
    assert detector.score_features(torch.randn(4, 5)).shape == (4,)


def test_head_without_a_model() -> None:
    with pytest.raises(GroodError, match="head and early_layer name modules of a model, and there is none"):
        GROOD(None, head="fc")


def test_everything_returns_self() -> None:
    inputs, labels = patterns(30)
    detector = GROOD(taught_cnn())
    assert detector.fit(batches(inputs, labels, 10)) is detector
    assert detector.calibrate(patterns(30, seed=1)[0]) is detector
    features, numbers = gaussians()
    detector = GROOD(None)
    assert detector.fit_features(features, numbers) is detector
    assert detector.calibrate_features(gaussians(30, seed=1)[0], fpr=0.1) is detector


@pytest.mark.parametrize("outliers", [*SOURCES, OutlierSamples([3 * torch.randn(9, 3, 8, 8)])], ids=str)
def test_save_and_load_give_the_same_bits(tmp_path: Path, outliers: Any) -> None:
    inputs, labels = patterns(60)
    model = taught_cnn()
    detector = GROOD(model, outliers=outliers, seed=5).fit(DataLoader(Named(inputs, labels), 20))
    detector.metadata = {"model": "mine", "numbers": [1, 2.5, None]}
    queries, _ = patterns(20, seed=5)
    for calibrated in (False, True):
        if calibrated:
            detector.calibrate(patterns(60, seed=1)[0], fpr=0.1)
        detector.save(tmp_path / "d.grood")
        with left_alone(model):
            loaded = GROOD.load(tmp_path / "d.grood", model)
        assert torch.equal(loaded.log_score(queries), detector.log_score(queries))
        assert loaded.fit_info_ == detector.fit_info_
        assert loaded.classes_ == detector.classes_ == ("ant", "bee", "cow")
        assert loaded.metadata == detector.metadata
        assert loaded.seed == 5
        if calibrated:
            for one, other in zip(loaded.predict(queries), detector.predict(queries), strict=True):
                assert torch.equal(one, other)  # type: ignore[arg-type]
        else:
            assert loaded.threshold_ is None
        without = GROOD.load(tmp_path / "d.grood")
        features = detector.extract(queries).features
        assert torch.equal(without.log_score_features(features), detector.log_score(queries))
    if not outliers.uses_ood_data:
        again = loaded.fit(DataLoader(Named(inputs, labels), 20))
        assert torch.equal(again.log_score(queries), detector.log_score(queries)), "a loaded detector fits the same"


def test_a_detector_of_another_model(tmp_path: Path) -> None:
    inputs, labels = patterns(30)
    model = taught_cnn()
    GROOD(model).fit(batches(inputs, labels, 10)).save(tmp_path / "d.grood")
    with pytest.raises(ModelMismatchError, match="same architecture with other weights; load the weights"):
        GROOD.load(tmp_path / "d.grood", taught_cnn(seed=1))
    for other in (cnn(width=9), MLP(), taught_cnn().half()):
        with pytest.raises(ModelMismatchError, match=r"fitted on another model.*Pass the model"):
            GROOD.load(tmp_path / "d.grood", other)
    assert GROOD.load(tmp_path / "d.grood", taught_cnn().train()).score(inputs).shape == (30,)
    assert GROOD.load(tmp_path / "d.grood", nn.DataParallel(model)).score(inputs).shape == (30,)
    on_features().save(tmp_path / "f.grood")
    with pytest.raises(ModelMismatchError, match="fitted on features, without a model"):
        GROOD.load(tmp_path / "f.grood", model)


def test_load_on_a_compiled_submodule(tmp_path: Path) -> None:
    """Compiling a part of the model changes the names in its state dict, not the model."""
    inputs, labels = patterns(30)
    plain = nn.Sequential(taught_cnn()[:8], taught_cnn()[8])
    GROOD(plain).fit(batches(inputs, labels, 10)).save(tmp_path / "d.grood")
    compiled = nn.Sequential(torch.compile(plain[0], backend="eager"), plain[1])
    assert GROOD.load(tmp_path / "d.grood", compiled).score(inputs).shape == (30,)


# --- Progress and what is said -------------------------------------------------------------------------------------


def test_progress_callable_sees_every_loop() -> None:
    inputs, labels = patterns(30)
    seen: list[int] = []

    def progress(iterable: Iterable[Any]) -> Iterator[Any]:
        seen.append(0)
        for item in iterable:
            seen[-1] += 1
            yield item

    detector = GROOD(taught_cnn(), outliers=Mixup(n=25)).fit(batches(inputs, labels, 10), progress=progress)
    assert seen == [3, 3], "the pass, then the mixing in batches of 10"
    detector.calibrate(batches(*patterns(30, seed=1), 10), progress=progress)
    detector.score(batches(inputs, labels, 6), progress=progress)
    detector.predict(batches(inputs, labels, 15), progress=progress)
    detector.extract(batches(inputs, labels, 30), progress=progress)
    assert seen == [3, 3, 3, 5, 2, 1]


def test_no_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    inputs, labels = patterns(30)
    GROOD(taught_cnn()).fit(batches(inputs, labels, 10))
    GROOD(taught_cnn()).fit(batches(inputs, labels, 10), progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("outliers", SOURCES, ids=str)
def test_memory_is_stated_once_before_the_pass_goes_on(caplog: pytest.LogCaptureFixture, outliers: Any) -> None:
    inputs, labels = patterns(60)
    said_at: list[int] = []

    class Loader(list[Any]):
        dataset = inputs

        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                said_at.append(sum("fit keeps" in record.getMessage() for record in caplog.records))
                yield batch

    loader = Loader([(inputs[:0], labels[:0]), *batches(inputs, labels, 10)])
    with caplog.at_level(logging.INFO, logger="torch_grood"):
        GROOD(taught_cnn(), outliers=outliers).fit(loader)
    messages = [record.getMessage() for record in caplog.records if "fit keeps" in record.getMessage()]
    assert len(messages) == 1
    assert "60 x 32 features" in messages[0]
    assert said_at == [0, 0, 1, 1, 1, 1, 1]


def test_memory_statement_without_a_length(caplog: pytest.LogCaptureFixture) -> None:
    inputs, labels = patterns(60)
    with caplog.at_level(logging.INFO, logger="torch_grood"):
        GROOD(taught_cnn()).fit(iter(batches(inputs, labels, 10)))
    assert "fit keeps 128 bytes a sample (32 features)" in caplog.text
    assert "does not tell its length" in caplog.text


def test_repr() -> None:
    inputs, labels = patterns(30)
    detector = GROOD(taught_cnn(), seed=3)
    assert (
        repr(detector)
        == "GROOD(Sequential, outliers=HighEnergy(n=None, shrink=0.5), index='exact', seed=3; not fitted)"
    )
    detector.fit(batches(inputs, labels, 10)).calibrate(patterns(30, seed=1)[0], fpr=0.1)
    assert repr(detector).endswith("fitted on 30 samples of 3 classes, calibrated at fpr=0.1)")
