"""`grood demo`, run once: its files, its figures within bounds that a broken detector would leave, its errors."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from scipy.stats import betabinom  # type: ignore[import-untyped]
from typer.testing import CliRunner

import torch_grood.demo
from torch_grood import GROOD
from torch_grood.cli.demo import demo, next_command
from torch_grood.data import ImageTransform, load_image
from torch_grood.demo import DemoResult, DigitsCNN, FalseAlarms, run_demo
from torch_grood.demo.digits import load_digits_data
from torch_grood.errors import GroodError, MissingDependencyError
from torch_grood.models import is_builtin_spec, load_model

SETS = {"train", "calibration", "test", "near", "photos", "noise"}


@pytest.fixture(scope="module")
def announced() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, announced: list[str]) -> DemoResult:
    random_state = torch.get_rng_state()
    found = run_demo(tmp_path_factory.mktemp("demo") / "new" / "folder", seed=0, progress=announced.append)
    assert torch.equal(torch.get_rng_state(), random_state), "the caller's random state was changed"
    return found


def test_files(result: DemoResult) -> None:
    names = {path.relative_to(result.output).as_posix() for path in result.output.rglob("*") if path.is_file()}
    images = {name for name in names if name.startswith("images/")}
    assert names - images == {"digits.grood", "digits_cnn.safetensors", "results.json", "scores.png"}
    kinds = [Path(name).name.partition("-")[0] for name in images]
    assert [kinds.count(kind) for kind in ("id", "near", "far")] == [6, 4, 4]
    with Image.open(result.output / "scores.png") as figure:
        assert figure.size == (1600, 1000)
        assert len(figure.convert("RGB").getcolors(maxcolors=2**24) or ()) > 100


def test_results_json(result: DemoResult) -> None:
    read = json.loads((result.output / "results.json").read_text())
    assert read == result.to_dict()
    assert set(read["counts"]) == SETS
    assert list(read["metrics"]) == ["GROOD", "MSP", "energy", "KNN"]
    for figures in read["metrics"].values():
        assert list(figures) == ["near", "photos", "noise"]
        assert {one["n_id"] for one in figures.values()} == {300}
    assert set(read["flagged"]) == {"test", "near", "photos", "noise"}
    assert set(read["seconds"]) == {"load", "train", "fit", "calibrate", "score", "baselines", "write"}
    assert {"torch-grood", "torch", "python", "pytorch-ood"} <= set(read["versions"])
    assert read["settings"]["early_layer"] is None
    assert "HighEnergy" in read["settings"]["outliers"]


def test_figures_are_plausible(result: DemoResult) -> None:
    """Chance is AUROC 0.5; a sign turned round, a wrong gradient or other pixel scales for OOD would show."""
    assert result.classifier_accuracy > 0.97
    assert result.prototype_accuracy > 0.97
    for name, figures in result.metrics.items():
        assert all(0.9 < one.auroc <= 1 for one in figures.values()), name
    assert result.metrics["GROOD"]["near"].auroc > 0.97
    assert result.mean("GROOD", "auroc", ("photos", "noise")) == pytest.approx(
        (result.metrics["GROOD"]["photos"].auroc + result.metrics["GROOD"]["noise"].auroc) / 2
    )
    assert min(result.flagged[name] for name in ("near", "photos", "noise")) > 0.8
    assert 0 < result.tau < 1


def test_false_alarms_keep_the_promise(result: DemoResult) -> None:
    """Over calibration sets the rate behind τ is Beta(15, 286), so the count on 300 is beta-binomial."""
    alarms = result.false_alarms
    rank = int(0.05 * (alarms.n_calibration + 1))
    low, high = betabinom(alarms.n, rank, alarms.n_calibration + 1 - rank).ppf([0.0005, 0.9995])
    assert low <= alarms.count <= high
    assert result.flagged["test"] == alarms.observed == alarms.count / alarms.n
    assert alarms.low <= alarms.observed <= alarms.high


def test_consistent_unless_surely_above_the_promise() -> None:
    assert FalseAlarms(0.05, 9, 300, 300, 0.0138, 0.0562).is_consistent
    assert FalseAlarms(0.05, 0, 300, 300, 0.0, 0.0122).is_consistent, "fewer alarms than promised break no promise"
    assert not FalseAlarms(0.05, 30, 300, 300, 0.068, 0.139).is_consistent


def test_same_seed_same_figures(result: DemoResult, tmp_path: Path) -> None:
    again = run_demo(tmp_path, seed=0)
    assert replace(again, output=result.output) == result
    for name in ("digits_cnn.safetensors", "scores.png", "images/far-noise-1.png"):
        assert (tmp_path / name).read_bytes() == (result.output / name).read_bytes(), name


def test_the_detector_works_from_its_files(result: DemoResult) -> None:
    """What the command printed at the end does: model and transform from the detector's header, images from PNGs."""
    path = result.output / "digits.grood"
    metadata = GROOD.load(path).metadata
    spec = metadata["model"]["spec"]
    assert is_builtin_spec(spec)
    model = load_model(spec, weights=path.parent / metadata["model"]["weights"]).model
    transform = ImageTransform.from_dict(metadata["transform"])
    files = sorted((result.output / "images").glob("*.png"))
    predicted = GROOD.load(path, model).predict(torch.stack([transform(load_image(file)) for file in files]))
    assert predicted.label is not None
    decisions = zip(predicted.p_value, predicted.is_ood, predicted.label, strict=True)
    by_name = dict(zip([file.stem for file in files], decisions, strict=True))
    for digit in range(6):
        p_value, is_ood, label = by_name[f"id-digit-{digit}"]
        assert int(label) == digit
        assert bool(is_ood) == (p_value <= 0.05)
    # One known image in twenty may be flagged, one unknown may be missed.
    assert sum(bool(by_name[f"id-digit-{digit}"][1]) for digit in range(6)) <= 2
    assert sum(bool(by_name[name][1]) for name in by_name if not name.startswith("id")) >= 7


