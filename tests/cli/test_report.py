"""``grood report``: options to a page, and what is wrong with them."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from command import PREPARED, Result, run
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from torch_grood import container
from torch_grood.cli.report import _parted
from torch_grood.cli.report import report as command
from torch_grood.evaluation.results import read_results, summary
from torch_grood.report import Options, on_benchmark

MODEL = ("--model", "nets.py:net")
SETS = ("--known", "test", "--near", "Other digits=ood")
QUICK = ("--points", "20", "--bootstrap", "40", "--workers", "0")


def report(*arguments: object, detector: str = "net.grood") -> Result:
    return run("report", detector, *MODEL, *QUICK, *arguments)


def words(file: str = "grood-report.html") -> str:
    """A page's text, without its tags."""
    text = re.sub(r"<(style|script).*?</\1>", " ", Path(file).read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", text)).split())


def headings(file: str = "grood-report.html") -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", Path(file).read_text())


def test_the_whole_way(digits: Path) -> None:
    found = report(*SETS, "--images", "mixed=ood", "-o", "page.html", "--title", "My <digits>")
    assert (found.code, found.out) == (0, "")
    assert re.search(r"wrote page\.html, 0\.\d MB; open it in a browser", found.err)
    assert [one.name for one in Path().glob("*.html")] == ["page.html"]
    page = words("page.html")
    assert "My <digits>" in page
    assert "Unknown images told from test" in page
    assert "Other digits: most like the training images" in page
    assert "mixed: least like the training images" in page
    assert "three two" in page or "three" in page
    assert len(headings("page.html")) == 7
    # What people pass on does not tell where it was made.
    assert str(digits) not in Path("page.html").read_text()
    assert "net.grood" in page


def test_training_images_are_those_below_their_root(digits: Path) -> None:
    assert report(*SETS, "--training-root", "train").code == 0
    shown = Path("grood-report.html").read_text()
    assert 'class="gone"' not in shown
    # None of these is there, and there is nothing to be seen of them.
    assert report(*SETS, "--training-root", "ood").code == 0
    gone = Path("grood-report.html").read_text()
    near = len(re.findall(r'<ul class="near"', shown))
    assert near == 16
    assert gone.count('class="gone"') == 4 * near
    assert gone.count("which is not there") == 2 * 4 * near


def test_the_library_says_the_same(digits: Path) -> None:
    assert report("--known", "test", "--fpr", "0.2", "--quiet").err == ""
    scored = run("score", "net.grood", "test", *MODEL, "--fpr", "0.2", "--format", "json", "--quiet")
    flagged = [row["is_ood"] for row in json.loads(scored.raw)]
    assert f"{sum(flagged)} of {len(flagged)} known images are flagged" in words()
    assert "p-value is at most 0.2" in words()


def test_a_threshold_of_one_s_own(digits: Path) -> None:
    assert report(*SETS, "--tau", "0.25").code == 0
    assert "above τ = 0.25, a threshold that was set by hand and promises nothing" in words()
    assert "Promised and observed" not in words()


def test_without_images_the_page_tells_of_the_fit(digits: Path) -> None:
    found = report()
    assert found.code == 0
    assert "warning: no images are given" in found.err
    assert headings() == ["What was fitted, and on what"]


def test_no_points_no_picture(digits: Path) -> None:
    assert report(*SETS, "--points", "0").code == 0
    assert "data:image" not in Path("grood-report.html").read_text()
    assert "Scores" in headings()


def test_unreadable_images(digits: Path) -> None:
    Path("test", "one", "broken.png").write_bytes(b"no image")
    refused = report("--known", "test")
    assert refused.code == 1
    assert "broken.png" in refused.err
    assert not Path("grood-report.html").exists()
    skipped = report("--known", "test", "--skip-bad")
    assert skipped.code == 0
    assert "warning: test: left out 1 unreadable of" in skipped.err
    assert "test: 1 unreadable files were left out" in words()


def test_other_files_are_told_of(digits: Path) -> None:
    Path("test", "one", "notes.txt").write_text("x")
    assert "warning: test: 1 files without an image's ending are left out" in report("--known", "test").err


def test_an_uncalibrated_detector_decides_nothing(digits: Path) -> None:
    fitted = run(
        *("fit", "--model", "nets.py:net", "--weights", "net.safetensors", *PREPARED, "--train", "train"),
        *("--output", "raw.grood", "--quiet"),
    )
    assert fitted.code == 0, fitted.err
    assert report(*SETS, detector="raw.grood").code == 0
    assert "It is not calibrated: it gives scores, and decides nothing." in words()
    assert "flagged at" in words()
    refused = report(*SETS, "--fpr", "0.1", detector="raw.grood")
    assert refused.code == 1
    assert "calibrat" in refused.err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--known", "nowhere"), "nowhere: no such file or folder"),
        (("--near", "=ood"), "'=ood': expected PATH, or NAME=PATH"),
        (("--near", "x="), "'x=': expected PATH, or NAME=PATH"),
        (("--near", "ood", "--far", "ood"), "two sets are called 'ood'; give them names: NAME=PATH"),
        (
            ("--known", "near.txt"),
            "near.txt: the class -1 is none of the detector's 4; known images are of its classes",
        ),
        (("--known", "train.txt"), "train.txt: the class 7 is none of the detector's 4"),
        (("--fpr", "0.1", "--tau", "0.2"), "--fpr and --tau are different ways to decide; give one of them"),
        (("--fpr", "0.0001"), "cannot be promised from"),
        (("--fpr", "7"), "between 0 and 1; got 7"),
        (("--tau", "nan"), "tau is a score, at least 0; got nan"),
        (("--training-root", "nowhere"), "--training-root nowhere: no such folder"),
        (("--near", "ood", "--bootstrap", "39"), "39 draws are too few for a 95 % interval; expected 0, or 40 or more"),
        (("-o", "train"), "train is a folder; give the name of a file in it"),
        (("-o", "none/page.html"), "the folder none does not exist; make it first"),
        (("-o", "net.grood"), "--output net.grood would overwrite an input"),
        (("--near", "N=near.txt", "-o", "near.txt"), "--output near.txt would overwrite an input"),
        (("--known", "test", "--transform", "cifar10"), "leave --transform out"),
    ],
)
def test_what_is_wrong_is_said(digits: Path, arguments: tuple[str, ...], error: str) -> None:
    image = next(Path("ood").glob("*.png"))
    Path("near.txt").write_text(f"{image} -1\n")
    Path("train.txt").write_text(f"{image} 7\n")
    before = {path.name: path.stat().st_mtime_ns for path in Path().iterdir()}
    found = report(*arguments)
    assert found.code == 1
    assert error in found.err
    assert found.out == ""
    assert {path.name: path.stat().st_mtime_ns for path in Path().iterdir()} == before


