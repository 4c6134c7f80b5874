"""Ways to decide with one calibration, what is known without one, and what a detector remembers of its data."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models import batches, left_alone, patterns, taught_cnn
from torch_grood import GROOD, ConformalThreshold, GroodError, ModelMismatchError, NotFittedError, benjamini_hochberg
from torch_grood.provenance import content_hashes


def gaussians(n: int, seed: int, classes: int = 4, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    centres = 3 * torch.randn(classes, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    return centres[labels] + spread * torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), labels


HELD_OUT = gaussians(199, 2)[0]
QUERIES = torch.cat([gaussians(300, 3)[0], 6 * torch.randn(40, 8, generator=torch.Generator().manual_seed(4))])


@pytest.fixture
def detector() -> GROOD:
    return GROOD(None).fit_features(*gaussians(160, 1)).calibrate_features(HELD_OUT, fpr=0.1)


# --- Operating points ---------------------------------------------------------------------------------------------


def test_other_rates_from_the_same_calibration(detector: GROOD) -> None:
    for fpr in (0.005, 0.01, 0.05, 0.1, 0.5):
        again = GROOD(None).fit_features(*gaussians(160, 1)).calibrate_features(HELD_OUT, fpr=fpr)
        here, there = detector.predict_features(QUERIES, fpr=fpr), again.predict_features(QUERIES)
        assert torch.equal(here.is_ood, there.is_ood)
        assert here.p_value is not None
        assert torch.equal(here.is_ood, here.p_value <= fpr)
    assert detector.threshold_ is not None
    assert detector.threshold_.fpr == 0.1, "predict changes nothing"
    with pytest.raises(GroodError, match=r"0.001 cannot be promised from 199 calibration samples"):
        detector.predict_features(QUERIES, fpr=0.001)


def test_a_threshold_of_the_callers_own(detector: GROOD) -> None:
    scores = detector.score_features(QUERIES)
    tau = float(scores.median())
    found = detector.predict_features(QUERIES, tau=tau)
    assert torch.equal(found.is_ood, scores.log() > math.log(tau))
    assert 100 < int(found.is_ood.sum()) < 240
    assert found.p_value is not None
    assert torch.equal(found.p_value, detector.predict_features(QUERIES).p_value)
    assert bool(detector.predict_features(QUERIES, tau=0).is_ood.all())
    uncalibrated = GROOD(None).fit_features(*gaussians(160, 1))
    alone = uncalibrated.predict_features(QUERIES, tau=tau)
    assert alone.p_value is None
    assert torch.equal(alone.is_ood, found.is_ood)
    for wrong in (-1.0, math.nan, math.inf, "1"):
        with pytest.raises(GroodError, match="tau is a score, at least 0"):
            uncalibrated.predict_features(QUERIES, tau=wrong)  # type: ignore[arg-type]


def test_false_discovery_rate(detector: GROOD) -> None:
    found = detector.predict_features(QUERIES, fdr=0.2)
    assert found.p_value is not None
    assert torch.equal(found.is_ood, benjamini_hochberg(found.p_value, 0.2))
    assert 20 < int(found.is_ood.sum()) < 60
    assert not bool(detector.predict_features(QUERIES, fdr=1e-6).is_ood.any())
    for wrong in (0, 1, -0.1, math.nan):
        with pytest.raises(GroodError, match="fdr is the share"):
            detector.predict_features(QUERIES, fdr=wrong)


def test_one_way_to_decide_at_a_time(detector: GROOD) -> None:
    with pytest.raises(GroodError, match="fpr and fdr are different ways to decide"):
        detector.predict_features(QUERIES, fpr=0.1, fdr=0.1)
    with pytest.raises(GroodError, match="fpr and tau and fdr are different ways"):
        detector.predict_features(QUERIES, fpr=0.1, tau=1, fdr=0.1)
    for options in ({}, {"fpr": 0.1}, {"fdr": 0.1}):
        with pytest.raises(NotFittedError, match="not calibrated"):
            GROOD(None).fit_features(*gaussians(40, 1)).predict_features(QUERIES, **options)
    with pytest.raises(NotFittedError, match="not fitted"):
        GROOD(None).predict_features(QUERIES, tau=1.0)


def test_a_bad_rate_is_found_before_the_images_are_read() -> None:
    model = taught_cnn(width=16)
    detector = GROOD(model).fit(batches(*patterns(60), 20)).calibrate(patterns(60, seed=5)[0])

    def never() -> object:
        raise AssertionError("an image was read")
        yield

    for options in ({"fpr": 1e-4}, {"fpr": 2}, {"tau": -1}, {"fdr": 7}, {"tau": 1, "fdr": 0.1}):
        with pytest.raises(GroodError):
            detector.predict(never(), **options)  # type: ignore[arg-type]


# --- A threshold for each class -----------------------------------------------------------------------------------


def hard_class(n: int, seed: int) -> Tensor:
    """Class 0 is spread three times as far as the others."""
    features, labels = gaussians(n, seed)
    return torch.where(labels[:, None] == 0, gaussians(n, seed, spread=2.0)[0], features)


def test_each_class_keeps_the_promise() -> None:
    detector = GROOD(None).fit_features(hard_class(400, 1), torch.arange(400) % 4)
    held_out, new = hard_class(4000, 2), hard_class(20_000, 3)

    def rates() -> list[float]:
        found = detector.predict_features(new)
        return [float(found.is_ood[found.prototype_label == c].double().mean()) for c in range(4)]

    detector.calibrate_features(held_out, fpr=0.1)
    assert max(rates()) > 0.15, "one threshold for all: the hard class pays"
    detector.calibrate_features(held_out, fpr=0.1, per_class=True)
    assert max(abs(rate - 0.1) for rate in rates()) < 0.03
    assert detector.threshold_ is not None
    assert detector.threshold_.group_ids.tolist() == [0, 1, 2, 3]
    assert torch.equal(detector.predict_features(new, fpr=0.1).is_ood, detector.predict_features(new).is_ood)
    assert int(detector.predict_features(new, fdr=0.1).is_ood.sum()) < 2000


def test_a_class_without_held_out_images(detector: GROOD) -> None:
    before = detector.threshold_
    features, labels = gaussians(400, 2)
    with pytest.raises(GroodError, match="no calibration sample is taken for class 0, class 2, and"):
        detector.calibrate_features(features[labels % 2 == 1], per_class=True)
    assert detector.threshold_ is before


def test_thresholds_for_classes_are_kept(tmp_path: Path) -> None:
    detector = GROOD(None).fit_features(*gaussians(160, 1), classes=["a", "b", "c", "d"])
    detector.calibrate_features(HELD_OUT, fpr=0.1, per_class=True).save(tmp_path / "x")
    loaded = GROOD.load(tmp_path / "x")
    first, second = detector.predict_features(QUERIES), loaded.predict_features(QUERIES)
    assert first.p_value is not None
    assert second.p_value is not None
    assert torch.equal(first.p_value, second.p_value)
    assert torch.equal(first.is_ood, second.is_ood)
    with pytest.raises(GroodError, match=r"too few: class 'a' \(\d+\)"):
        loaded.predict_features(QUERIES, fpr=0.01)


# --- Without a calibration ----------------------------------------------------------------------------------------


def test_assess_needs_no_calibration() -> None:
    model = taught_cnn(width=16)
    images, labels = patterns(60)
    detector = GROOD(model).fit(batches(images, labels, 20))
    with left_alone(model):
        found = detector.assess(images[:7])
    assert torch.equal(found.score, detector.score(images[:7]))
    detector.calibrate(patterns(60, seed=5)[0])
    decided = detector.predict(images[:7])
    assert decided.label is not None
    assert found.label is not None
    assert torch.equal(found.label, decided.label)
    assert torch.equal(found.prototype_label, decided.prototype_label)
    assert torch.equal(found.neighbor, decided.neighbor)


def test_explain_images_is_explain_features() -> None:
    model = taught_cnn(width=16)
    images, labels = patterns(60)
    detector = GROOD(model).fit(batches(images, labels, 20))
    with left_alone(model):
        found = detector.explain(batches(images[:9], labels[:9], 4), k=3, n_prototypes=2)
    expected = detector.explain_features(detector.extract(batches(images[:9], labels[:9], 4)).features, 3, 2)
    for name, here, there in zip(found._fields, found, expected, strict=True):
        assert torch.equal(here, there), name
    assert found.neighbor.shape == (9, 3)
    assert torch.equal(found.neighbor[:, 0], detector.assess(batches(images[:9], labels[:9], 4)).neighbor)


# --- Training samples among the held-out ones ---------------------------------------------------------------------


def test_a_training_image_is_known_without_its_gradient(caplog: pytest.LogCaptureFixture) -> None:
    """Wrongly classified, it has none, and its score is like any other's."""
    model = taught_cnn(width=16)
    images, labels = patterns(60)
    held_out = patterns(40, seed=5)[0]
    wrong = labels.clone()
    wrong[7] = (wrong[7] + 1) % 3
    detector = GROOD(model).fit(batches(images, wrong, 20))
    assert 7 not in detector._need_state().sample_ids
    mixed = torch.cat([held_out[:10], images[7:8], held_out[10:]])
    with pytest.raises(GroodError, match=r"1 of 41 calibration samples are training samples \(sample 10\)"):
        detector.calibrate(mixed)
    with caplog.at_level(logging.INFO, logger="torch_grood"):
        detector.calibrate(mixed, on_training="drop")
    assert "left out 1 of 41 calibration samples" in caplog.text
    assert detector.threshold_ is not None
    expected = ConformalThreshold.fit(detector.log_score(held_out), 0.05)
    assert detector.threshold_.log_scores.tolist() == pytest.approx(expected.log_scores.tolist(), abs=1e-4)
    with pytest.raises(GroodError, match="there is no calibration sample"):
        detector.calibrate(images[7:8], on_training="drop")
    assert detector.threshold_.n == 40, "a failed calibration leaves the old one"


