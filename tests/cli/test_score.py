from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run

from torch_grood import GROOD
from torch_grood.models import load_model

MODEL = ("--model", "nets.py:net")


def _change_metadata(path: Path, **changes: Any) -> None:
    """What an attacker can do: any metadata, in a well-formed file."""
    detector = GROOD.load(path)
    detector.metadata = {key: value for key, value in (detector.metadata | changes).items() if value is not None}
    detector.save(path)


def test_json(digits: Path) -> None:
    result = run("score", "net.grood", "test", "ood", *MODEL, "--format", "json")
    assert result.code == 0
    rows = json.loads(result.raw)
    paths = [*sorted((digits / "test").rglob("*.png")), *sorted((digits / "ood").iterdir())]
    assert [row["path"] for row in rows] == [str(path.relative_to(digits)) for path in paths]
    assert list(rows[0]) == ["path", "score", "p_value", "is_ood", "label", "prototype_label"]
    known = [row for row in rows if row["path"].startswith("test")]
    unknown = [row for row in rows if row["path"].startswith("ood")]
    assert sum(row["label"] == Path(row["path"]).parent.name for row in known) > 0.9 * len(known)
    assert sum(row["is_ood"] for row in known) < 0.2 * len(known)
    assert sum(row["is_ood"] for row in unknown) > 2 * sum(row["is_ood"] for row in known) * len(unknown) / len(known)
    assert all(row["is_ood"] == (row["p_value"] <= 0.05) for row in rows)


def test_scores_are_those_of_the_library(digits: Path) -> None:
    from torch_grood.data import ImageTransform, image_loader, read_source

    rows = json.loads(run("score", "net.grood", "ood", *MODEL, "--format", "json", "--batch-size", "5").raw)
    detector = GROOD.load("net.grood", load_model("nets.py:net", "net.safetensors").model)
    transform = ImageTransform.from_dict(detector.metadata["transform"])
    expected = detector.score(image_loader(read_source("ood"), transform, batch_size=5))
    assert torch.tensor([row["score"] for row in rows], dtype=torch.float64).equal(expected)


def test_csv_and_files(digits: Path) -> None:
    text = run("score", "net.grood", "ood", *MODEL, "--format", "csv").raw
    rows = list(csv.DictReader(text.splitlines()))
    assert {row["is_ood"] for row in rows} <= {"true", "false"}
    assert len(rows) == len(list((digits / "ood").iterdir()))
    result = run("score", "net.grood", "ood", *MODEL, "--output", "s.csv")
    assert (result.code, result.out) == (0, "")
    assert Path("s.csv").read_text() == text
    assert run("score", "net.grood", "ood", *MODEL, "--output", "s.json").code == 0
    found = json.loads(Path("s.json").read_text())
    assert [row["score"] for row in found] == [float(row["score"]) for row in rows]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run("score", "net.grood", "ood", *MODEL, "--output", "s.parquet").code == 0
    assert parquet.read_table("s.parquet").to_pylist() == found


def test_table_shows_the_most_ood(digits: Path) -> None:
    result = run("score", "net.grood", "test", "ood", *MODEL)
    assert result.code == 0
    shown = [float(score) for score in re.findall(r"\.png │ ([\d.e-]+)", result.out)]
    assert len(shown) == 20
    assert shown == sorted(shown, reverse=True)
    assert re.search(r"the 20 most OOD of \d+ images; --all shows all", result.err)
    everything = run("score", "net.grood", "test", "ood", *MODEL, "--all")
    assert len(re.findall(r"\.png │", everything.out)) > 100
    assert "most OOD of" not in everything.err


def _uncalibrate() -> None:
    detector = GROOD.load("net.grood")
    detector._adopt(detector._need_state())
    detector.save("net.grood")


def _json(*options: str) -> list[dict[str, Any]]:
    result = run("score", "net.grood", "test", "ood", *MODEL, "--format", "json", *options)
    assert result.code == 0, result.err
    rows: list[dict[str, Any]] = json.loads(result.raw)
    return rows


def test_without_a_threshold_there_is_all_but_a_decision(digits: Path) -> None:
    expected = _json()
    _uncalibrate()
    result = run("score", "net.grood", "test", "ood", *MODEL, "--format", "json")
    assert result.code == 0
    assert "warning: this detector is not calibrated: there are scores and classes, but no p-values" in result.err
    assert json.loads(result.raw) == [row | {"p_value": None, "is_ood": None} for row in expected]
    table = run("score", "net.grood", "ood", *MODEL)
    assert table.code == 0
    assert " OOD " not in table.out
    for option in ("--fpr", "--fdr"):
        found = run("score", "net.grood", "ood", *MODEL, option, "0.1")
        assert (found.code, found.out) == (1, "")
        assert f"this detector is not calibrated, which {option} needs; run grood calibrate" in found.err


