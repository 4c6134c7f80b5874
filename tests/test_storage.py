"""The file of a detector: round trips to the bit, attacks, and files of every format that must be readable for ever.

`python tests/test_storage.py` wrote tests/golden/format-3.grood. Once it is released it is never written again: a
change of the format takes a new number and a new file beside these.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from format_file import KEY, parts, read_by_hand, seal
from torch_grood import (
    GROOD,
    AlteredFileError,
    ClassSample,
    FaissIndex,
    FormatError,
    GroodError,
    HighEnergy,
    Mixup,
    ModelMismatchError,
    OutlierSamples,
    PrototypeMean,
    TruncatedFileError,
    UniformNoise,
)
from torch_grood.outliers import OutlierContext, OutlierSource

GOLDEN = Path(__file__).parent / "golden" / "format-1.grood"
GOLDEN_2 = GOLDEN.with_name("format-2.grood")
GOLDEN_3 = GOLDEN.with_name("format-3.grood")
GOLDEN_4 = GOLDEN.with_name("format-4.grood")
Edit = Callable[[dict[str, Any]], object]
EditTensors = Callable[[dict[str, Tensor]], object]


def golden_features() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training features and labels, held-out features and queries: eighths, so that every machine has the same."""

    def numbers(n: int, factor: int) -> Tensor:
        return ((torch.arange(6 * n) * factor) % 31 - 15).double().view(n, 6) / 8

    labels = torch.arange(48) % 3
    centres = numbers(3, 17) * 2
    queries = numbers(8, 13) * torch.tensor([[0.5], [3.0]]).repeat(4, 1) + centres[torch.arange(8) % 3]
    return numbers(48, 7) + centres[labels], labels, numbers(39, 11) + centres[torch.arange(39) % 3], queries


def write_golden(path: Path) -> None:
    """Write the detector that the golden file holds."""
    features, labels, held_out, _ = golden_features()
    predictions = torch.where(torch.arange(48) % 7 == 0, (labels + 1) % 3, labels)
    detector = GROOD(None, outliers=PrototypeMean(), seed=11)
    detector.fit_features(features, labels, predictions, classes=["Affe", "naïve", "犬"])
    detector.calibrate_features(held_out, fpr=0.1)
    detector.metadata = {"note": "π ≠ 3", "nested": {"list": [1, 2.5, None, True]}}
    detector.save(path)


def write_golden_2(path: Path) -> None:
    """Write the detector that the golden file of format 2 holds."""
    features, labels, _, _ = golden_features()
    predictions = torch.where(torch.arange(48) % 7 == 0, (labels + 1) % 3, labels)
    index, subset = FaissIndex("IVF4,Flat", {"nprobe": 4}), ClassSample(ratio=0.75)
    detector = GROOD(None, outliers=PrototypeMean(), index=index, store="int8", subset=subset, seed=11)
    detector.fit_features(features, labels, predictions)
    detector.save(path)


class GoldenModel(nn.Sequential):
    """Which class's mean is nearest, in eighths: every machine computes the same bits."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(6, 3))
        features, labels, _, _ = golden_features()
        means = torch.stack([features[labels == label].mean(0) for label in range(3)]).mul(8).round().div(8)
        with torch.no_grad():
            self[1].weight.copy_(means)
            self[1].bias.copy_(-means.square().sum(1) / 2)


class GoldenPhotographs:
    """Batches of images, which are their own features, with names and classes."""

    def __init__(self, images: Tensor, labels: Tensor, first: int = 0) -> None:
        self._images, self._labels, self._first = images.view(-1, 1, 2, 3).float(), labels, first
        self.dataset = SimpleNamespace(classes=["Affe", "naïve", "犬"])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self._images.split(20), self._labels.split(20), strict=True))

    def names(self) -> list[str]:
        return [
            f"Bilder/Übung {i}\n{os.fsdecode(bytes([0xE9]))}.png"
            for i in range(self._first, self._first + len(self._images))
        ]


def write_golden_4(path: Path) -> None:
    """Write the detector that the golden file of format 4 holds: that of format 3, with other settings of the score."""
    features, labels, held_out, queries = golden_features()
    detector = GROOD(GoldenModel(), outliers=HighEnergy(9), store="float16", seed=2**62 + 1, k=3)
    # Some are misclassified, and known by their content alone.
    given = torch.where(torch.arange(48) % 7 == 3, (labels + 1) % 3, labels)
    detector.fit(GoldenPhotographs(features, given), progress=False)
    detector.add(GoldenPhotographs(queries[:6] + 0.25, torch.arange(6) % 3, 48), progress=False)
    detector.remove([5, 50])
    held_out = torch.cat([held_out, features[:2], held_out + 0.125])
    held_out = held_out.view(-1, 1, 2, 3).float()
    detector.calibrate(held_out, fpr=0.2, per_class=True, on_training="drop", progress=False)
    detector.metadata = {"note": "π ≠ 3", "nested": {"list": [1, 2.5, None, True]}}
    detector.save(path)


class Net(nn.Module):
    def __init__(self, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.fc = nn.Linear(4 * width, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(images).relu()).flatten(1))


def images(n: int, seed: int) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def fitted_on_images(outliers: OutlierSource, model: nn.Module) -> GROOD:
    training = images(60, 1)
    with torch.no_grad():
        labels = model(training).argmax(1)
    labels[:3] = torch.arange(3)
    return GROOD(model, outliers=outliers, seed=3).fit([(training, labels)], progress=False)


@pytest.fixture(scope="module")
def detector(features: tuple[Tensor, Tensor]) -> GROOD:
    train, labels = features
    fitted = GROOD(None, seed=5).fit_features(train[:160], labels[:160]).calibrate_features(train[160:], fpr=0.1)
    fitted.metadata = {"model": "päckage:factory", "ls": [1, {"ε": None}], "emoji": "🦊", "quote": '"\\\n'}
    return fitted


@pytest.fixture(scope="module")
def saved(detector: GROOD, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "detector.grood"
    detector.save(path)
    return path


@pytest.fixture
def edited(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the file, or another, its parts altered by functions."""

    def edit(
        header: Edit | None = None,
        tensors: EditTensors | None = None,
        text: str | None = None,
        source: Path = saved,
    ) -> Path:
        content, numbers = parts(source)
        if header is not None:
            header(content)
        if tensors is not None:
            tensors(numbers)
        path = tmp_path / "edited.grood"
        seal(path, content, numbers, text)
        return path

    return edit


