from __future__ import annotations

import logging
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from command import PREPARED, run

from torch_grood import GROOD

MODEL = ("--model", "nets.py:net", "--weights", "net.safetensors")
FIT = ("fit", *MODEL, *PREPARED, "--train", "train", "--output", "new.grood")


def test_says_what_it_does_and_what_came_out(digits: Path) -> None:
    result = run(*FIT, "--calibrate", "val")
    assert result.code == 0
    assert "model: nets.py:net, on cpu preprocessing: mean 0.5 0.5 0.5, std 0.5 0.5 0.5" in result.err
    assert "fit keeps 351 x 128 features" in result.err
    assert "classes 4: one, three, two, zero" in result.out
    assert re.search(r"accuracy on them [\d.]+ % classifier, [\d.]+ % nearest prototype", result.out)
    assert re.search(
        r"threshold τ = [\d.e-]+: on average at most 5 % false alarms on images like the \d+ it", result.out
    )
    assert re.search(r"file new\.grood, [\d.]+ MB", result.out)
    detector = GROOD.load("new.grood")
    assert detector.classes_ == ("one", "three", "two", "zero")
    assert detector.metadata == {
        "model": {"spec": "nets.py:net", "weights": "net.safetensors", "num_classes": None},
        "transform": {
            "resize": None,
            "crop": None,
            "interpolation": "bilinear",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
        "training": {"paths": ["train"]},
        "calibration": {"paths": ["val"]},
    }
    assert logging.getLogger("torch_grood").handlers == []


def test_workers_and_batch_size_change_nothing(digits: Path) -> None:
    assert run(*FIT, "--seed", 3, "--quiet").code == 0
    first = GROOD.load("new.grood")
    assert run(*FIT, "--seed", 3, "--workers", 2, "--batch-size", 7, "--quiet").code == 0
    second = GROOD.load("new.grood")
    assert (first.class_prototypes_ - second.class_prototypes_).abs().max() < 1e-5
    assert (first.ood_prototype_ - second.ood_prototype_).abs().max() < 1e-5


def test_without_calibration_it_says_so(digits: Path) -> None:
    result = run(*FIT)
    assert result.code == 0
    assert "threshold none: it scores, but cannot decide. Run: grood calibrate" in result.out
    assert GROOD.load("new.grood").threshold_ is None


def test_lists_and_numbers_of_classes(digits: Path) -> None:
    (digits / "lists").mkdir()
    for split in ("train", "val"):
        images = sorted((digits / split).rglob("*.png"))
        names = sorted({path.parent.name for path in images})
        lines = [f"{path.relative_to(digits / split)} {names.index(path.parent.name)}\n" for path in images]
        (digits / "lists" / f"{split}.txt").write_text("".join(lines))
    arguments = ("fit", *MODEL, *PREPARED, "--output", "new.grood", "--train", "lists/train.txt")
    assert "listed files are missing" in run(*arguments).err
    assert run(*arguments, "--root", "train", "--classes", "0,1,3").code == 0
    info = GROOD.load("new.grood").fit_info_
    assert (info.n_classes, info.n_left_out > 0) == (3, True)
    result = run(*arguments, "--root", "train", "--calibrate", "val", "--classes", "0,7")
    assert (result.code, "classes=7 is none of" in result.err) == (1, True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {"name": "HighEnergy", "n": None, "shrink": 0.5}),
        (("--outliers", "mixup", "--lam", "0.7", "--n", "50"), {"name": "Mixup", "n": 50, "lam": 0.7}),
        (("--outliers", "noise", "--n", "20"), {"name": "UniformNoise", "n": 20}),
        (("--outliers", "mean"), {"name": "PrototypeMean"}),
        (("--outliers", "samples", "--ood", "ood"), {"name": "OutlierSamples", "n": None}),
    ],
)
def test_outlier_sources(digits: Path, options: tuple[str, ...], expected: dict[str, Any]) -> None:
    assert run(*FIT, *options, "--quiet").code == 0
    info = GROOD.load("new.grood").fit_info_
    assert info.outlier_source == expected
    shown = run("info", "new.grood").out
    assert ("This detector was fitted with real OOD data." in shown) is info.uses_ood_data
    assert ("REAL OOD DATA were used" in shown) is info.uses_ood_data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--outliers", "noise", "--lam", "0.5"), "--lam belongs to --outliers mixup, not to noise"),
        (("--ood", "ood"), "--ood belongs to --outliers samples, not to energy"),
        (("--lam", "0.5"), "--lam belongs to --outliers mixup, not to energy"),
        (("--outliers", "mean", "--n", "5"), "--outliers mean uses no outliers"),
        (("--outliers", "samples"), "--outliers samples needs real OOD images; add --ood DIR"),
        (("--calibrate", "train"), r"351 of 351 calibration images are training images \(.*, …\)"),
        (("--calibrate", "val", "--fpr", "2"), "--fpr is the share of false alarms, between 0 and 1; got 2"),
        (("--calibrate", "val", "--fpr", "0.001"), "cannot be promised from"),
        (("--calibrate", "marked.txt"), "1 of 1 images have the label −1, OOD"),
        (("--mean", "1,2"), "mean must be three numbers"),
        (("--mean", "a,b,c"), "--mean must be three numbers such as"),
        (("--mean", "127,127,127"), r"divide those of \[0, 255\] by 255"),
        (("--transform", "nope"), "neither one of cifar10, cifar100, imagenet nor a file"),
        (("--transform", "nets.py"), "--transform nets.py: Expecting value"),
        (("--train", "ood"), "flat folder of images, without labels"),
        (("--train", "."), "look like splits, not classes; pass one of them: test"),
        (("--output", "absent/new.grood"), "the folder absent does not exist; make it first"),
        (("--output", "train"), "train is a folder; give the name of a file in it"),
        (("--model", "resnet50"), "unknown model 'resnet50'"),
        (("--head", "nope"), "nope"),
        (("--weights", "nets.py"), "cannot be read as PyTorch weights"),
    ],
)
def test_mistakes(digits: Path, options: tuple[str, ...], message: str) -> None:
    first = next((digits / "ood").iterdir()).relative_to(digits)
    (digits / "marked.txt").write_text(f"{first} -1\n")
    result = run(*FIT, *options)
    last = result.err[result.err.index("error: ") :]
    assert re.search(message, last), last
    assert (result.code, result.out) == (1, "")
    assert not (digits / "new.grood").exists()