def test_a_threshold_of_the_user(digits: Path) -> None:
    before = _json()
    tau = sorted(row["score"] for row in before)[100]
    rows = _json("--tau", repr(tau))
    assert [row["is_ood"] for row in rows] == [row["score"] > tau for row in before]
    assert [row["p_value"] for row in rows] == [row["p_value"] for row in before]
    _uncalibrate()
    result = run("score", "net.grood", "test", "ood", *MODEL, "--format", "json", "--tau", repr(tau))
    assert json.loads(result.raw) == [row | {"p_value": None} for row in rows]
    assert "not calibrated" not in result.err


def test_another_operating_point(digits: Path) -> None:
    for fpr in (0.02, 0.3):
        rows = _json("--fpr", str(fpr))
        assert [row["is_ood"] for row in rows] == [row["p_value"] <= fpr for row in rows]
    assert {row["is_ood"] for row in rows} == {True, False}


def test_all_images_together(digits: Path) -> None:
    from torch_grood import benjamini_hochberg

    rows = _json("--fdr", "0.2")
    p_values = torch.tensor([row["p_value"] for row in rows], dtype=torch.float64)
    expected = benjamini_hochberg(p_values, 0.2)
    assert [row["is_ood"] for row in rows] == expected.tolist()
    assert 0 < int(expected.sum()) < len(rows)
    result = run("score", "net.grood", "test", "ood", *MODEL, "--fdr", "0.2")
    assert f"{int(expected.sum())} of {len(rows)} images are flagged at a false discovery rate of 0.2" in result.err


def test_why_nothing_is_flagged(digits: Path) -> None:
    scores = ("score", "net.grood", "test", "ood", *MODEL, "--format", "json")
    n = GROOD.load("net.grood").threshold_.n  # type: ignore[union-attr]
    least = f"{1 / (n + 1):.2g}"
    hopeless = run(*scores, "--fdr", "0.001")
    assert f"0 of {len(json.loads(hopeless.raw))} images are flagged" in hopeless.err
    assert f"warning: nothing can be flagged at --fdr 0.001, whatever the images: no p-value from {n}" in hopeless.err
    assert f"is below {least}. Calibrate on more images, at least 1000" in hopeless.err

    # One that is as far out as the calibration can tell, among a hundred that are not.
    ranked = sorted(_json(), key=lambda row: row["score"])
    some = run("score", "net.grood", *[row["path"] for row in (*ranked[:100], ranked[-1])], *MODEL, "--fdr", "0.1")
    assert ranked[-1]["p_value"] == 1 / (n + 1)
    assert "0 of 101 images are flagged at a false discovery rate of 0.1 warning: 1 of the images have" in some.err
    assert f"the smallest p-value that {n} calibration images can give, {least}, but among 101 images fewer" in some.err
    assert f"fewer than {-(-101 // (0.1 * (n + 1))):.0f} are never flagged at --fdr 0.1" in some.err

    one = run("score", "net.grood", ranked[0]["path"], *MODEL, "--fdr", "0.1")
    assert "0 of 1 images are flagged" in one.err
    assert "the smallest p-value is" in one.err
    assert "warning" not in one.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fpr", "0.1", "--tau", "1"), "--fpr and --tau are different ways to decide; give one of them"),
        (("--fdr", "0.1", "--tau", "1"), "--tau and --fdr are different ways to decide"),
        (("--fpr", "0.1", "--fdr", "0.1", "--tau", "1"), "--fpr and --tau and --fdr are different ways"),
        (("--fpr", "2"), "fpr is the share of ID samples that may be flagged, between 0 and 1; got 2.0"),
        (("--fpr", "0.0001"), "a false-alarm rate of 0.0001 cannot be promised from"),
        (("--fpr", "nan"), "between 0 and 1; got nan"),
        (("--tau", "-1"), "tau is a score, at least 0; got -1.0"),
        (("--tau", "inf"), "tau is a score, at least 0; got inf"),
        (("--fdr", "0"), "fdr is the share of the flagged samples that may be ID, between 0 and 1; got 0.0"),
    ],
)
def test_mistaken_decisions_are_found_before_the_images_are_read(
    digits: Path, options: tuple[str, ...], message: str
) -> None:
    Path("ood/broken.png").write_bytes(b"broken")
    for more in ((), ("--explain",)):
        result = run("score", "net.grood", "ood", *MODEL, *options, *more)
        assert (result.code, result.out) == (1, "")
        assert message in result.err


def test_bad_images(digits: Path) -> None:
    (digits / "ood" / "broken.png").write_bytes(b"broken")
    result = run("score", "net.grood", "ood", *MODEL, "--format", "json")
    assert (result.code, result.out) == (1, "")
    assert "error: ood/broken.png: not an image" in result.err
    assert "(--skip-bad) leaves such files out" in result.err
    result = run("score", "net.grood", "ood", *MODEL, "--format", "json", "--skip-bad", "--workers", "2")
    assert "warning: left out 1 unreadable of" in result.err
    paths = [row["path"] for row in json.loads(result.raw)]
    assert paths == sorted(str(path) for path in Path("ood").iterdir() if path.stem != "broken")
    result = run("score", "net.grood", "ood/broken.png", *MODEL, "--skip-bad")
    assert (result.code, "there is no image to predict" in result.err) == (1, True)