def test_what_was_added_is_a_training_sample_and_what_was_removed_is_none(detector: GROOD) -> None:
    more, labels = gaussians(20, 8)
    detector.calibrate_features(more, fpr=0.1)
    detector.add_features(more, labels, (labels + 1) % 4)
    assert detector.fit_info_.n_indexed == 160, "all were classified wrongly"
    with pytest.raises(GroodError, match="20 of 20 calibration samples"):
        detector.calibrate_features(more, fpr=0.1)
    detector.remove(range(160, 180))
    detector.calibrate_features(more, fpr=0.1)


def test_removing_what_has_no_gradient_erases_its_hash(detector: GROOD) -> None:
    features, labels = gaussians(160, 1)
    predictions = labels.clone()
    predictions[:5] = (labels[:5] + 1) % 4
    detector.fit_features(features, labels, predictions).calibrate_features(HELD_OUT)
    key = int(content_hashes(features)[3])
    assert detector.training_ is not None
    assert key in detector.training_.hashes.tolist()
    assert detector.remove(3) == 0
    assert detector.threshold_ is not None, "no score has changed"
    assert detector.training_ is not None
    assert key not in detector.training_.hashes.tolist()


# --- Names --------------------------------------------------------------------------------------------------------


class Folder(Dataset[tuple[Tensor, int]]):
    """As torchvision's ImageFolder: `samples` are pairs (path, class)."""

    def __init__(self, n: int) -> None:
        self.images, self.labels = patterns(n)
        self.samples = [(f"train/{int(label)}/{i:03}.png", int(label)) for i, label in enumerate(self.labels)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], int(self.labels[i])