def test_a_factory_needs_its_preprocessing_told(digits: Path) -> None:
    arguments = ("fit", *MODEL, "--train", "train", "--output", "new.grood")
    result = run(*arguments)
    assert result.code == 1
    assert "error: nets.py:net does not say how its images are prepared; add --transform (cifar10, " in result.err
    (digits / "t.json").write_text('{"resize": 8, "crop": 8, "interpolation": "box", "mean": [0.5, 0.5, 0.5]}')
    assert "this one lacks std" in run(*arguments, "--transform", "t.json").err
    assert run(*arguments, "--transform", "cifar10", "--resize", "8", "--crop", "8", "--quiet").code == 0
    assert GROOD.load("new.grood").metadata["transform"]["mean"] == [0.4914, 0.4822, 0.4465]


def test_a_failure_leaves_the_old_file(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = (digits / "net.grood").read_bytes()
    arguments = (*FIT[:-1], "net.grood")
    (digits / "train" / "one" / "0000.png").write_bytes(b"broken")
    result = run(*arguments)
    assert result.code == 1
    assert "error: train/one/0000.png: not an image" in result.err.replace(str(digits) + "/", "")
    assert "--skip-bad" in result.err

    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GROOD, "fit", interrupt)
    result = run(*arguments)
    assert (result.code, result.err.endswith("interrupted"), "Traceback" in result.err) == (130, True, False)
    assert (digits / "net.grood").read_bytes() == old
    assert not list(digits.glob(".net.grood*"))


def test_bad_images_can_be_left_out(digits: Path) -> None:
    (digits / "train" / "one" / "0000.png").write_bytes(b"broken")
    (digits / "val" / "one" / "0000.png").write_bytes(b"")
    result = run(*FIT, "--calibrate", "val", "--skip-bad")
    assert result.code == 0
    assert "warning: left out 1 unreadable of 352 images: train/one/0000.png (not an image" in result.err
    assert "val/one/0000.png (the file is empty)" in result.err
    assert GROOD.load("new.grood").fit_info_.n_samples == 351


def test_labels_in_another_order_are_noticed(digits: Path) -> None:
    names = ("one", "three", "two", "zero")
    for i, name in enumerate(names):
        (digits / "train" / name).rename(digits / "train" / f"{(i + 1) % 4}_{name}")
    result = run(*FIT)
    if result.code == 0:  # some image may be classified wrongly, and so "rightly"
        assert "warning: the classifier is right on" in result.err
    assert "labels in the order of its outputs" in result.err


