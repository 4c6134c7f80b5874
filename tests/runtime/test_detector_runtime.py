"""The runtime says what the detector says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models import cnn
from torch_grood import GROOD, GroodError
from torch_grood.data import ImageTransform
from torch_grood.runtime import Decisions, DetectorRuntime, Runtime

TRANSFORM = ImageTransform(None, None, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def fitted() -> GROOD:
    torch.manual_seed(0)
    model = cnn().eval()
    images = torch.rand(120, 3, 8, 8)
    labels = model(images).argmax(1)
    labels[:3] = torch.arange(3)
    return GROOD(model).fit([(images, labels)], progress=False)


def pixels(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def prepared(n: int) -> torch.Tensor:
    return TRANSFORM.normalise(torch.from_numpy(pixels(n)).permute(0, 3, 1, 2).contiguous())


def test_the_decisions_are_the_detectors(fitted: GROOD) -> None:
    fitted.calibrate(prepared(40), fpr=0.2, progress=False)
    runtime: Runtime = DetectorRuntime(fitted, TRANSFORM)
    found, expected = runtime.decide(pixels(9)), fitted.predict(prepared(9), progress=False)
    for name in Decisions._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name).numpy(), err_msg=name)
    assert runtime.classes == ("0", "1", "2")
    assert (runtime.fpr, runtime.n_calibration) == (0.2, 40)
    assert fitted.threshold_ is not None
    assert runtime.log_tau == fitted.threshold_.log_tau
    assert runtime.sample_name(int(found.neighbor[0])) is None


def test_another_rate_and_a_threshold_of_the_users(fitted: GROOD) -> None:
    fitted.calibrate(prepared(40), fpr=0.2, progress=False)
    expected = fitted.predict(prepared(50), fpr=0.5, progress=False)
    runtime = DetectorRuntime(fitted, TRANSFORM, fpr=0.5)
    np.testing.assert_array_equal(runtime.decide(pixels(50)).is_ood, expected.is_ood.numpy())
    assert runtime.fpr == 0.5
    tau = float(expected.score.median())
    own = DetectorRuntime(fitted, TRANSFORM, tau=tau)
    np.testing.assert_array_equal(own.decide(pixels(50)).is_ood, (expected.score > tau).numpy())
    assert own.fpr is None
    assert own.log_tau == pytest.approx(np.log(tau))
    assert DetectorRuntime(fitted, TRANSFORM, tau=0).log_tau == -np.inf
    with pytest.raises(GroodError, match="cannot be promised from 40 calibration samples"):
        DetectorRuntime(fitted, TRANSFORM, fpr=0.001)
    with pytest.raises(GroodError, match="different ways to decide"):
        DetectorRuntime(fitted, TRANSFORM, fpr=0.5, tau=1.0)


def test_without_a_calibration_there_is_no_decision(fitted: GROOD) -> None:
    bare = GROOD(fitted.model).fit([(prepared(60), torch.arange(60) % 3)], classes=[0, 1, 2], progress=False)
    runtime = DetectorRuntime(bare, TRANSFORM)
    found = runtime.decide(pixels(4))
    assert (found.p_value, found.is_ood) == (None, None)
    np.testing.assert_array_equal(found.score, bare.score(prepared(4), progress=False).numpy())
    assert (runtime.fpr, runtime.log_tau, runtime.n_calibration) == (None, None, None)
    with pytest.raises(GroodError, match="not calibrated"):
        DetectorRuntime(bare, TRANSFORM, fpr=0.5)


def test_a_threshold_for_each_class_is_no_single_one(fitted: GROOD) -> None:
    fitted.calibrate(prepared(90), fpr=0.5, per_class=True, progress=False)
    runtime = DetectorRuntime(fitted, TRANSFORM)
    assert runtime.log_tau is None
    found, expected = runtime.decide(pixels(9)), fitted.predict(prepared(9), progress=False)
    np.testing.assert_array_equal(found.is_ood, expected.is_ood.numpy())


def test_a_detector_without_its_model_is_refused() -> None:
    features = GROOD(None).fit_features(torch.randn(30, 4), torch.arange(30) % 3)
    with pytest.raises(GroodError, match="has no model"):
        DetectorRuntime(features, TRANSFORM)
