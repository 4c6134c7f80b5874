"""Files that grood export did not write: a clear error, and nothing else of the machine is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torch_grood.data import ImageTransform
from torch_grood.errors import FormatError, GroodError, NewerFormatError
from torch_grood.runtime import OnnxRuntime
from torch_grood.runtime.manifest import MANIFEST_KEY, Calibration, Manifest

onnx = pytest.importorskip("onnx")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
pytest.importorskip("onnxruntime")

TRANSFORM = ImageTransform((4, 4), None, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MANIFEST = Manifest(("a", "b"), TRANSFORM, (3, 4, 4), 10, Calibration(0.1, (-1.0,), (20,), None), {}, "0.1.0")
KINDS = {
    "label": TensorProto.INT64,
    "prototype_label": TensorProto.INT64,
    "log_score": TensorProto.DOUBLE,
    "score": TensorProto.DOUBLE,
    "neighbor": TensorProto.INT64,
    "p_value": TensorProto.DOUBLE,
    "is_ood": TensorProto.BOOL,
}


def graph(
    *,
    manifest: str | None = MANIFEST.to_json(),
    leave_out: str = "",
    factor: Any = 0.5,
    external: str | None = None,
    domain: str = "",
    axes: tuple[int, ...] = (1, 2, 3),
) -> bytes:
    """A graph with the outputs of an exported detector, all from the mean of the image times a factor."""
    weight = numpy_helper.from_array(np.array(factor, np.float32), "factor")
    if external is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", external), ("offset", "0"), ("length", "4")):
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "factor"], ["scaled"], domain=domain),
        *[helper.make_node("Cast", ["scaled"], [name], to=kind) for name, kind in KINDS.items()],
    ]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in KINDS.items() if name != leave_out]
    made = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"])],
            outputs,
            [weight, numpy_helper.from_array(np.array(axes, np.int64), "axes")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    if manifest is not None:
        helper.set_model_props(made, {MANIFEST_KEY: manifest})
    content: bytes = made.SerializeToString()
    return content


def opened(folder: Path, content: bytes) -> OnnxRuntime:
    path = folder / "x.onnx"
    path.write_bytes(content)
    return OnnxRuntime(path)


def pixels(n: int) -> np.ndarray:
    return np.full((n, 4, 4, 3), 255, np.uint8)


def test_the_stand_in_is_a_detector(tmp_path: Path) -> None:
    runtime = opened(tmp_path, graph())
    assert runtime.decide(pixels(2)).score.tolist() == [0.5, 0.5]
    assert (runtime.classes, runtime.fpr, runtime.log_tau, runtime.n_calibration) == (("a", "b"), 0.1, -1.0, 20)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no manifest"):
        opened(tmp_path, graph(manifest=None))
    for content in (b"", b"PK\x03\x04", graph()[:-7], b"\x00" * 4096):
        with pytest.raises(FormatError, match=r"x\.onnx"):
            opened(tmp_path, content)
    with pytest.raises(FormatError, match="inputs and outputs are not"):
        opened(tmp_path, graph(leave_out="p_value"))
    with pytest.raises(GroodError, match="cannot be read"):
        OnnxRuntime(tmp_path / "nothing.onnx")


def test_too_large_a_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_grood.runtime.onnx._MOST_BYTES", 1 << 20)
    with pytest.raises(GroodError, match="larger than 1 MiB"):
        opened(tmp_path, bytes(2 << 20))


@pytest.mark.parametrize("where", ["{folder}/secret", "../secret", "secret", "inside/../secret", "/dev/zero"])
def test_no_other_file_is_read(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "secret").write_bytes(np.array(0.25, np.float32).tobytes())
    monkeypatch.chdir(folder)
    with pytest.raises(FormatError, match=r"x\.onnx"):
        opened(folder, graph(external=where.format(folder=folder)))


def test_operations_that_are_not_onnx_runtimes(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"x\.onnx"):
        opened(tmp_path, graph(domain="evil"))


def test_a_graph_that_breaks_its_promises(tmp_path: Path) -> None:
    with pytest.raises(GroodError, match="does not give one number for each image"):
        opened(tmp_path, graph(axes=(1, 2))).decide(pixels(2))
    with pytest.raises(GroodError, match="no finite score"):
        opened(tmp_path, graph(factor=np.nan)).decide(pixels(2))
    with pytest.raises(GroodError, match="cannot run on images of shape"):
        opened(tmp_path, graph(factor=np.ones(7))).decide(pixels(2))


def test_images_of_another_size(tmp_path: Path) -> None:
    with pytest.raises(GroodError, match=r"fitted on images of 4 × 4"):
        opened(tmp_path, graph()).decide(np.zeros((2, 5, 4, 3), np.uint8))


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.__delitem__(key)


def put(value: Any, *keys: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


BROKEN = {
    "lacks its classes": without("classes"),
    "no list of classes": put([], "classes"),
    "classes are numbers": put([1, 2], "classes"),
    "a transform with another field": put(1, "transform", "more"),
    "an image that is huge": put(10**9, "transform", "resize"),
    "a shape of two numbers": put([3, 4], "shape"),
    "grey images": put([1, 4, 4], "shape"),
    "negative sides": put([3, -4, 4], "shape"),
    "no gradient": put(0, "n_stored"),
    "true gradients": put(True, "n_stored"),
    "a rate of 2": put(2.0, "calibration", "fpr"),
    "a rate in words": put("0.1", "calibration", "fpr"),
    "no held-out image": put([0], "calibration", "sizes"),
    "two sizes": put([5, 5], "calibration", "sizes"),
    "two thresholds": put([0.0, 0.0], "calibration", "log_taus"),
    "a threshold in words": put(["0"], "calibration", "log_taus"),
    "a group beyond the classes": put([2], "calibration", "groups"),
    "a calibration that is a list": put([], "calibration"),
    "facts that are a list": put([], "facts"),
    "a version that is a number": put(1, "version"),
    "a format in words": put("1", "format"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_manifests(what: str, tmp_path: Path) -> None:
    data = copy.deepcopy(json.loads(MANIFEST.to_json()))
    BROKEN[what](data)
    with pytest.raises(FormatError, match=r"manifest|calibration|format|transform"):
        opened(tmp_path, graph(manifest=json.dumps(data)))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"format": NaN}', '{"format": 1e400}'])
def test_manifests_that_are_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        opened(tmp_path, graph(manifest=text))


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(NewerFormatError, match="Update torch-grood"):
        opened(tmp_path, graph(manifest='{"format": 2}'))


def test_a_threshold_of_minus_infinity_survives() -> None:
    endless = Manifest(("a",), TRANSFORM, (3, 0, 0), 1, Calibration(0.5, (-np.inf,), (3,), (0,)), {"x": 1}, "1")
    assert Manifest.from_json(endless.to_json()) == endless
