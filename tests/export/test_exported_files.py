"""The files that are exported: written whole or not at all, and equal to the detector when others run them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import MLP, ResidualNet, cnn
from torch_grood import GROOD, ClassSample, GroodError
from torch_grood.data import ImageTransform
from torch_grood.errors import ModelMismatchError
from torch_grood.runtime import Decisions, DetectorRuntime
from torch_grood.runtime.manifest import Manifest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from torch_grood.export import export_onnx, export_program, onnx_file
from torch_grood.runtime import OnnxRuntime

TRANSFORM = ImageTransform((8, 8), None, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
FREE = dataclasses.replace(TRANSFORM, resize=None)


def images(n: int, seed: int = 0, side: int = 8) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def pixels(n: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def fitted(model: nn.Module, **options: Any) -> GROOD:
    model = model.eval()
    labels = model(images(150)).argmax(1)
    labels[:3] = torch.arange(3)
    detector = GROOD(model, **options).fit([(images(150), labels)], progress=False)
    return detector.calibrate(images(200, 1), fpr=0.1, progress=False)


@pytest.fixture(scope="module")
def detector() -> GROOD:
    torch.manual_seed(0)
    return fitted(cnn())


@pytest.fixture(scope="module")
def file(detector: GROOD, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    export_onnx(detector, path, TRANSFORM)
    return path


def agree(found: Decisions, expected: Decisions) -> None:
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-5)
    for name in ("label", "prototype_label", "neighbor", "is_ood", "p_value"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("n", [1, 2, 33])
def test_onnx_decides_as_the_detector(detector: GROOD, file: Path, n: int) -> None:
    agree(OnnxRuntime(file).decide(pixels(n)), DetectorRuntime(detector, TRANSFORM).decide(pixels(n)))


def test_no_image_is_decided_about_in_silence(file: Path) -> None:
    assert [len(field) for field in OnnxRuntime(file).decide(pixels(0)) if field is not None] == [0] * 6


def test_many_images_are_run_in_pieces(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = OnnxRuntime(file).decide(pixels(33))
    monkeypatch.setattr("torch_grood.runtime.onnx._MOST_PAIRS", 1000)
    agree(OnnxRuntime(file, threads=1).decide(pixels(33)), whole)


def test_what_the_file_says_of_itself(detector: GROOD, file: Path) -> None:
    manifest = OnnxRuntime(file).manifest
    assert manifest.classes == ("0", "1", "2")
    assert manifest.transform == TRANSFORM
    assert manifest.shape == (3, 8, 8)
    assert manifest.facts["fit"]["n_indexed"] == manifest.n_stored == detector.fit_info_.n_indexed
    assert manifest.calibration is not None
    assert detector.threshold_ is not None
    assert manifest.calibration.log_taus == (detector.threshold_.log_tau,)
    assert (manifest.calibration.fpr, manifest.calibration.n) == (0.1, 200)
    assert Manifest.from_json(manifest.to_json()) == dataclasses.replace(manifest, facts=manifest.facts)
    assert OnnxRuntime(file).sample_name(0) is None


def test_it_does_not_tell_where_the_code_lies(file: Path) -> None:
    assert str(Path(onnx_file.__file__).parent).encode() not in file.read_bytes()


def test_another_operating_point(detector: GROOD, file: Path, tmp_path: Path) -> None:
    expected = DetectorRuntime(detector, TRANSFORM, fpr=0.4).decide(pixels(60))
    runtime = OnnxRuntime(file, fpr=0.4)
    assert (runtime.fpr, runtime.n_calibration) == (0.4, 200)
    agree(runtime.decide(pixels(60)), expected)
    export_onnx(detector, tmp_path / "other.onnx", TRANSFORM, fpr=0.4)
    other = OnnxRuntime(tmp_path / "other.onnx")
    assert (other.fpr, other.manifest.facts["threshold"]["fpr"]) == (0.4, 0.4)
    agree(other.decide(pixels(60)), expected)
    assert expected.is_ood is not None
    assert 0 < expected.is_ood.sum() < 60
    tau = float(np.median(expected.score))
    own = OnnxRuntime(file, tau=tau)
    assert own.fpr is None
    np.testing.assert_array_equal(own.decide(pixels(60)).is_ood, expected.score > tau)
    with pytest.raises(GroodError, match="cannot be promised from 200 calibration samples"):
        OnnxRuntime(file, fpr=0.001)
    with pytest.raises(GroodError, match="cannot be promised from 200 calibration samples"):
        export_onnx(detector, tmp_path / "x.onnx", TRANSFORM, fpr=0.001)
    with pytest.raises(GroodError, match="tau is a score"):
        OnnxRuntime(file, tau=-1)
    with pytest.raises(GroodError, match="different ways"):
        OnnxRuntime(file, tau=0.1, fpr=0.1)
    assert not (tmp_path / "x.onnx").exists()


def test_a_threshold_for_each_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = fitted(cnn(), store="int8", subset=ClassSample(n=20))
    detector.calibrate(images(3000, 1), fpr=0.1, per_class=True, progress=False)
    export_onnx(detector, tmp_path / "net.onnx", TRANSFORM)
    runtime = OnnxRuntime(tmp_path / "net.onnx")
    agree(runtime.decide(pixels(60)), DetectorRuntime(detector, TRANSFORM).decide(pixels(60)))
    assert runtime.log_tau is None
    assert runtime.manifest.calibration is not None
    assert runtime.manifest.calibration.groups == (0, 1, 2)
    with pytest.raises(GroodError, match=r"for each class; too few: class '1' \(62\)"):
        OnnxRuntime(tmp_path / "net.onnx", fpr=0.001)


def test_without_a_calibration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cnn().eval()
    labels = model(images(90)).argmax(1)
    labels[:3] = torch.arange(3)
    detector = GROOD(model).fit([(images(90), labels)], progress=False)
    export_onnx(detector, tmp_path / "net.onnx", TRANSFORM)
    runtime = OnnxRuntime(tmp_path / "net.onnx")
    found = runtime.decide(pixels(5))
    assert (runtime.n_calibration, found.p_value, found.is_ood) == (None, None, None)
    assert OnnxRuntime(tmp_path / "net.onnx", tau=0.0).decide(pixels(5)).is_ood is not None
    with pytest.raises(GroodError, match="without a calibration"):
        OnnxRuntime(tmp_path / "net.onnx", fpr=0.1)


def test_images_of_any_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResidualNet().eval()
    batches = [images(40, side=side) for side in (8, 12)]
    training = [(batch, model(batch).argmax(1)) for batch in batches]
    for _, labels in training:
        labels[:3] = torch.arange(3)
    detector = GROOD(model).fit(training, progress=False)
    assert detector.fit_info_.image_shape == ()
    export_onnx(detector, tmp_path / "net.onnx", FREE)
    runtime, expected = OnnxRuntime(tmp_path / "net.onnx"), DetectorRuntime(detector, FREE)
    for side in (8, 20):
        np.testing.assert_allclose(runtime.decide(pixels(3, side)).score, expected.decide(pixels(3, side)).score, 1e-5)


def test_a_network_whose_trace_is_right_for_one_size_only(tmp_path: Path) -> None:
    """Its adaptive pooling becomes a pooling of a fixed size in ONNX."""
    torch.manual_seed(0)
    model = cnn().eval()
    training = [(batch, torch.arange(40) % 3) for batch in (images(40, side=8), images(40, side=12))]
    detector = GROOD(model).fit(training, progress=False)
    with pytest.raises(GroodError, match=r"nothing was written|cannot be exported"):
        export_onnx(detector, tmp_path / "net.onnx", FREE)
    assert not list(tmp_path.iterdir())


def test_a_program_of_torch_export(detector: GROOD, tmp_path: Path) -> None:
    export_program(detector, tmp_path / "net.pt2", TRANSFORM)
    extra = {"torch_grood.json": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    expected = detector.predict(images(7, 5), progress=False)
    with torch.no_grad():
        label, _, _, score, neighbor, p_value, is_ood = program(images(7, 5))
    assert torch.equal(label, expected.label)
    torch.testing.assert_close(score, expected.score, rtol=1e-6, atol=0.0)
    assert torch.equal(neighbor, expected.neighbor)
    assert torch.equal(p_value, expected.p_value)
    assert torch.equal(is_ood, expected.is_ood)
    assert json.loads(extra["torch_grood.json"])["classes"] == ["0", "1", "2"]
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]


def test_the_model_is_left_as_it_was(detector: GROOD, tmp_path: Path) -> None:
    assert detector.model is not None
    detector.model.train()
    before = {name: value.clone() for name, value in detector.model.state_dict().items()}
    export_onnx(detector, tmp_path / "net.onnx", TRANSFORM)
    assert all(module.training for module in detector.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in detector.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in detector.model.modules())
    detector.model.eval()


class Moody(nn.Module):
    """Another answer each time, at the scale that it is told."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + torch.rand_like(x))


