"""The module that is exported computes what the detector computes, in all its variants and at all scales."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import cnn
from torch_grood import GROOD, ClassSample, KCenterCoreset, Mixup, PrototypeMean
from torch_grood.export import module
from torch_grood.export.module import DetectorModule, Outputs
from torch_grood.features import FeatureExtractor

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "half": {"geometry": "half"},
    "raw": {"geometry": "raw", "temperature": 2.0, "k": 3},
    "mean": {"outliers": PrototypeMean()},
    "mixup": {"outliers": Mixup()},
    "float16": {"store": "float16"},
    "int8": {"store": "int8"},
    "sample": {"subset": ClassSample(n=5)},
    "coreset": {"subset": KCenterCoreset(n=9)},
    "few": {"subset": ClassSample(n=1), "k": 2},
    "approximate": {"index": "IVF1,Flat"},
}


@pytest.fixture(params=[64, 2], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of a block of the search; with 64, few rows are searched without blocks."""
    monkeypatch.setattr(module, "_BLOCK", request.param)
    return int(request.param)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def flat(scale: float = 1.0) -> nn.Module:
    """Its features are the pixels, of a scale that the test chooses."""
    model = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(192, 3))
    if scale != 1:
        model[1] = Times(scale)
    return model


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def fitted(model: nn.Module, *, per_class: bool = False, fpr: float = 0.2, **options: Any) -> GROOD:
    model = model.eval()
    training = images(150)
    labels = model(training).argmax(1)
    labels[:3] = torch.arange(3)
    detector = GROOD(model, **options).fit([(training, labels)], progress=False)
    return detector.calibrate(images(200, 1), fpr=fpr, per_class=per_class, progress=False)


def outputs(detector: GROOD, batch: Tensor) -> Outputs:
    assert detector.model is not None
    extractor = FeatureExtractor(detector.model, detector.fit_info_.head)
    extractor(batch)
    with torch.no_grad():
        return Outputs(*DetectorModule(detector, extractor, detector.threshold_)(batch))


def check(detector: GROOD, batch: Tensor, *, neighbors: bool = True) -> None:
    found, expected = outputs(detector, batch), detector.predict(batch, progress=False)
    torch.testing.assert_close(found.score, expected.score, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(found.log_score, detector.log_score(batch, progress=False), rtol=1e-9, atol=1e-9)
    for name in ("label", "prototype_label", "is_ood", *(["neighbor"] if neighbors else [])):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert expected.p_value is not None
    assert torch.equal(found.p_value, expected.p_value)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return cnn()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(network: nn.Module, name: str) -> None:
    check(fitted(network, **VARIANTS[name]), images(40, 2))


def test_a_threshold_for_each_class(network: nn.Module) -> None:
    detector = fitted(network, per_class=True)
    assert detector.threshold_ is not None
    assert len(set(detector.threshold_.log_taus.tolist())) == 3
    check(detector, images(60, 2))


def test_a_class_without_held_out_images_flags_nothing(network: nn.Module) -> None:
    detector = fitted(network, per_class=True)
    threshold = detector.threshold_
    assert threshold is not None
    assert threshold.groups is not None
    absent = int(threshold.group_ids[-1])
    kept = threshold.groups != absent
    part = type(threshold)(threshold.log_scores[kept], threshold.fpr, threshold.groups[kept])
    extractor = FeatureExtractor(network, detector.fit_info_.head)
    extractor(images(2))
    with torch.no_grad():
        found = Outputs(*DetectorModule(detector, extractor, part)(images(60, 2)))
    there = found.prototype_label == absent
    assert bool(there.any())
    assert bool((found.p_value[there] == 1).all())
    assert not bool(found.is_ood[there].any())


def test_classes_that_were_left_out() -> None:
    torch.manual_seed(1)
    model = flat().eval()
    labels = model(images(150)).argmax(1)
    labels[:3] = torch.arange(3)
    detector = GROOD(model).fit([(images(150), labels)], classes=[0, 2], progress=False)
    detector.calibrate(images(100, 1), fpr=0.2, progress=False)
    assert 1 not in outputs(detector, images(30, 2)).prototype_label
    check(detector, images(30, 2))


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1e4])
@pytest.mark.parametrize("geometry", ["raw", "unit"])
def test_no_scale_of_the_features_underflows(scale: float, geometry: str) -> None:
    """At 1e4 the gradients of the paper's geometry have lengths down to exp(-1500)."""
    torch.manual_seed(2)
    detector = fitted(flat(scale), outliers=PrototypeMean(), geometry=geometry)
    found = detector.log_score(images(40, 2), progress=False)
    extreme = geometry == "raw" and scale > 100
    if extreme:
        assert float(found.min()) < -800
    # To an image whose gradient is 1e16 times longer than others, all of these are equally far in float64.
    check(detector, images(40, 2), neighbors=not extreme)