def test_other_kinds_of_files(digits: Path) -> None:
    for name, error in (
        ("nowhere.grood", "there is no detector file nowhere.grood"),
        ("net.safetensors", "no detector of torch-grood"),
        ("net.onnx", "net.onnx has no gradients to look at; give the .grood file that it was exported from"),
        ("train", "train/results.json cannot be read: No such file or directory"),
        ("nowhere.json", "nowhere.json cannot be read"),
    ):
        Path("net.onnx").touch()
        found = run("report", name)
        assert found.code == 1
        assert error in found.err
    assert not list(Path().glob("*.html"))


def test_usage(digits: Path) -> None:
    assert run("report").code == 2
    assert report("--points", "-1").code == 2
    shown = run("report", "--help")
    assert shown.code == 0
    for option in ("--known", "--near", "--far", "--unknown", "--images", "--fpr", "--tau", "--points", "NAME="):
        assert option in shown.out


def test_defaults_are_the_library_s() -> None:
    given, own = inspect.signature(command).parameters, Options()
    for name in ("fpr", "tau", "title", "points", "draws", "seed", "training_root", "batch_size", "workers"):
        assert given[name].default == getattr(own, name), name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ood", ("ood", "ood")),
        ("a/b.txt", ("b", "a/b.txt")),
        ("My set=ood", ("My set", "ood")),
        ("a=b=c", ("a", "b=c")),
        ("x=y", ("x=y", "x=y")),
        ("N=x=y", ("N", "x=y")),
        ("n" * 300 + "=ood", ("n" * 300, "ood")),
        (".", (".", ".")),
    ],
)
def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[str, str]) -> None:
    # A path that is there has no name before it.
    (tmp_path / "x=y").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _parted(text) == expected


# --- A benchmark --------------------------------------------------------------------------------------------------

SPEC = """
name = "digits"
title = "Digits 0 to 3"

[id]
train.folder = "train"
val.folder = "val"
test.folder = "test"

[near.digits]
folder = "ood"

[far.noise]
folder = "noise"
title = "Noise"
"""