def test_a_file_name_may_be_anything(digits: Path) -> None:
    name = os.fsdecode(b"ood/\xff\x1b[31m.png")
    next((digits / "ood").iterdir()).rename(name)
    result = run("score", "net.grood", "ood", *MODEL, "--format", "json", "--output", "s.json")
    assert result.code == 0
    assert "ood/\\udcff\x1b[31m.png" in [row["path"] for row in json.loads(Path("s.json").read_text())]
    table = run("score", "net.grood", "ood", *MODEL, "--all")
    assert table.code == 0
    assert "\x1b[31m.png" not in table.raw


def test_code_of_the_user_is_not_started_by_a_file(digits: Path) -> None:
    (digits / "nets.py").write_text("raise RuntimeError('started')")
    for spec in ("nets.py:net", "nets:net", "torch_grood.py:net", "os:getcwd"):
        _change_metadata(digits / "net.grood", model={"spec": spec, "weights": "net.safetensors"})
        result = run("score", "net.grood", "ood")
        assert result.code == 1
        assert f"it was fitted on {spec}, code that a detector file must not start by itself" in result.err
        assert f"add --model {spec}" in result.err


@pytest.mark.parametrize("weights", ["../net.safetensors", "/etc/passwd", "", ".", "..", 3, ["x"], "a\0b"])
def test_a_file_does_not_choose_what_is_read(digits: Path, weights: Any) -> None:
    _change_metadata(digits / "net.grood", model={"spec": "torch_grood.demo:DigitsCNN", "weights": weights})
    result = run("score", "net.grood", "ood")
    assert result.code == 1
    assert "using the weights" not in result.err


def test_what_to_add_is_told_at_once(digits: Path) -> None:
    (digits / "net.safetensors").rename(digits / "elsewhere.safetensors")
    result = run("score", "net.grood", "ood")
    assert result.code == 1
    assert result.err.endswith("add --model " + _spec(digits) + " --weights path/to/net.safetensors")
    assert run("score", "net.grood", "ood", *MODEL, "--weights", "elsewhere.safetensors").code == 0


def _spec(digits: Path) -> str:
    return str(GROOD.load(digits / "net.grood").metadata["model"]["spec"])


def test_a_detector_without_model_and_transform(digits: Path) -> None:
    _change_metadata(digits / "net.grood", model=None, transform=None)
    assert "it does not say which model it was fitted on; add --model SPEC" in run("score", "net.grood", "ood").err
    arguments = ("score", "net.grood", "ood", *MODEL, "--weights", "net.safetensors")
    assert "does not say how images are prepared for its model; add --transform" in run(*arguments).err
    (digits / "t.json").write_text(
        '{"resize": null, "crop": null, "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}'
    )
    assert run(*arguments, "--transform", "t.json").code == 0


def test_a_hostile_transform_is_refused(digits: Path) -> None:
    transform = GROOD.load("net.grood").metadata["transform"]
    for change in ({"resize": 10**9}, {"mean": [1e300, 0, 0]}, {"interpolation": "exec"}, {"more": 1}):
        _change_metadata(digits / "net.grood", transform=transform | change)
        result = run("score", "net.grood", "ood", *MODEL)
        assert (result.code, "its transform cannot be used" in result.err) == (1, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--transform", "cifar10"), "brings the preprocessing that it was fitted with"),
        (("--output", "s.txt"), "ends in neither .json, .csv nor .parquet; add --format"),
        (("--output", "s.txt", "--format", "table"), "a table is for the terminal"),
        (("--format", "parquet"), "Parquet is no text; add --output FILE.parquet"),
        (("--output", "absent/s.csv"), "the folder absent does not exist"),
        (("--weights", "absent.pt"), "absent.pt: no such weights file"),
        (("--device", "cuda"), "PyTorch finds no cuda device here"),
        (("--root", "ood"), ""),
    ],
)
def test_mistakes(digits: Path, options: tuple[str, ...], message: str) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    result = run("score", "net.grood", "ood", *MODEL, *options)
    if message:
        assert (result.code, result.out) == (1, "")
        assert message in result.err
    else:
        assert result.code == 0


def test_other_weights_are_noticed(digits: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file("net.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, "net.safetensors")
    result = run("score", "net.grood", "ood", *MODEL)
    assert (result.code, "with other weights" in result.err) == (1, True)


def test_no_input_is_overwritten(digits: Path) -> None:
    image = next(Path("ood").iterdir())
    for target in (Path("net.grood"), image):
        before = target.read_bytes()
        result = run("score", "net.grood", image, *MODEL, "--format", "csv", "--output", target)
        assert result.code == 1
        assert "would overwrite an input" in result.err
        assert target.read_bytes() == before


def test_files_that_are_no_images_are_mentioned(digits: Path) -> None:
    Path("ood/notes.heic").write_text("x")
    assert "ood: 1 files without an image's ending are left out" in run("score", "net.grood", "ood", *MODEL).err