def test_built_in_models_bring_their_preprocessing(digits: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    from safetensors.torch import save_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_file(torchvision.models.resnet18(num_classes=4).state_dict(), "r.safetensors")
    arguments = (
        "--model",
        "torchvision:resnet18",
        "--weights",
        "r.safetensors",
        "--train",
        "train",
        "--outliers",
        "mean",
    )
    result = run("fit", *arguments, "--resize", "32", "--crop", "32", "--output", "r.grood")
    assert "preprocessing: resize shorter side to 32 (bilinear), centre crop 32, mean 0.485" in result.err
    assert result.code == 0 or "wrong on all" in result.err
    if result.code == 0:
        scored = run("score", "r.grood", "ood", "--format", "csv", "--all")
        assert (scored.code, "using the weights r.safetensors" in scored.err) == (0, True)


def test_folders_in_another_order_than_the_outputs_are_noticed(digits: Path) -> None:
    (digits / "train" / "three").rename(digits / "train" / "u-three")
    result = run(*FIT)
    assert result.code == 0
    assert "labels are probably not in the order of its outputs" in result.err


def test_folders_that_are_not_the_outputs_are_refused(digits: Path) -> None:
    shutil.rmtree(digits / "train" / "two")
    result = run(*FIT)
    assert result.code == 1
    assert "the data have 3 classes (one, three, zero, …), the model 4 outputs" in result.err
    assert not Path("new.grood").exists()


def test_calibration_images_of_classes_left_out_do_not_count(digits: Path) -> None:
    n_all = len(list((digits / "val").glob("*/*.png")))
    n_two = len(list((digits / "val" / "two").glob("*.png")))
    result = run(*FIT, "--calibrate", "val", "--classes", "one,three,zero")
    assert result.code == 0
    assert f"on images like the {n_all - n_two} it was calibrated on" in result.out
    assert "classes 3: one, three, zero" in result.out


@pytest.mark.parametrize("output", ["net.safetensors", "nets.py"])
def test_no_input_is_overwritten(digits: Path, output: str) -> None:
    before = Path(output).read_bytes()
    result = run(*FIT[:-1], output)
    assert (result.code, result.err) == (1, f"error: --output {output} would overwrite an input; give another name")
    assert Path(output).read_bytes() == before


def test_a_factory_without_weights_is_mentioned(digits: Path) -> None:
    result = run("fit", "--model", "nets.py:net", "--num-classes", 4, *PREPARED, "--train", "train", "-o", "new.grood")
    assert "no --weights: the network is as its factory made it" in result.err


def test_a_cache_changes_no_byte(digits: Path) -> None:
    fit = (*FIT, "--calibrate", "val", "--outliers", "mixup")
    assert run(*fit, "--quiet").code == 0
    plain = Path("new.grood").read_bytes()
    first = run(*fit, "--cache", "kept")
    assert (first.code, "continued" in first.err) == (0, False)
    assert Path("new.grood").read_bytes() == plain
    again = run(*fit, "--cache", "kept")
    assert "continued: 351 of 351 images are in the cache" in again.err
    assert re.search(r"calibration images: (\d+) from val continued: \1 of \1 images are in the cache", again.err)
    assert Path("new.grood").read_bytes() == plain
    other = run(*fit, "--cache", "kept", "--seed", "4")
    assert "351 of 351 images are in the cache; 351 of them are read again for this seed and early layer" in other.err
    calibrated = run("calibrate", "new.grood", "val", *MODEL[:2], "--weights", "net.safetensors", "--cache", "kept")
    assert calibrated.code == 0
    assert re.search(r"continued: (\d+) of \1 images", calibrated.err)


def test_a_cache_in_the_wrong_place(digits: Path) -> None:
    for folder, message in (
        ("train/kept", "--cache train/kept lies in the folder of images train; choose a folder elsewhere"),
        ("val", "--cache val lies in the folder of images val"),
        ("nets.py", "the cache folder nets.py cannot be made: File exists; choose another"),
    ):
        result = run(*FIT, "--calibrate", "val", "--cache", folder)
        assert (result.code, result.out) == (1, "")
        assert f"error: {message}" in result.err
    result = run("calibrate", "net.grood", "val", "--cache", "val/kept", *MODEL[:2])
    assert (result.code, "lies in the folder of images val" in result.err) == (1, True)
    assert not (digits / "train" / "kept").exists()


def test_skipped_images_are_reported_from_the_cache_too(digits: Path) -> None:
    (digits / "train" / "one" / "0000.png").write_bytes(b"broken")
    fit = (*FIT, "--cache", "kept")
    assert "--skip-bad" in run(*fit).err
    for _ in range(2):
        result = run(*fit, "--skip-bad")
        assert result.code == 0
        assert "warning: left out 1 unreadable of 352 images: train/one/0000.png (not an image" in result.err
    refused = run(*fit)
    assert (refused.code, "error: train/one/0000.png: not an image" in refused.err) == (1, True)


@pytest.fixture(scope="module")
def trained(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of timm's smallest ResNet on the digits."""
    pytest.importorskip("accelerate")
    if not pytest.importorskip("timm").is_model("test_resnet"):
        pytest.skip("timm is older than its networks for tests")
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = ("--epochs", 3, "--batch-size", 32, "--lr", 0.05, "--transform", "cifar10", "--device", "cpu")
    arguments = (*options, "--set", "crop=none", "--set", "flip=false", "--workers", 0, "--quiet")
    result = run("train", "timm:test_resnet", "--data", original, *arguments, "--output", folder)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def run_folder(digits: Path, trained: Path) -> Path:
    """A copy of it in the current folder."""
    return Path(shutil.copytree(trained, "run"))


def test_a_training_brings_all_that_a_detector_needs(run_folder: Path) -> None:
    result = run("fit", "--model", "run", "--output", "run/digits.grood")
    assert result.code == 0, result.err
    assert "model: timm:test_resnet, on cpu" in result.err
    assert "training images: 351 from run/train.txt" in result.err
    assert "calibration images: 189 from run/val.txt" in result.err
    assert "classes 4: one, three, two, zero" in result.out
    detector = GROOD.load("run/digits.grood")
    assert detector.metadata["model"] == {
        "spec": "timm:test_resnet",
        "weights": "model.safetensors",
        "num_classes": None,
    }
    assert detector.metadata["transform"]["mean"] == [0.4914, 0.4822, 0.4465]
    assert detector.metadata["training"] == {"paths": ["run/train.txt"]}
    assert detector.threshold_ is not None
    assert detector.threshold_.n == 189
    # Beside the weights it needs no option, elsewhere the training's folder or the weights.
    shutil.copy("run/digits.grood", "digits.grood")
    scored = [
        run("score", *arguments, "ood", "--format", "csv", "--all", "--quiet")
        for arguments in (
            ("run/digits.grood",),
            ("digits.grood", "--model", "run"),
            ("digits.grood", "--weights", "run/model.safetensors"),
        )
    ]
    assert [result.code for result in scored] == [0, 0, 0], scored[-1].err
    assert scored[0].out == scored[1].out == scored[2].out
    assert run("calibrate", "digits.grood", "val", "--model", "run", "--fpr", "0.1").code == 0
    result = run("score", "digits.grood", "ood")
    assert (result.code, "add --weights path/to/model.safetensors" in result.err) == (1, True)


def test_images_and_weights_of_ones_own_take_the_place_of_a_trainings(run_folder: Path) -> None:
    weights = run_folder / "model.safetensors"
    weights.rename("best.safetensors")
    fit = ("fit", "--model", "run", "--output", "new.grood")
    assert "run has no model.safetensors yet" in run(*fit).err
    own = ("--weights", "best.safetensors", "--train", "val", "--calibrate", "test", "--fpr", "0.1")
    result = run(*fit, *own)
    assert result.code == 0, result.err
    assert "training images: 189 from val" in result.err
    assert re.search(r"calibration images: \d+ from test", result.err)
    assert GROOD.load("new.grood").metadata["model"]["weights"] == "best.safetensors"
    assert run("score", "new.grood", "ood", "--quiet").code == 0


def test_a_training_that_may_go_on_is_mentioned(run_folder: Path) -> None:
    fit = ("fit", "--model", "run", "--output", "new.grood")
    assert "warning" not in run(*fit).err
    record = run_folder / "run.json"
    record.write_text(record.read_text().replace('"status": "complete"', '"status": "interrupted"'))
    result = run(*fit, "--quiet")
    assert (result.code, "warning: the training run is not complete" in result.err) == (0, True)


def test_a_trainings_files_are_not_overwritten(run_folder: Path) -> None:
    before = {path: path.read_bytes() for path in run_folder.iterdir()}
    for name in ("model.safetensors", "train.txt", "val.txt"):
        result = run("fit", "--model", "run", "--output", run_folder / name)
        assert (result.code, "would overwrite an input" in result.err) == (1, True)
    assert {path: path.read_bytes() for path in run_folder.iterdir()} == before


def test_too_few_held_out_images_are_noticed_before_the_fit(run_folder: Path) -> None:
    few = (run_folder / "val.txt").read_text().splitlines()[::20]
    (run_folder / "val.txt").write_text("\n".join(few))
    fit = ("fit", "--model", "run", "--output", "new.grood")
    result = run(*fit)
    assert (result.code, "fit keeps" in result.err) == (1, False)
    assert "error: run/val.txt: a false-alarm rate of 0.05 cannot be promised from 10 calibration samples" in result.err
    remedy = re.search(r"Here: --fpr ([\d.]+), or --calibrate with more images", result.err)
    assert remedy is not None
    assert remedy[1] == "0.1"
    assert run(*fit, "--fpr", remedy[1]).code == 0


def test_other_models_need_their_training_images_named(digits: Path) -> None:
    result = run("fit", *MODEL, *PREPARED, "--output", "new.grood")
    assert (result.code, result.out) == (2, "")
    assert "Invalid value for --train: the training images of this model must be named" in result.err