def test_names_of_neighbours(tmp_path: Path) -> None:
    model, data = taught_cnn(width=16), Folder(60)
    detector = GROOD(model).fit(DataLoader(data, batch_size=20))
    found = detector.assess(data.images[:5])
    assert detector.sample_names(found.neighbor) == [data.samples[i][0] for i in found.neighbor.tolist()]
    detector.save(tmp_path / "x")
    loaded = GROOD.load(tmp_path / "x")
    assert loaded.sample_names([0, 59]) == ["train/0/000.png", data.samples[59][0]]
    for wrong in (-1, 60):
        with pytest.raises(GroodError, match="positions from 0 to 59"):
            loaded.sample_names([wrong])
    loaded.remove([0])
    assert loaded.sample_names([0, 1]) == [None, data.samples[1][0]]
    shuffled = GROOD(model).fit(DataLoader(data, batch_size=20, shuffle=True))
    assert shuffled.sample_names([0]) == [None], "positions say nothing of the files then"


# --- Binding ------------------------------------------------------------------------------------------------------


def test_bind_is_load_with_a_model(tmp_path: Path) -> None:
    model = taught_cnn(width=16)
    images, labels = patterns(60)
    GROOD(model).fit(batches(images, labels, 20)).save(tmp_path / "x")
    bound = GROOD.load(tmp_path / "x").bind(model)
    assert torch.equal(bound.score(images), GROOD.load(tmp_path / "x", model).score(images))
    other = taught_cnn(width=16)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(ModelMismatchError, match="same architecture with other weights"):
        GROOD.load(tmp_path / "x").bind(other)
    with pytest.raises(NotFittedError):
        GROOD(None).bind(model)