def test_progress_is_announced(result: DemoResult, announced: list[str]) -> None:
    assert len(announced) == len(result.seconds)
    assert announced[1] == "training a small CNN on 483 digits 0-5"


def test_sets_do_not_overlap() -> None:
    data = load_digits_data(3)
    assert {name for name, _ in data.items()} == SETS
    known = torch.cat([data.train.labels, data.calibration.labels, data.test.labels])
    assert torch.equal(known.bincount(), torch.tensor([178, 182, 177, 183, 181, 182]))
    assert torch.equal(data.near.labels.bincount(), torch.tensor([0, 0, 0, 0, 0, 0, 181, 179, 174, 180]))
    assert len({pixels.tobytes() for pixels in data.photos.pixels}) > 290  # burnt-out sky may repeat
    for _, images in data.items():
        assert images.pixels.dtype == np.uint8
        assert images.pixels.shape[1:] == (8, 8)
        assert len(images) == len(images.labels)


def test_seed_draws_the_split() -> None:
    one, same, other = (load_digits_data(seed).test.pixels for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_one_transform_scales_all_sets_alike() -> None:
    data = load_digits_data(0)
    transform = data.transform()
    for _, images in data.items():
        tensor = images.tensor(transform)
        assert tensor.shape == (len(images), 3, 8, 8)
        restored = tensor[:, 0] * transform.std[0] + transform.mean[0]
        np.testing.assert_allclose(restored.numpy() * 255, images.pixels, atol=1e-3)
    train = data.train.tensor(transform)
    assert float(train.mean()) == pytest.approx(0, abs=1e-4)
    assert float(train.std()) == pytest.approx(1, abs=1e-3)


def test_digits_cnn_needs_no_argument() -> None:
    assert DigitsCNN().eval()(torch.zeros(2, 3, 8, 8)).shape == (2, 6)


def test_output_is_a_file(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for output in (taken, taken / "below"):
        with pytest.raises(GroodError, match=r"cannot write to the folder .*taken.*Choose one that is not a file"):
            run_demo(output)
    assert taken.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_output_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(GroodError, match=r"cannot write to the folder .*Permission denied"):
        run_demo(tmp_path / "demo")


def test_disk_full_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    steps: list[str] = []
    with pytest.raises(GroodError, match="No space left on device"):
        run_demo(tmp_path, progress=steps.append)
    assert steps == []


def test_a_missing_package_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "pytorch_ood":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "pytorch_ood"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match=r"pytorch-ood.*torch-grood\[bench\]"):
        run_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_bad_seed(tmp_path: Path, seed: int) -> None:
    with pytest.raises(GroodError, match=r"seed must be an integer from 0"):
        run_demo(tmp_path, seed=seed)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(rich_markup_mode="rich")
    app.command()(demo)
    return app


def test_command_prints_what_was_found(
    result: DemoResult, app: typer.Typer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Any] = []

    def recorded(output: Path, seed: int, progress: object) -> DemoResult:
        calls.append((output, seed))
        return result

    monkeypatch.setattr(torch_grood.demo, "run_demo", recorded)
    monkeypatch.setenv("COLUMNS", "130")
    run = CliRunner().invoke(app, ["--output", str(tmp_path / "a b"), "--seed", "4"], catch_exceptions=False)
    assert run.exit_code == 0
    assert calls == [(tmp_path / "a b", 4)]
    for name in ("GROOD", "MSP", "energy", "KNN"):
        assert f"{100 * result.metrics[name]['near'].auroc:.2f}" in run.output
    alarms = result.false_alarms
    assert f"{alarms.count} of {alarms.n}; 95 % interval {100 * alarms.low:.1f} to" in run.output
    last = run.output.strip().splitlines()[-1].strip()
    assert last == next_command(tmp_path / "a b")
    assert shlex.split(last)[:3] == ["grood", "score", str(tmp_path / "a b" / "digits.grood")]


def test_help_has_examples(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    run = CliRunner().invoke(app, ["--help"])
    assert run.exit_code == 0
    assert "grood demo --output my-demo --seed 1" in run.output