def test_an_image_at_the_ood_prototype_and_a_training_image() -> None:
    torch.manual_seed(3)
    detector = fitted(flat(), outliers=PrototypeMean(), geometry="raw")
    batch = images(150)[:8].clone()
    batch[0] = detector.ood_prototype_.float().reshape(3, 8, 8)
    found = outputs(detector, batch)
    expected = detector.log_score(batch, progress=False)
    known = [i for i in range(1, 8) if math.isinf(float(expected[i]))]
    assert known
    # The rounding of one product is all that may be left of the distance to itself.
    assert all(float(found.score[i]) <= 1e-7 for i in known)
    assert found.neighbor[known].tolist() == known
    assert float(found.log_score[0]) == pytest.approx(float(expected[0]), rel=1e-6)


def test_without_a_calibration_there_are_no_decisions(network: nn.Module) -> None:
    training = images(90)
    labels = network.eval()(training).argmax(1)
    labels[:3] = torch.arange(3)
    detector = GROOD(network).fit([(training, labels)], progress=False)
    extractor = FeatureExtractor(network, detector.fit_info_.head)
    extractor(training[:2])
    with torch.no_grad():
        assert len(DetectorModule(detector, extractor, None)(images(4, 1))) == len(Outputs._fields) - 2


@pytest.mark.parametrize(
    ("options", "in_blocks"),
    [({}, True), ({"geometry": "raw"}, True), ({"store": "int8"}, False), ({"subset": ClassSample(n=2)}, False)],
)
def test_which_detectors_are_searched_in_blocks(
    options: dict[str, Any], in_blocks: bool, network: nn.Module, block: int
) -> None:
    detector = fitted(network, **options)
    assert detector.model is not None
    extractor = FeatureExtractor(detector.model, detector.fit_info_.head)
    extractor(images(2))
    assert DetectorModule(detector, extractor, None)._in_blocks == (in_blocks and block == 2)


def test_lengths_of_many_scales_are_not_searched_in_blocks() -> None:
    torch.manual_seed(2)
    detector = fitted(flat(1e4), outliers=PrototypeMean(), geometry="raw")
    assert detector.model is not None
    extractor = FeatureExtractor(detector.model, detector.fit_info_.head)
    extractor(images(2))
    assert not DetectorModule(detector, extractor, None)._in_blocks


@pytest.mark.parametrize("n", range(140, 150))
def test_rows_that_fill_a_block_up_are_never_found(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that point away from all stored gradients, whose products are negative: zeros seem nearer."""
    monkeypatch.setattr(module, "_BLOCK", 4)
    generator = torch.Generator().manual_seed(n)
    training = images(150)[:n]
    model = flat().eval()
    labels = model(training).argmax(1)
    labels[:3] = torch.arange(3)
    detector = GROOD(model, outliers=PrototypeMean(), geometry="raw", k=5).fit([(training, labels)], progress=False)
    detector.calibrate(images(200, 1), fpr=0.2, progress=False)
    away = 2 * detector.ood_prototype_.float() - training[torch.randint(n, (20,), generator=generator)].flatten(1)
    check(detector, away.reshape(-1, 3, 8, 8))
