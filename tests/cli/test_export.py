"""`grood export`, and the other commands on what it wrote: in this process, and in one that has no torch."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import Result, run

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MODEL = ("--model", "nets.py:net", "--weights", "net.safetensors")
# Every package that needs torch, or that torch needs and this package does not.
WITHOUT_TORCH = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "faiss", "safetensors", "tqdm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Blocker())
from torch_grood.cli._app import app
app()
"""


@pytest.fixture(scope="session")
def exported(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' detector as net.onnx, in a folder of its own."""
    folder = tmp_path_factory.mktemp("exported")
    made = run(
        *("export", original / "net.grood", "-o", folder / "net.onnx", "--model", f"{original / 'nets.py'}:net"),
        *("--weights", original / "net.safetensors"),
    )
    assert (made.code, made.out) == (0, "")
    assert f"wrote {folder / 'net.onnx'}" in made.err
    return folder / "net.onnx"


def child(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        encoding="utf-8",
        cwd=folder,
    )


def rows(result: Result) -> list[dict[str, object]]:
    assert result.code == 0, result.err
    found: list[dict[str, object]] = json.loads(result.raw)
    return found


def test_scores_are_those_of_the_detector(digits: Path, exported: Path) -> None:
    expected = rows(run("score", "net.grood", "test", "ood", *MODEL, "--format", "json", "-q"))
    found = rows(run("score", exported, "test", "ood", "--format", "json", "-q", "--batch-size", "7"))
    assert len(found) == len(expected) > 100
    for one, other in zip(found, expected, strict=True):
        assert one["score"] == pytest.approx(other["score"], rel=1e-4)
        assert {**one, "score": 0, "p_value": 0} == {**other, "score": 0, "p_value": 0}
        assert one["p_value"] == pytest.approx(other["p_value"], abs=0.02)


def test_without_torch(digits: Path, exported: Path) -> None:
    scored = child(digits, "score", exported, "ood", "--output", "s.csv", "--fpr", "0.2", "--workers", "2")
    assert (scored.returncode, scored.stdout, scored.stderr) == (0, "", "")
    expected = rows(run("score", exported, "ood", "--format", "json", "--fpr", "0.2", "-q"))
    with Path("s.csv").open(encoding="utf-8", newline="") as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == [row["score"] for row in expected]
    table = child(digits, "score", exported, "ood", "--fdr", "0.3")
    assert table.returncode == 0
    assert "are flagged at a false discovery rate of 0.3" in table.stderr
    assert "the 20 most OOD of" in table.stderr
    shown = child(digits, "info", exported)
    assert shown.returncode == 0, shown.stderr
    assert "one, three, two, zero" in shown.stdout
    assert "in the file, which torch-grood" in shown.stdout
    assert json.loads(child(digits, "info", exported, "--format", "json").stdout)["fit"]["n_classes"] == 4


def test_a_detector_without_torch_says_what_is_missing(digits: Path) -> None:
    found = child(digits, "score", "net.grood", "ood")
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert "needs PyTorch" in found.stderr


def test_bad_images(digits: Path, exported: Path) -> None:
    (digits / "ood" / "bad.png").write_bytes(b"\x89PNG no")
    stopped = run("score", exported, "ood")
    assert stopped.code == 1
    assert "bad.png: not an image" in stopped.err
    assert "--skip-bad" in stopped.err
    skipped = run("score", exported, "ood", "--skip-bad", "--format", "json")
    assert len(rows(skipped)) == len(list((digits / "ood").iterdir())) - 1
    assert "left out 1 unreadable" in skipped.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--explain",), "no training images to explain with; give --explain and --grid a .grood file"),
        (("--grid", "g.png"), "no training images to explain with"),
        (("--model", "nets.py:net"), "leave --model out"),
        (("--weights", "net.safetensors", "--transform", "imagenet"), "leave --weights, --transform out"),
        (("--device", "cuda"), "runs on the CPU"),
        (("--fpr", "0.001"), "cannot be promised"),
        (("--fdr", "1.5"), "between 0 and 1"),
        (("--fpr", "0.1", "--tau", "1"), "different ways to decide"),
        (("--tau", "-1"), "tau is a score"),
        (("--output", "net.onnx", "--format", "csv"), "would overwrite an input"),
    ],
)
def test_options_that_do_not_fit(options: tuple[str, ...], message: str, digits: Path, exported: Path) -> None:
    (digits / "net.onnx").write_bytes(exported.read_bytes())
    found = run("score", "net.onnx", "ood", *options)
    assert found.code == 1
    assert message in found.err
    assert (digits / "net.onnx").read_bytes() == exported.read_bytes()


def test_a_detector_without_a_calibration(digits: Path) -> None:
    run("fit", *MODEL, "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--train", "train", "--output", "raw.grood")
    made = run("export", "raw.grood", *MODEL)
    assert made.code == 0
    assert "not calibrated: what was exported gives scores and classes, no decisions" in made.err
    scored = run("score", "raw.onnx", "ood", "--format", "json")
    assert "this detector is not calibrated" in scored.err
    assert {(row["p_value"], row["is_ood"]) for row in rows(scored)} == {(None, None)}
    assert "not calibrated, which --fdr needs" in run("score", "raw.onnx", "ood", "--fdr", "0.1").err
    assert all(row["is_ood"] for row in rows(run("score", "raw.onnx", "ood", "--format", "json", "--tau", "0")))


def test_a_program_of_torch_export(digits: Path) -> None:
    made = run("export", "net.grood", *MODEL, "--format", "torch", "--fpr", "0.1")
    assert made.code == 0, made.err
    assert (digits / "net.pt2").stat().st_size > 1000
    assert run("export", "net.grood", *MODEL, "-o", "other.pt2", "-q").err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("net.grood", *MODEL, "-o", "net.bin"), "does not end in .onnx or .pt2"),
        (("net.grood", *MODEL, "-o", "net.pt2", "--format", "onnx"), "does not end in .onnx"),
        (("net.grood", *MODEL, "-o", "nowhere/net.onnx"), "does not exist"),
        (("net.grood",), "--model"),
        (("net.grood", *MODEL, "--fpr", "0.0001"), "cannot be promised"),
        (("nothing.grood", *MODEL), "nothing.grood"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, digits: Path) -> None:
    found = run("export", *arguments)
    assert found.code == 1
    assert message in found.err
    assert not list(digits.glob("*.onnx")) + list(digits.glob("*.pt2")) + list(digits.glob(".*net*"))


def test_info_of_what_is_no_exported_detector(digits: Path, exported: Path) -> None:
    assert "no checksums" in run("info", exported, "--verify").err
    (digits / "x.onnx").write_text("x")
    found = run("info", "x.onnx")
    assert found.code == 1
    assert "x.onnx is no ONNX file" in found.err