def assert_equal(first: GROOD, second: GROOD) -> None:
    """All that a detector learned, bit for bit."""
    a, b = first._learned.state, second._learned.state
    assert a is not None
    assert b is not None
    assert first.classes_ == second.classes_
    for x, y in [
        (a.class_prototypes, b.class_prototypes),
        (a.ood_prototype, b.ood_prototype),
        (a.class_ids, b.class_ids),
        (a.sample_ids, b.sample_ids),
        (a.searcher.gradients.log_magnitude, b.searcher.gradients.log_magnitude),
        (a.searcher.gradients.codes, b.searcher.gradients.codes),
    ]:
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    assert first.fit_info_ == second.fit_info_
    assert first.index == second.index
    assert first.seed == second.seed
    assert first.metadata == second.metadata
    assert first.index_quality_ == second.index_quality_
    assert a.fingerprint == b.fingerprint
    assert (first.threshold_ is None) == (second.threshold_ is None)
    if first.threshold_ is not None and second.threshold_ is not None:
        assert first.threshold_.fpr == second.threshold_.fpr
        assert torch.equal(first.threshold_.log_scores, second.threshold_.log_scores)


def assert_same_predictions(first: GROOD, second: GROOD, queries: Tensor) -> None:
    for a, b in zip(first.predict_features(queries), second.predict_features(queries), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


# --- Round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["exact", FaissIndex("IVF8,Flat", {"nprobe": 1}, 1, 20, 90)])
@pytest.mark.parametrize("calibrated", [True, False])
def test_features_only(index: Any, calibrated: bool, features: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    train, labels = features
    predictions = torch.where(torch.arange(200) % 9 == 0, (labels[:200] + 1) % 4, labels[:200])
    first = GROOD(None, index=index, seed=4)
    first.fit_features(train[:200], labels[:200], predictions, classes=["a", "b", "c", "d"])
    if calibrated:
        first.calibrate_features(train[200:], fpr=0.07)
    path = tmp_path / "a file.grood"
    first.save(path)
    second = GROOD.load(path)
    assert_equal(first, second)
    assert second.model is None
    assert torch.equal(first.log_score_features(train[200:]), second.log_score_features(train[200:]))
    if calibrated:
        assert_same_predictions(first, second, train[200:])
    # What was loaded can be saved again, over the file that it is mapped from, and is the same file.
    content = path.read_bytes()
    second.save(path)
    assert path.read_bytes() == content
    assert_equal(first, GROOD.load(str(path)))


@pytest.mark.parametrize(
    "outliers", [Mixup(n=20, lam=0.7), UniformNoise(n=15), PrototypeMean(), OutlierSamples([images(9, 5)], n=7)]
)
def test_with_a_model_and_every_outlier_source(outliers: OutlierSource, tmp_path: Path) -> None:
    model, path = Net(), tmp_path / "detector.grood"
    first = fitted_on_images(outliers, model).calibrate([images(40, 2)], fpr=0.1, progress=False)
    first.save(path)
    second = GROOD.load(path, Net())
    assert_equal(first, second)
    assert second.outliers.config() == outliers.config()
    assert second.fit_info_.uses_ood_data == outliers.uses_ood_data
    assert (second.head, second.early_layer) == (first.fit_info_.head, first.fit_info_.early_layer)
    queries = images(10, 3)
    for a, b in zip(first.predict(queries, progress=False), second.predict(queries, progress=False), strict=True):
        assert torch.equal(a, b)
    # The same file serves features alone, and keeps what it knows of the model.
    alone = GROOD.load(path)
    assert_equal(first, alone)
    extracted = first.extract(queries, progress=False).features
    assert torch.equal(alone.score_features(extracted), first.score(queries, progress=False))
    alone.save(path)
    assert_equal(first, GROOD.load(path, Net()))


def test_the_seed_of_an_approximate_index_is_kept(features: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    train, labels = features
    # Its random centroids come from the seed alone, and no other state of it is stored.
    index = FaissIndex("IVF8,PQ4x4fs", candidates=1, train_size=40, quality_queries=200)
    detectors = [GROOD(None, index=index, seed=seed).fit_features(train[:200], labels[:200]) for seed in (4, 0)]
    assert detectors[0].index_quality_ != detectors[1].index_quality_
    queries = train[200:]
    assert not torch.equal(*(detector.score_features(queries) for detector in detectors))
    detectors[0].save(tmp_path / "x")
    assert not any(name.startswith("index.") for name in load_file(tmp_path / "x"))
    loaded = GROOD.load(tmp_path / "x")
    assert loaded.index_quality_ == detectors[0].index_quality_
    assert torch.equal(loaded.score_features(queries), detectors[0].score_features(queries))


def test_ood_features_stay_declared(features: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    train, labels = features
    first = GROOD(None).fit_features(train, labels, ood_features=train[:5] + 9)
    first.save(tmp_path / "x")
    second = GROOD.load(tmp_path / "x")
    assert_equal(first, second)
    assert second.fit_info_.uses_ood_data


def test_what_is_loaded_is_a_whole_detector(saved: Path, detector: GROOD, features: tuple[Tensor, Tensor]) -> None:
    loaded = GROOD.load(saved)
    loaded.calibrate_features(features[0][:30] + 0.1, fpr=0.5)
    assert loaded.threshold_ is not None
    assert loaded.threshold_.fpr == 0.5
    loaded.fit_features(*features)
    assert loaded.threshold_ is None
    assert detector.threshold_ is not None
    # Neither touches the file.
    assert_equal(detector, GROOD.load(saved))


def test_the_same_detector_gives_the_same_bytes(detector: GROOD, saved: Path, tmp_path: Path) -> None:
    detector.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_safetensors_alone_reads_the_file(saved: Path, detector: GROOD) -> None:
    with safe_open(saved, framework="pt") as file:
        digest, _, text = file.metadata()[KEY].partition(" ")
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    header = json.loads(text)
    assert header["format_version"] == 4
    assert header["classes"] == [0, 1, 2, 3]
    assert header["fpr"] == 0.1
    assert header["metadata"] == detector.metadata
    assert header["index"] == {"spec": "exact"}
    tensors = load_file(saved)
    assert {name: (str(x.dtype), tuple(x.shape)) for name, x in tensors.items()} == {
        "class_prototypes": ("torch.float64", (4, 8)),
        "ood_prototype": ("torch.float64", (8,)),
        "class_ids": ("torch.int64", (4,)),
        "log_magnitude": ("torch.float64", (160,)),
        "direction": ("torch.float32", (160, 8)),
        "sample_ids": ("torch.int64", (160,)),
        "zero_rows": ("torch.int64", (0,)),
        "training_hashes": ("torch.int64", (160,)),
        "calibration": ("torch.float64", (80,)),
        "checksums": ("torch.uint8", (8, 32)),
    }
    # The scores follow from these numbers alone.
    query = torch.full((8,), 0.5, dtype=torch.float64)
    distances = (query - torch.cat([tensors["class_prototypes"], tensors["ood_prototype"][None]])).norm(dim=1)
    gradient = (-distances).softmax(0)[-1] * (query - tensors["ood_prototype"]) / distances[-1]
    stored = tensors["log_magnitude"].exp()[:, None] * tensors["direction"]
    score = (gradient - stored).norm(dim=1).min()
    assert float(detector.score_features(query[None])) == pytest.approx(float(score), rel=1e-6)


@pytest.mark.parametrize("metadata", [{"set": {1}}, {"bytes": b""}, {"nan": float("nan")}, {"tensor": torch.ones(1)}])
def test_metadata_that_are_not_json(detector: GROOD, metadata: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    other = GROOD.load(saved)
    other.metadata = metadata
    with pytest.raises(GroodError, match="metadata cannot be written as JSON"):
        other.save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["metadata", "classes"])
def test_names_that_are_no_unicode(where: str, features: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    # What os.fsdecode makes of a folder whose name is not UTF-8.
    name = os.fsdecode(b"caf\xe9")
    other = GROOD(None).fit_features(*features, classes=[name if where == "classes" else "a", "b", "c", "d"])
    other.metadata = {"path": name if where == "metadata" else "a"}
    other.save(tmp_path / "x")
    assert_equal(other, GROOD.load(tmp_path / "x"))


class _Custom(OutlierSource):
    def features(self, context: OutlierContext) -> Tensor:
        return context.class_prototypes.mean(0, keepdim=True)

    def config(self) -> dict[str, Any]:
        return {"name": "_Custom"}


def test_a_detector_with_an_own_outlier_source(tmp_path: Path) -> None:
    model = Net()
    fitted_on_images(_Custom(), model).save(tmp_path / "x")
    assert GROOD.load(tmp_path / "x", model).fit_info_.outlier_source == {"name": "_Custom"}


# --- Damage -------------------------------------------------------------------------------------------------------


def test_truncated_at_any_length(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    steps = [0, 1, 7, 8, 9, header_end - 1, header_end, header_end + 1, len(content) - 1]
    generator = random.Random(0)
    lengths = steps + [generator.randrange(len(content)) for _ in range(45)]
    path = tmp_path / "truncated"
    for length in lengths:
        path.write_bytes(content[:length])
        kind = FormatError if length < 9 else TruncatedFileError
        with pytest.raises(kind, match="is truncated: it has" if length > 8 else "is no detector file|is truncated"):
            GROOD.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(AlteredFileError, match="was altered"):
        GROOD.load(path)


@pytest.mark.parametrize(("index", "flips"), [("exact", 300), ("IVF4,Flat", 60)])
def test_flipped_bits_are_an_error_or_harmless(
    index: str, flips: int, features: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """A flipped bit is a FormatError; half of them fall in the header. Only padding may be another kind of space."""
    train, labels = features
    detector = GROOD(None, index=index).fit_features(train[:120], labels[:120]).calibrate_features(train[120:])
    assert detector._learned.state is not None
    path = tmp_path / "flipped"
    detector.save(path)
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    generator = random.Random(1)
    n_errors = 0
    for i in range(flips):
        position = generator.randrange(header_end if i % 2 else len(content))
        broken = bytearray(content)
        broken[position] ^= 1 << generator.randrange(8)
        path.write_bytes(broken)
        try:
            loaded = GROOD.load(path)
        except FormatError:
            n_errors += 1
            continue
        assert not loaded.score_features(train[:3]).isnan().any(), position
    assert n_errors >= flips - 2


def test_altered_gradients_do_not_end_the_process(edited: Callable[..., Path]) -> None:
    def alter(tensors: dict[str, Tensor]) -> None:
        tensors["direction"][0, 0] = 1e38

    path = edited(set_("index", "spec", "IVF4,Flat"), alter)
    code = (
        f"from torch_grood import GROOD, FormatError\ntry:\n    GROOD.load({str(path)!r})\n"
        "except FormatError:\n    print('FormatError')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert (found.returncode, found.stdout.strip()) == (0, "FormatError")


@pytest.mark.parametrize(("name", "factor"), [("direction", 5.0), ("log_magnitude", -5.0)])
def test_impossible_gradients(name: str, factor: float, edited: Callable[..., Path]) -> None:
    # ‖direction‖ is 1 or 0, and log π ≤ 0.
    with pytest.raises(FormatError):
        GROOD.load(edited(None, lambda tensors: tensors[name].mul_(factor)))


def set_(*keys_and_value: Any) -> Edit:
    *keys, last, value = keys_and_value

    def edit(header: dict[str, Any]) -> None:
        for key in keys:
            header = header[key]
        header[last] = value

    return edit


def drop(*keys: str) -> Edit:
    def edit(header: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            header = header[key]
        del header[last]

    return edit


BAD_HEADERS: list[tuple[Edit, str]] = [
    (set_("format_version", 6), "has format 6, written by torch-grood .*reads up to 5. Install a newer torch-grood"),
    (set_("format_version", 10**9), "Install a newer"),
    (set_("format_version", 0), "does not tell the version of its format"),
    (set_("format_version", "1"), "does not tell the version"),
    (set_("format_version", 1.0), "does not tell the version"),
    (set_("format_version", None), "does not tell the version"),
    (drop("format_version"), "does not tell the version"),
    *[(drop(key), key) for key in ("classes", "outliers", "index", "seed", "fingerprint", "fit", "fpr", "metadata")],
    *[(drop("fit", key), key) for key in ("n_samples", "uses_ood_data", "outlier_source")],
    (drop("index", "spec"), "spec"),
    (set_("classes", ["a", "b", "c"]), "not among the 3 names"),
    (set_("classes", []), "not among the 0 names"),
    (set_("classes", 4), "altered"),
    (set_("classes", None), "altered"),
    (set_("seed", None), "altered"),
    (set_("seed", "x"), "altered"),
    (set_("fpr", 1.0), "fpr is the share"),
    (set_("fpr", "0.1"), "fpr is the share"),
    (set_("fpr", 1e-5), "cannot be promised"),
    (set_("index", []), "altered"),
    (set_("index", "spec", 5), "altered"),
    (set_("index", "spec", "Nope"), "cannot be kept in a file"),
    (set_("index", "spec", "IVF999,Flat"), "'IVF999,Flat' lacks its tensors"),
    (set_("index", {"spec": "Flat", "unknown": 1}), "unknown"),
    (set_("index", {"spec": "Flat", "candidates": "8"}), "altered"),
    (set_("index", {"spec": "Flat", "parameters": [1]}), "altered"),
    (set_("outliers", None), "altered"),
    (set_("outliers", {"n": 3}), "altered"),
    (set_("outliers", {"name": "Mixup", "lam": 7}), "lam is the weight"),
    (set_("outliers", {"name": "Mixup", "unknown": 7}), "bad arguments of outlier source Mixup"),
    (set_("outliers", {"name": "OutlierSamples", "unknown": 7}), "unknown"),
    (set_("outliers", ["Mixup"]), "altered"),
    (set_("fingerprint", "x"), "altered"),
    (set_("fingerprint", {"architecture": ""}), "altered"),
    (set_("fit", []), "altered"),
    (set_("fit", "image_shape", 3), "altered"),
    (set_("metadata", [1]), "metadata are not a JSON object"),
    (set_("metadata", None), "metadata are not a JSON object"),
]


@pytest.mark.parametrize(("edit", "message"), BAD_HEADERS)
def test_altered_headers(edit: Edit, message: str, edited: Callable[..., Path]) -> None:
    path = edited(edit)
    with pytest.raises(FormatError, match=message) as caught:
        GROOD.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "null", "[]", '"x"', "{", "1", "{}", "\0"])
def test_headers_that_are_no_object(text: str, edited: Callable[..., Path]) -> None:
    with pytest.raises(FormatError, match=r"the header was altered|does not tell the version"):
        GROOD.load(edited(text=text))


@pytest.mark.parametrize(
    "edit",
    [
        set_("seed", float("inf")),
        set_("fpr", 1e-310),
        set_("index", {"spec": "Flat", "candidates": 0}),
        set_("index", {"spec": "IVF4,Flat", "parameters": {"nprobe": 0}}),
        set_("index", {"spec": "IVF4,Flat", "parameters": {"nprobe": float("inf")}}),
        set_("classes", "abcd"),
        set_("classes", [[1], {}, None, 1.5]),
        set_("classes", ["a", "a", "a", "a"]),
        set_("fit", "n_samples", "many"),
        set_("fit", "uses_ood_data", "no"),
        set_("fit", "uses_ood_data", 1),
        set_("index", {"spec": "exact", "unknown": 1}),
        set_("format_version", True),
    ],
)
def test_headers_of_wrong_values(edit: Edit, edited: Callable[..., Path]) -> None:
    with pytest.raises(FormatError):
        GROOD.load(edited(edit))


@pytest.mark.parametrize("seed", [-7, 2**70, 1.7, "7"])
def test_an_altered_seed(seed: object, edited: Callable[..., Path]) -> None:
    with pytest.raises(FormatError):
        GROOD.load(edited(set_("seed", seed)))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere that much memory may be promised")
def test_an_index_beyond_all_memory(edited: Callable[..., Path]) -> None:
    with pytest.raises(FormatError):
        GROOD.load(edited(set_("index", "spec", "HNSW1000000000,Flat")))


def test_a_deeply_nested_header(edited: Callable[..., Path]) -> None:
    with pytest.raises(FormatError):
        GROOD.load(edited(text="[" * 100_000))


TENSORS = ["class_prototypes", "ood_prototype", "class_ids", "log_magnitude", "direction", "sample_ids"]


@pytest.mark.parametrize("name", [*TENSORS, "calibration"])
@pytest.mark.parametrize("change", ["missing", "dtype", "scalar", "extra axis", "empty"])
def test_altered_tensors(name: str, change: str, edited: Callable[..., Path]) -> None:
    def alter(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(name)
        changed = {
            "dtype": tensor.to(torch.float16),
            "scalar": tensor.flatten()[0].clone(),
            "extra axis": tensor[None].clone(),
            "empty": tensor[:0].clone(),
        }
        if change != "missing":
            tensors[name] = changed[change]

    with pytest.raises(FormatError):
        GROOD.load(edited(None, alter))


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_together(name: str, edited: Callable[..., Path]) -> None:
    with pytest.raises(FormatError, match="shapes of the tensors do not fit together"):
        GROOD.load(edited(None, lambda tensors: tensors.update({name: tensors[name][:-1].clone()})))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["class_prototypes", "ood_prototype", "log_magnitude", "direction"])
def test_tensors_that_are_not_finite(name: str, value: float, edited: Callable[..., Path]) -> None:
    def alter(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    with pytest.raises(FormatError, match=f"tensor '{name}' holds NaN or infinity"):
        GROOD.load(edited(None, alter))


def test_classes_out_of_range(edited: Callable[..., Path]) -> None:
    for value in (-1, 4):
        with pytest.raises(FormatError, match="not among the 4 names"):
            GROOD.load(edited(None, lambda tensors, value=value: tensors["class_ids"].fill_(value)))


def test_calibration_scores_that_are_broken(edited: Callable[..., Path]) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        tensors["calibration"] = tensors["calibration"].flip(0).clone()

    with pytest.raises(FormatError, match="not in ascending order"):
        GROOD.load(edited(None, swap))
    with pytest.raises(FormatError, match="NaN"):
        GROOD.load(edited(None, lambda tensors: tensors["calibration"][-1:].fill_(torch.nan)))


def test_calibration_of_minus_infinity_is_legal(edited: Callable[..., Path]) -> None:
    loaded = GROOD.load(edited(None, lambda tensors: tensors["calibration"][:1].fill_(-torch.inf)))
    assert loaded.threshold_ is not None


def test_what_a_newer_version_may_add_is_ignored(detector: GROOD, edited: Callable[..., Path]) -> None:
    def header(content: dict[str, Any]) -> None:
        content["new"] = content["fit"]["new"] = 1

    assert_equal(detector, GROOD.load(edited(header, lambda tensors: tensors.update(new=torch.ones(2)))))


# --- An index of faiss --------------------------------------------------------------------------------------------

INDEXES = ["Flat", "SQ8", "PQ4x4", "IVF8,Flat", "IVF8_HNSW4,SQ8", "HNSW8", "PCA4,IVF8,PQ2x4", "RR6,HNSW4,SQ8"]
INDEXES += ["IVF4,SQfp16", "SQbf16"]


@pytest.fixture(scope="module")
def with_lists(features: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with an index of inverted lists."""
    train, labels = features
    path = tmp_path_factory.mktemp("lists") / "detector.grood"
    GROOD(None, index=FaissIndex("IVF8,Flat", {"nprobe": 2}, 2)).fit_features(train[:200], labels[:200]).save(path)
    return path


def nothing_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("trained or measured again")

    monkeypatch.setattr("torch_grood.neighbors.faiss._sample", refuse)
    monkeypatch.setattr("torch_grood.neighbors.faiss._FaissSearcher.measure", refuse)


@pytest.mark.parametrize("store", ["float32", "int8"])
@pytest.mark.parametrize("spec", INDEXES)
def test_an_index_is_kept(
    spec: str, store: str, features: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, labels = features
    first = GROOD(None, index=FaissIndex(spec, candidates=2, train_size=150), store=store)
    first.fit_features(train[:200], labels[:200])
    # What was added and removed since is in the file as well.
    first.add_features(train[200:220], labels[200:220])
    first.remove(range(50))
    first.calibrate_features(train[220:])
    first.save(tmp_path / "x")
    nothing_is_learned(monkeypatch)
    second = GROOD.load(tmp_path / "x")
    assert_equal(first, second)
    assert second.index_quality_ is not None
    queries = train * 1.01
    assert torch.equal(first.log_score_features(queries), second.log_score_features(queries))
    assert_same_predictions(first, second, queries)
    second.save(tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_file_without_the_state_of_its_index(
    with_lists: Path, edited: Callable[..., Path], features: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """So it was in format 1: the index is built from the seed, and measured."""

    def alter(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("index.")]:
            del tensors[name]

    with pytest.raises(AlteredFileError, match="'IVF8,Flat' lacks its tensors"):
        GROOD.load(edited(drop("quality"), alter, source=with_lists))
    header, tensors = parts(with_lists)
    alter(tensors)
    del tensors["zero_rows"], tensors["training_hashes"], header["quality"], header["training"]
    save_file(tensors, tmp_path / "old", metadata={KEY: json.dumps(header | {"format_version": 1})})
    kept, rebuilt = GROOD.load(with_lists), GROOD.load(tmp_path / "old")
    assert rebuilt.index_quality_ == kept.index_quality_
    assert torch.equal(rebuilt.score_features(features[0]), kept.score_features(features[0]))


@pytest.mark.parametrize("name", ["unit", "centre", "lists", "quantizer.vectors"])
@pytest.mark.parametrize("change", ["missing", "dtype", "shape"])
def test_an_altered_state(name: str, change: str, with_lists: Path, edited: Callable[..., Path]) -> None:
    def alter(tensors: dict[str, Tensor]) -> None:
        tensor = tensors.pop(f"index.{name}")
        if change != "missing":
            tensors[f"index.{name}"] = tensor.to(torch.float16) if change == "dtype" else tensor[None].clone()

    path = edited(None, alter, source=with_lists)
    with pytest.raises(FormatError, match=r"the index lacks its|of the index is torch") as caught:
        GROOD.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_("index", "spec", "IVF9,Flat"), "quantizer.vectors of the index is"),
        (set_("index", "spec", "IVF8,SQ8"), "lacks its sq.range"),
        (set_("index", {"spec": "Flat"}), "the index has no lists, quantizer.vectors"),
        (set_("index", {"spec": "LSH"}), "no stored state"),
        (set_("index", {"spec": "exact"}), "exact search has no quality"),
        (set_("index", "spec", "IVF8,Flat,RFlat"), "no stored state"),
        (set_("index", "spec", "IMI2x16,Flat"), "cannot be kept in a file"),
        (set_("index", "spec", "IVF8,PQ8x30"), "too large for 200 gradients of dimension 8"),
        (set_("index", "spec", "RR60000,Flat"), "too large"),
        (set_("index", "parameters", {"nprobe": 10**9}), "nprobe"),
        (set_("index", "parameters", {"nprobe": 0}), "nprobe"),
        (set_("index", "parameters", {"nprobe": float("nan")}), "NaN is no number of JSON"),
        (set_("index", "parameters", {"efSearch": 4}), "could not set parameter efSearch"),
        (set_("index", "parameters", {"quantizer_nprobe": 1}), "could not set parameter"),
        (set_("index", "gpu", True), "not for a file to say"),
        (set_("index", "gpu", False), "not for a file to say"),
        (set_("quality", 1), "altered"),
        (set_("quality", {}), "recall_at_1"),
        *[
            (set_("quality", key, value), "the quality of the index is|is no number of JSON")
            for key, values in {
                "recall_at_1": (-0.1, 1.1, float("nan"), "1", None, True),
                "score_inflation": (0.9, float("inf"), float("nan"), [1]),
                "n_queries": (0, -3, 1.5, "5"),
            }.items()
            for value in values
        ],
    ],
)
def test_an_altered_index(edit: Edit, message: str, with_lists: Path, edited: Callable[..., Path]) -> None:
    with pytest.raises(FormatError, match=message):
        GROOD.load(edited(edit, source=with_lists))


def test_a_state_for_exact_search(edited: Callable[..., Path]) -> None:
    with pytest.raises(FormatError, match="are not those of a filter"):
        GROOD.load(edited(None, lambda tensors: tensors.update({"index.unit": torch.ones(1)})))
    with pytest.raises(FormatError, match="exact search has no quality"):
        GROOD.load(edited(set_("quality", {"recall_at_1": 1.0, "score_inflation": 1.0, "n_queries": 3})))


def test_a_kind_of_index_that_cannot_be_read_is_not_written(features: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    detector = GROOD(None, index="L2norm,Flat").fit_features(*features)
    with pytest.raises(GroodError, match=r"an index 'L2norm,Flat' cannot be kept in a file; the kinds that can are"):
        detector.save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_more_candidates_than_gradients_are_no_harm(with_lists: Path, edited: Callable[..., Path]) -> None:
    loaded = GROOD.load(edited(set_("index", "candidates", 10**18), source=with_lists))
    assert not loaded.score_features(torch.ones(3, 8)).isnan().any()


# --- Files that are no detector -----------------------------------------------------------------------------------


class _Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("executed",)


def test_a_pickle_is_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.grood"
    path.write_bytes(pickle.dumps(_Payload()))
    with pytest.raises(FormatError, match=r"x\.grood is no detector file"):
        GROOD.load(path)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(FormatError, match="is no detector file"):
        GROOD.load(path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(_Payload()))
    assert (tmp_path / "executed").exists()


def test_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for content in (b"", b"hello", b"\0" * 100, b"\xff" * 100, b"{}", random.Random(0).randbytes(1000)):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="is no detector file"):
            GROOD.load(path)
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.ones(3)}, path, metadata=metadata)
        with pytest.raises(FormatError, match="is a safetensors file, but no detector of torch-grood"):
            GROOD.load(path)


def test_a_directory_and_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path / "no folder" / "x"):
        with pytest.raises(FormatError, match="there is no detector file"):
            GROOD.load(path)
    for path in (tmp_path, Path(), Path(os.devnull)):
        with pytest.raises(FormatError, match="is no regular file"):
            GROOD.load(path)


# --- Another model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_with_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "x"
    fitted_on_images(Mixup(n=10), Net()).save(path)
    return path


def test_other_weights(saved_with_model: Path) -> None:
    with pytest.raises(ModelMismatchError, match="same architecture with other weights"):
        GROOD.load(saved_with_model, Net(seed=1))
    one_bit = Net()
    with torch.no_grad():
        one_bit.fc.bias[0] = torch.nextafter(one_bit.fc.bias[0], torch.tensor(9.0))
    with pytest.raises(ModelMismatchError, match="other weights"):
        GROOD.load(saved_with_model, one_bit)


def test_another_architecture(saved_with_model: Path) -> None:
    for other in (Net(width=7), Net().double(), nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), nn.Identity()):
        with pytest.raises(ModelMismatchError, match="fitted on another model"):
            GROOD.load(saved_with_model, other)
    with pytest.raises(GroodError, match=r"expected a torch.nn.Module"):
        GROOD.load(saved_with_model, "resnet18")  # type: ignore[arg-type]


def test_a_wrapped_model_is_the_same(saved_with_model: Path) -> None:
    assert GROOD.load(saved_with_model, nn.DataParallel(Net())).head == "fc"


def test_a_model_for_a_detector_of_features(saved: Path) -> None:
    with pytest.raises(
        ModelMismatchError, match=r"fitted on features, without a model; use it without one: GROOD.load\(path"
    ):
        GROOD.load(saved, Net())


# --- Writing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file that must survive, alone in its folder."""
    path = tmp_path / "old.grood"
    path.write_bytes(b"old")
    yield path
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(_: Any, path: Path, **__: Any) -> None:
    Path(path).write_bytes(b"half")
    raise OSError(errno.EIO, "Input/output error")


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_write_that_fails(old: Path, detector: GROOD, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.save_file", half_written)
    with pytest.raises(GroodError, match=r"cannot write .*old.grood: Input/output error"):
        detector.save(old)


@pytest.mark.parametrize("name", ["replace", "chmod"])
def test_a_renaming_that_fails(name: str, old: Path, detector: GROOD, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, name, no_space)
        patch.setattr(os, name, no_space)
        with pytest.raises(GroodError, match=r"cannot write .*No space left on device"):
            detector.save(old)


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.fsync"])
def test_an_interrupt_leaves_nothing_behind(
    where: str, old: Path, detector: GROOD, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        detector.save(old)


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX")
def test_a_full_disk(old: Path, detector: GROOD) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(GroodError, match="cannot write"):
            detector.save(old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_folders_that_cannot_be_written_to(detector: GROOD, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "x", tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(GroodError, match=r"cannot write|is a folder; give the name of a file in it"):
            detector.save(path)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file", tmp_path / "folder"]
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(detector: GROOD, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(GroodError, match=r"cannot write .*Permission denied"):
            detector.save(tmp_path / "x")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_file_has_the_mode_that_the_user_asked_for(mask: int, detector: GROOD, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        detector.save(tmp_path / "x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~mask


def test_an_unfitted_detector_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(GroodError, match="not fitted"):
        GROOD(None).save(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


# --- The golden file ----------------------------------------------------------------------------------------------


def test_golden_file_of_format_1(tmp_path: Path) -> None:
    assert GOLDEN.stat().st_size < 20_000
    path = shutil.copy(GOLDEN, tmp_path / "golden")
    loaded = GROOD.load(path)
    assert loaded.classes_ == ("Affe", "naïve", "犬")
    assert loaded.metadata == {"note": "π ≠ 3", "nested": {"list": [1, 2.5, None, True]}}
    assert (loaded.seed, loaded.fit_info_.n_samples, loaded.fit_info_.n_indexed) == (11, 48, 41)
    assert loaded.outliers == PrototypeMean()
    found = loaded.predict_features(golden_features()[3])
    # exp, log and sums may differ in the last bits between processors; a changed formula differs in the first.
    expected = [float.fromhex(number) for number in GOLDEN_LOG_SCORES]
    assert loaded.log_score_features(golden_features()[3]).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert found.neighbor.tolist() == GOLDEN_NEIGHBORS
    assert (found.p_value * 40).round().long().tolist() == GOLDEN_RANKS
    assert found.is_ood.tolist() == [rank <= 4 for rank in GOLDEN_RANKS]
    assert found.prototype_label.tolist() == GOLDEN_PROTOTYPES


def test_the_golden_detector_is_what_would_be_written_today(tmp_path: Path) -> None:
    write_golden(tmp_path / "today")
    golden, today = load_file(GOLDEN), load_file(tmp_path / "today")
    assert today.keys() - golden.keys() == {"zero_rows", "training_hashes", "checksums"}
    for name, tensor in golden.items():
        torch.testing.assert_close(today[name], tensor, rtol=1e-6 if name == "direction" else 1e-12, atol=1e-12)


GOLDEN_LOG_SCORES = [
    "-0x1.02351e12edc33p+2",
    "-0x1.df76b08f85d86p+1",
    "-0x1.58f5b8ee8e345p+2",
    "-0x1.c611b4e9cb3a6p+1",
    "-0x1.1ab44dc1fe100p+2",
    "-0x1.22debb5b92bf3p+1",
    "-0x1.fc97e4d6b5611p+1",
    "-0x1.003c67466e687p+0",
]
GOLDEN_NEIGHBORS = [15, 43, 11, 33, 43, 26, 15, 22]
GOLDEN_RANKS = [24, 17, 40, 15, 35, 6, 22, 1]
GOLDEN_PROTOTYPES = [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.skipif(os.name != "posix", reason="pipes and links are POSIX")
def test_only_files_are_replaced(detector: GROOD, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GroodError, match="pipe is not a regular file; give another name"):
        detector.save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    detector.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    GROOD.load(tmp_path / "real")


def test_golden_file_of_format_2() -> None:
    assert GOLDEN_2.stat().st_size < 20_000
    loaded = GROOD.load(GOLDEN_2)
    store = loaded._need_state().searcher.gradients
    assert (store.dtype, len(store), loaded.fit_info_.n_correct) == ("int8", 32, 41)
    assert loaded.subset == ClassSample(ratio=0.75)
    assert loaded.index == FaissIndex("IVF4,Flat", {"nprobe": 4})
    assert loaded.index_quality_ is not None
    expected = [float.fromhex(number) for number in GOLDEN_2_LOG_SCORES]
    assert loaded.log_score_features(golden_features()[3]).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


GOLDEN_2_LOG_SCORES = [
    "-0x1.fcbd443a0f02dp+1",
    "-0x1.def3c5057a694p+1",
    "-0x1.590232196d976p+2",
    "-0x1.c6225afabad60p+1",
    "-0x1.1af2fa6924571p+2",
    "-0x1.2241004b374aep+1",
    "-0x1.f9115a5de3c9bp+1",
    "-0x1.003f47c533d87p+0",
]


def test_golden_file_of_format_3(tmp_path: Path) -> None:
    assert GOLDEN_3.stat().st_size < 20_000
    loaded = GROOD.load(GOLDEN_3, GoldenModel())
    features, _, _, queries = golden_features()
    queries = queries + 0.5
    assert loaded.classes_ == ("Affe", "naïve", "犬")
    assert loaded.metadata == {"note": "π ≠ 3", "nested": {"list": [1, 2.5, None, True]}}
    assert (loaded.seed, loaded.store.dtype, loaded.head) == (2**62 + 1, "float16", "1")
    info = loaded.fit_info_
    assert (info.n_samples, info.n_indexed, info.n_added, info.n_removed) == GOLDEN_3_COUNTS
    assert loaded.calibration_ is not None
    assert (loaded.calibration_.n, loaded.calibration_.n_left_out) == (78, 2)
    names = loaded.sample_names(range(54))
    assert [i for i, name in enumerate(names) if name is None] == [5, 50]
    assert names[53] == GoldenPhotographs(features[:1], features[:1], 53).names()[0]
    found = loaded.predict_features(queries)
    expected = [float.fromhex(number) for number in GOLDEN_3_LOG_SCORES]
    assert loaded.log_score_features(queries).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert found.neighbor.tolist() == GOLDEN_3_NEIGHBORS
    assert found.prototype_label.tolist() == GOLDEN_3_PROTOTYPES
    assert found.p_value is not None
    sizes = torch.bincount(loaded.threshold_.groups, minlength=3)[found.prototype_label]  # type: ignore[union-attr, arg-type]
    assert (found.p_value * (sizes + 1)).tolist() == pytest.approx(GOLDEN_3_RANKS, abs=1e-9)
    images = queries.view(-1, 1, 2, 3).float()
    assert torch.equal(loaded.score(images, progress=False), loaded.score_features(queries))
    # The training images are known by their content, the removed ones no more.
    training = torch.cat([features, golden_features()[3][:6] + 0.25]).view(-1, 1, 2, 3).float()
    with pytest.raises(GroodError, match="52 of 54 calibration samples are training samples"):
        loaded.calibrate(training, fpr=0.2, progress=False)


def numbers_of(tensors: dict[str, Any], name: str, code: str) -> list[float]:
    """A tensor's numbers, of struct's type `code`, from its bytes."""
    content = tensors[name][2]
    return list(struct.unpack(f"<{len(content) // struct.calcsize(code)}{code}", content))


def test_the_golden_file_of_format_3_can_be_read_by_hand() -> None:
    header, tensors = read_by_hand(GOLDEN_3)
    assert header["format_version"] == 3
    loaded = GROOD.load(GOLDEN_3)
    state = loaded._need_state()
    d = state.info.n_features
    assert (tensors["direction"][0], tensors["direction"][1]) == ("F16", [state.info.n_indexed, d])

    numbers = partial(numbers_of, tensors)
    # As docs/format.md says that a feature is scored.
    prototypes, ood, feature = numbers("class_prototypes", "d"), numbers("ood_prototype", "d"), [0.5] * d
    offset = [h - p for h, p in zip(feature, ood, strict=True)]
    length = math.hypot(*offset)
    distances = [math.dist(feature, prototypes[i : i + d]) for i in range(0, len(prototypes), d)]
    magnitude = math.exp(-length) / (sum(math.exp(-x) for x in distances) + math.exp(-length))
    gradient = [magnitude * x / length for x in offset]
    codes, scales = numbers("direction", "e"), numbers("direction_scale", "f")
    scores = []
    for row, (scale, log_magnitude) in enumerate(zip(scales, numbers("log_magnitude", "d"), strict=True)):
        stored = [math.exp(log_magnitude) * scale * code for code in codes[row * d : row * d + d]]
        scores.append(math.dist(gradient, stored))
    score = loaded.score_features(torch.tensor([feature], dtype=torch.float64))
    assert float(score) == pytest.approx(min(scores), rel=1e-6)
    hashes, ends = numbers("training_hashes", "q"), numbers("training_name_ends", "q")
    assert [i for i, number in enumerate(hashes) if number == 0] == [5, 50]
    digest = hashlib.sha256(struct.pack(f"<{len(hashes)}q", *sorted(hashes))).hexdigest()  # type: ignore[type-var]
    assert header["training"] == {"n": 54, "digest": digest}
    names = [tensors["training_names"][2][int(a) : int(b)] for a, b in zip([0, *ends], ends, strict=False)]
    assert [os.fsdecode(name) or None for name in names] == loaded.sample_names(range(54))


def test_the_golden_file_of_format_4_can_be_read_by_hand() -> None:
    """The part that format 3 has not: features of unit length, T, and the mean of k distances."""
    header, tensors = read_by_hand(GOLDEN_4)
    assert header["format_version"] == 4
    assert header["settings"] == {"geometry": "unit", "temperature": None, "k": 3}
    fit, loaded = header["fit"], GROOD.load(GOLDEN_4)
    assert (fit["geometry"], fit["k"]) == ("unit", 3)
    d = fit["n_features"]

    numbers = partial(numbers_of, tensors)
    feature = [0.5, -0.25, 0.75, 0.1, 0.3, -0.6][:d]
    unit = [h / math.hypot(*feature) for h in feature]
    prototypes, ood = numbers("class_prototypes", "d"), numbers("ood_prototype", "d")
    offset = [h - p for h, p in zip(unit, ood, strict=True)]
    length, temperature = math.hypot(*offset), fit["temperature"]
    distances = [math.dist(unit, prototypes[i : i + d]) for i in range(0, len(prototypes), d)]
    own = math.exp(-length / temperature)
    magnitude = own / (sum(math.exp(-x / temperature) for x in distances) + own)
    gradient = [magnitude * x / length for x in offset]
    codes, scales = numbers("direction", "e"), numbers("direction_scale", "f")
    scores = []
    for row, (scale, log_magnitude) in enumerate(zip(scales, numbers("log_magnitude", "d"), strict=True)):
        stored = [math.exp(log_magnitude) * scale * code for code in codes[row * d : row * d + d]]
        scores.append(math.dist(gradient, stored))
    score = loaded.score_features(torch.tensor([feature], dtype=torch.float64))
    assert float(score) == pytest.approx(sum(sorted(scores)[:3]) / 3, rel=1e-6)


def test_settings_that_do_not_fit_are_an_alteration(tmp_path: Path) -> None:
    header, tensors = parts(GOLDEN_4)
    seal(tmp_path / "same", header, tensors)
    GROOD.load(tmp_path / "same")
    for change in (
        {"settings": {"geometry": "raw", "temperature": None, "k": 3}},
        {"settings": {"geometry": "cosine", "temperature": None, "k": 3}},
        {"settings": {"geometry": "unit", "temperature": 0.0, "k": 3}},
        {"settings": {"geometry": "unit", "temperature": 7.5, "k": 3}},
        {"settings": {"geometry": "unit", "temperature": None, "k": 2}},
        {"settings": {"geometry": "unit", "temperature": None, "k": "3"}},
        {"settings": {"geometry": "unit", "temperature": None, "k": 3, "more": 1}},
        {"settings": None},
        {"fit": header["fit"] | {"k": 0}},
        {"fit": header["fit"] | {"outlier_source": {"name": "HighEnergy", "n": [[]] * 50_000}}},
        {"fit": header["fit"] | {"k": 10**6}, "settings": {"geometry": "unit", "temperature": None, "k": 10**6}},
        {"fit": header["fit"] | {"temperature": 0.0}},
        {"fit": header["fit"] | {"geometry": "raw"}},
        {"format_version": 3},
    ):
        seal(tmp_path / "altered", header | change, tensors)
        with pytest.raises(AlteredFileError, match="altered"):
            GROOD.load(tmp_path / "altered")
    del header["settings"]
    seal(tmp_path / "altered", header, tensors)
    with pytest.raises(AlteredFileError, match="altered"):
        GROOD.load(tmp_path / "altered")


def test_the_golden_detector_of_format_4_is_what_would_be_written_today(tmp_path: Path) -> None:
    write_golden_4(tmp_path / "today")
    (golden, tensors), (today, new) = read_by_hand(GOLDEN_4), read_by_hand(tmp_path / "today")
    for header in (golden, today):
        for name in ("library_version", "checksums"):
            del header[name]
        header["fit"]["rounding_radius"] = pytest.approx(header["fit"]["rounding_radius"], rel=1e-6)
        header["fit"]["temperature"] = pytest.approx(header["fit"]["temperature"], rel=1e-12)
    assert golden == today
    for name, (dtype, shape, content) in tensors.items():
        assert new[name][:2] == (dtype, shape)
        if not dtype.startswith("F"):
            assert new[name][2] == content
    golden_tensors, new_tensors = load_file(GOLDEN_4), load_file(tmp_path / "today")
    for name in tensors:
        if golden_tensors[name].is_floating_point():
            tolerance = 2e-3 if name == "direction" else 1e-6 if name == "direction_scale" else 1e-12
            torch.testing.assert_close(new_tensors[name], golden_tensors[name], rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("path", [GOLDEN, GOLDEN_2, GOLDEN_3, GOLDEN_4], ids=lambda path: path.name)
def test_what_was_read_from_an_old_file_is_written_in_the_newest_format(path: Path, tmp_path: Path) -> None:
    old = GROOD.load(path)
    old.save(tmp_path / "new")
    new = GROOD.load(tmp_path / "new")
    assert parts(tmp_path / "new")[0]["format_version"] == 4
    queries = golden_features()[3]
    assert torch.equal(new.log_score_features(queries), old.log_score_features(queries))
    assert new.fit_info_ == old.fit_info_
    assert (new.training_ is None) == (old.training_ is None)
    new.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()


GOLDEN_3_COUNTS = (54, 45, 6, 2)
GOLDEN_3_LOG_SCORES = [
    "-0x1.0cc189fdf1270p+2",
    "-0x1.77b55e11e59f5p+2",
    "-0x1.3297641320c71p+2",
    "-0x1.35e67b975633fp+2",
    "-0x1.43f2a963e240ap+2",
    "-0x1.23b58160fbe14p+2",
    "-0x1.b1081e0acaba4p+1",
    "-0x1.5e30880657455p+0",
]
GOLDEN_3_NEIGHBORS = [48, 49, 14, 51, 52, 53, 48, 22]
GOLDEN_3_RANKS = [27, 27, 27, 27, 27, 23, 15, 1]
GOLDEN_3_PROTOTYPES = [0, 1, 2, 0, 1, 2, 0, 1]


if __name__ == "__main__":
    write_golden_4(GOLDEN_4)