class Branching(nn.Module):
    """Looks at its input in Python, which no trace can follow."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x if float(x.sum()) > 0 else -x)


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_what_cannot_be_exported_is_said_and_nothing_is_written(export: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "net.onnx"
    path.write_text("old")
    with pytest.raises(GroodError, match="cannot be exported"):
        export(fitted(Branching(cnn())), path, TRANSFORM)
    with pytest.raises(GroodError, match=r"differ by .* of themselves"):
        export(fitted(Moody(cnn())), path, TRANSFORM)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_detectors_that_are_not_about_images(detector: GROOD, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(GroodError, match="has no model"):
        export_onnx(GROOD(None).fit_features(torch.eye(3), [0, 1, 2]), path, TRANSFORM)
    tabular = MLP().eval()
    rows = torch.randn(60, 6)
    labels = tabular(rows).argmax(1)
    labels[:3] = torch.arange(3)
    with pytest.raises(GroodError, match=r"only detectors of RGB images .* shape \(6,\)"):
        export_onnx(GROOD(tabular).fit([(rows, labels)], progress=False), path, TRANSFORM)
    with pytest.raises(ModelMismatchError, match="16 × 16, and the detector was fitted on 8 × 8"):
        export_onnx(detector, path, dataclasses.replace(TRANSFORM, resize=(16, 16)))
    assert not path.exists()


def test_more_than_protocol_buffers_can_hold(detector: GROOD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_MOST_BYTES", 1000)
    with pytest.raises(GroodError, match=r"ONNX file ends at 2 GiB\. Fit with fewer gradients"):
        export_onnx(detector, tmp_path / "net.onnx", TRANSFORM)
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit_b_32", "swin_t"])
def test_the_architectures_of_torchvision(name: str, tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=3).eval()
    check_large(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "convnext_atto", "efficientnet_b0"])
def test_the_architectures_of_timm(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    check_large(timm.create_model(name, num_classes=3).eval(), tmp_path)


def check_large(model: nn.Module, folder: Path) -> None:
    training = images(12, side=224)
    with torch.no_grad():
        labels = model(training).argmax(1)
    labels[:3] = torch.arange(3)
    detector = GROOD(model).fit([(training, labels)], progress=False)
    detector.calibrate(images(10, 1, 224), fpr=0.1, progress=False)
    transform = dataclasses.replace(TRANSFORM, resize=(224, 224))
    export_onnx(detector, folder / "net.onnx", transform)
    export_program(detector, folder / "net.pt2", transform)
    found = OnnxRuntime(folder / "net.onnx").decide(pixels(3, 224))
    expected = DetectorRuntime(detector, transform).decide(pixels(3, 224))
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-4)
    np.testing.assert_array_equal(found.label, expected.label)