@pytest.fixture(scope="module")
def benchmark(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark's results with the scores of its methods."""
    pytest.importorskip("pytorch_ood")
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "noise").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (15, 8, 8), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "noise" / f"{i}.png")
    for name in ("train", "val", "test", "ood"):
        (folder / name).symlink_to(original / name)
    (folder / "digits.toml").write_text(SPEC)
    done = run(
        *("benchmark", folder / "digits.toml", "--model", f"{original / 'nets.py'}:net"),
        *("--weights", original / "net.safetensors", *PREPARED, "--methods", "grood,grood:outliers=mean,msp,energy"),
        *("--bootstrap", "40", "--workers", "0", "-o", folder / "found", "--quiet"),
    )
    assert done.code == 0, done.err
    return folder / "found"


@pytest.fixture
def found(benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(benchmark, "found")
    return Path("found")


def test_results_with_their_scores(found: Path) -> None:
    made = run("report", "found", "-o", "page.html")
    assert made.code == 0, made.err
    page, text = words("page.html"), Path("page.html").read_text()
    assert "warning" not in made.err
    scores = [one for one in headings("page.html") if one.startswith("Scores of")]
    # GROOD first, then the best two of the others; of each, all sets.
    assert len(scores) == 3
    assert scores[0] == "Scores of GROOD"
    assert page.count("unknown images (far-OOD), 15") == 3
    assert "natural logarithm" in page
    # GROOD's are logarithms, below 0: they are drawn where they are.
    (file,) = [one for one in found.glob("scores/run0/grood-*") if "mean" not in str(container.read(one, 3).header)]
    low = float(load_file(file)["test"].min())
    first = text[text.index('id="scores-1"') : text.index('id="scores-2"')]
    ticks = [float(one.replace("−", "-")) for one in re.findall(r">([-−]?[\d.]+)</text>", first)]
    assert any(tick < 0 and abs(tick - low) < 3 for tick in ticks)
    shutil.copy("page.html", "first.html")
    assert run("report", "found/results.json", "-o", "page.html").code == 0
    assert words("page.html") == words("first.html")


def test_grood_comes_first_wherever_it_stands(found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = on_benchmark._by_auroc
    monkeypatch.setattr(on_benchmark, "_by_auroc", lambda methods: order(methods)[::-1])
    assert run("report", "found", "-o", "page.html").code == 0
    scores = [one for one in headings("page.html") if one.startswith("Scores of")]
    assert scores[0] == "Scores of GROOD"
    labels = [one.label for one in order(summary(read_results("found/results.json")))[::-1]]
    assert labels[0] != "GROOD"
    assert scores[1:] == [f"Scores of {one}" for one in labels if one != "GROOD"][:2]


def test_scores_of_another_run_are_not_drawn(found: Path) -> None:
    for file in found.glob("scores/run0/*"):
        kept = container.read(file, 3)
        changed = {key: scores.flip(0) if key != "test" else scores + 0.3 for key, scores in kept.tensors.items()}
        container.write(file, kept.header, changed)
    made = run("report", "found", "-o", "page.html")
    assert made.code == 0, made.err
    assert not [one for one in headings("page.html") if one.startswith("Scores of")]
    assert "Methods side by side" in headings("page.html")


@pytest.mark.parametrize("harm", ["nan", "short", "empty", "garbage", "shape"])
def test_broken_scores_are_not_drawn(found: Path, harm: str) -> None:
    for file in found.glob("scores/run0/*"):
        if harm == "garbage":
            file.write_bytes(b"no scores")
            continue
        kept = container.read(file, 3)
        change = {
            "nan": lambda scores: scores * float("nan"),
            "short": lambda scores: scores[:2],
            "empty": lambda scores: scores[:0],
            "shape": lambda scores: scores[None],
        }[harm]
        container.write(file, kept.header, {key: change(scores) for key, scores in kept.tensors.items()})
    made = run("report", "found", "-o", "page.html")
    assert made.code == 0, made.err
    assert not [one for one in headings("page.html") if one.startswith("Scores of")]


def test_options_of_a_detector_mean_nothing_to_results(found: Path) -> None:
    made = run("report", found, "--known", "test", "--fpr", "0.1", "--model", "nets.py:net")
    assert made.code == 1
    assert "found is about results that are there already; leave --known, --fpr, --model out" in made.err
