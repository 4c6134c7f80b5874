from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import run

from torch_grood import GROOD

MODEL = ("--model", "nets.py:net")


def test_calibrate_replaces_the_threshold(digits: Path) -> None:
    result = run("calibrate", "net.grood", "val", *MODEL, "--fpr", "0.1", "--output", "other.grood")
    assert result.code == 0
    assert "wrote other.grood" in result.out
    assert "at most 10 % false alarms" in result.out
    found = {name: GROOD.load(f"{name}.grood") for name in ("net", "other")}
    thresholds = {name: detector.threshold_ for name, detector in found.items()}
    assert thresholds["net"] is not None
    assert thresholds["other"] is not None
    assert (thresholds["net"].fpr, thresholds["other"].fpr) == (0.05, 0.1)
    assert thresholds["net"].log_scores.equal(thresholds["other"].log_scores)
    assert found["net"].metadata | {"calibration": {"paths": ["val"]}} == found["other"].metadata
    assert run("calibrate", "net.grood", "val", *MODEL, "--fpr", "0.2", "--quiet").code == 0
    replaced = GROOD.load("net.grood").threshold_
    assert replaced is not None
    assert replaced.fpr == 0.2


def test_training_images_are_refused_or_left_out(digits: Path) -> None:
    before = (digits / "net.grood").read_bytes()
    result = run("calibrate", "net.grood", "train", *MODEL)
    assert result.code == 1
    assert "351 of 351 calibration samples are training samples (" in result.err
    assert "--drop-training" in result.err
    assert (digits / "net.grood").read_bytes() == before
    shutil.copytree("val", "mixed")
    shutil.copy(next((digits / "train" / "zero").iterdir()), digits / "mixed" / "zero" / "seen.png")
    result = run("calibrate", "net.grood", "mixed", *MODEL)
    assert "1 of" in result.err
    assert "mixed/zero/seen.png" in result.err
    result = run("calibrate", "net.grood", "mixed", *MODEL, "--drop-training")
    assert result.code == 0
    assert "left out 1 of" in result.err
    assert "1 left out that are training images" in run("info", "net.grood").out


def test_class_thresholds_and_operating_points(digits: Path) -> None:
    assert "false alarms of this calibration (95 %)" in run("calibrate", "net.grood", "val", *MODEL).out
    result = run("calibrate", "net.grood", "val", *MODEL, "--class-thresholds", "--fpr", "0.1")
    assert (result.code, "one for each of 4 classes" in result.out) == (0, True)
    facts = json.loads(run("info", "net.grood", "--format", "json").raw)
    assert [point["class"] for point in facts["threshold"]["classes"]] == ["one", "three", "two", "zero"]
    assert facts["calibration"]["n"] == facts["threshold"]["n"]
    result = run("calibrate", "net.grood", "val", *MODEL, "--class-thresholds", "--fpr", "0.001")
    assert result.code == 1
    assert "needs at least 999 calibration samples for each class; too few: class 'one'" in result.err


def test_info_verify(digits: Path) -> None:
    assert "every byte is as it was written" in run("info", "net.grood", "--verify").out
    content = bytearray((digits / "net.grood").read_bytes())
    content[len(content) // 2] ^= 1
    (digits / "net.grood").write_bytes(content)
    result = run("info", "net.grood", "--verify")
    assert (result.code, "was altered" in result.err) == (1, True)


def test_calibrate_mistakes(digits: Path) -> None:
    (digits / "marked.txt").write_text("".join(f"{path} -1\n" for path in sorted((digits / "ood").iterdir())))
    before = (digits / "net.grood").read_bytes()
    for arguments, message in (
        (("net.grood", "marked.txt", *MODEL), "have the label −1, OOD; calibrate on in-distribution images only"),
        (("net.grood", "val", *MODEL, "--fpr", "0"), "between 0 and 1; got 0"),
        (("net.grood", "val"), "add --model"),
        (("absent.grood", "val"), "absent.grood"),
    ):
        result = run("calibrate", *arguments)
        assert (result.code, message in result.err) == (1, True), result.err
    assert (digits / "net.grood").read_bytes() == before


def test_info(digits: Path) -> None:
    (digits / "nets.py").write_text("raise RuntimeError('started')")
    (digits / "net.safetensors").unlink()
    result = run("info", "net.grood")
    assert (result.code, result.err) == (0, "")
    for text in ("classes 4: one, three, two, zero", "HighEnergy(n=", "nets.py:net, weights net.safetensors", "τ ="):
        assert text in result.out
    assert "real OOD data" not in result.out
    facts = json.loads(run("info", "net.grood", "--format", "json").raw)
    assert facts["fit"]["n_classes"] == 4
    assert facts["threshold"]["fpr"] == 0.05
    assert facts["metadata"]["transform"]["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"model": "\x1b[31mred", "transform": 7},
        {"model": {"spec": "\x1b]0;title\x07", "weights": ["\x1b[2J"]}, "transform": {"resize": "\x1b[2J"}},
        {"model": {"spec": "x" * 100_000}},
    ],
)
def test_info_shows_hostile_metadata_harmlessly(digits: Path, metadata: dict[str, object]) -> None:
    detector = GROOD.load("net.grood")
    detector.metadata = metadata
    detector.save("net.grood")
    result = run("info", "net.grood")
    assert result.code == 0
    assert "\x1b" not in result.raw
    assert len(result.raw) < 3000
    assert run("info", "net.grood", "--format", "json").code == 0


def test_info_of_other_files(digits: Path) -> None:
    for name in ("absent.grood", "nets.py", "net.safetensors", "train"):
        result = run("info", name)
        assert (result.code, result.out, result.err.startswith("error: ")) == (1, "", True), name
