from __future__ import annotations

import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")

from command import Result, run
from PIL import Image

import torch_grood.training
from models import write_patterns
from torch_grood import GROOD, GroodError
from torch_grood.models import load_model
from torch_grood.training import Computation, Recipe, read_recipe, recipe_names
from torch_grood.training.checkpoint import read_checkpoint

MAIN = [sys.executable, "-m", "torch_grood"]

# The file `mood` lets a test act in the midst of a training: "interrupt 9" presses Ctrl-C at the 9th step of a process,
# "poison 9" makes it go wrong, "slow 0.02" makes every step take so many seconds.
NETWORK = """
import os, signal, time
from pathlib import Path
from torch import nn

class Net(nn.Sequential):
    steps = 0

    def forward(self, images):
        logits = super().forward(images)
        if not self.training or not Path("mood").exists():
            return logits
        self.steps += 1
        Path("began").touch()
        mood, number = Path("mood").read_text().split()
        if mood == "interrupt" and self.steps == int(number):
            os.kill(os.getpid(), signal.SIGINT)
        if mood == "slow":
            time.sleep(float(number))
        return logits * float("nan") if mood == "poison" and self.steps == int(number) else logits

def net(num_classes: int = 10) -> nn.Module:
    return Net(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, num_classes),
    )

def plain(num_classes: int = 10) -> nn.Module:
    "Without normalisation, which keeps a network finite at any learning rate."
    return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, num_classes))
"""
EPOCHS, STEPS_AN_EPOCH = 2, 7
RECIPE = ("--transform", "cifar10", "--epochs", EPOCHS, "--batch-size", 16, "--lr", 0.05)
FASTER = ("--set", "crop=padded", "--set", "flip=false", "--device", "cpu", "--workers", 0)
TRAIN = ("train", "nets.py:net", "--data", "images", *RECIPE, *FASTER, "--output")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nets.py and images/{a,b,c}/*.png, 120 of them, in the current folder."""
    # As if matplotlib were not installed: most of the time would go into curves.
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "nets.py").write_text(NETWORK)
    write_patterns(tmp_path / "images", 120, seed=0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _weights(folder: str) -> bytes:
    return (Path(folder) / "model.safetensors").read_bytes()


def _figures(folder: str) -> list[dict[str, str]]:
    """Of each epoch, those that do not depend on the clock."""
    with (Path(folder) / "log.csv").open() as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def _record(folder: str) -> dict[str, Any]:
    found = json.loads((Path(folder) / "run.json").read_text())
    assert isinstance(found, dict)
    return found


def _assert_same(one: str, other: str) -> None:
    assert _figures(one) == _figures(other)
    assert _weights(one) == _weights(other)
    assert _record(one)["status"] == _record(other)["status"] == "complete"


def _value(result: Result, name: str) -> str:
    line = next(line for line in result.raw.splitlines() if line.startswith(f"{name} "))
    return line.removeprefix(name).strip()


def test_trains_and_says_what_came_out(world: Path) -> None:
    result = run(*TRAIN, "run")
    assert result.code == 0, result.err
    assert "recipe own-images: nets.py:net, 2 epochs in batches of 16, sgd with lr 0.05, crop padded" in result.err
    assert "12 of 120 images are held out for validation" in result.err
    assert re.search(r"epoch 2/2: loss [\d.]+, accuracy [\d.]+%, validation [\d.]+%", result.err)
    last = _figures("run")[-1]
    assert _value(result, "epochs") == "2 of 2, 14 steps"
    assert _value(result, "training").startswith(f"{100 * float(last['accuracy']):.2f} % right")
    assert _value(result, "validation").startswith(f"{100 * float(last['val_accuracy']):.2f} % right")
    assert _value(result, "weights") == "run/model.safetensors"
    assert "learning curve" not in result.out
    assert float(last["val_accuracy"]) > 0.8
    recipe = Recipe.from_dict(_record("run")["recipe"])
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.transform) == (EPOCHS, 16, 0.05, "cifar10")
    assert (recipe.crop, recipe.flip, recipe.model) == ("padded", False, "nets.py:net")


def test_the_next_command_is_one_that_works(world: Path) -> None:
    result = run(*TRAIN, "my run")
    grood, *command = shlex.split(_value(result, "next"))
    assert (grood, command[0]) == ("grood", "fit")
    # 12 held-out images cannot promise the default rate of 5 %.
    assert command[-4:-2] == ["--fpr", "0.08"]
    fitted = run(*command)
    assert fitted.code == 0, fitted.err
    detector = GROOD.load("my run/detector.grood")
    assert detector.classes_ == ("0", "1", "2") or detector.classes_ == (0, 1, 2)
    assert detector.threshold_ is not None
    assert detector.threshold_.n == 12


def test_the_curve_is_mentioned_where_there_is_one(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    result = run(*TRAIN[:-1], "--set", "warmup_epochs=0", "--output", "run")
    assert _value(result, "learning curve") == "run/curve.png"
    with Image.open("run/curve.png") as image:
        assert image.width > 500


def test_quiet_says_nothing(world: Path) -> None:
    assert run(*TRAIN, "run", "--quiet") == Result(0, "", "", "", "")


def test_lists_the_recipes() -> None:
    result = run("train", "--list")
    assert result.code == 0
    for name in recipe_names():
        assert name in result.out
        assert read_recipe(name).title in result.out
    assert "95.06 ± 0.30 %" in result.out


class _Recorder:
    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options
        raise GroodError("recorded")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., _Recorder]:
    """Runs the command up to the training, and tells what the training was called with."""
    recorder = _Recorder()
    monkeypatch.setattr(torch_grood.training, "train", recorder)

    def record(*arguments: object) -> _Recorder:
        result = run("train", *arguments)
        assert (result.code, result.err.endswith("error: recorded")) == (1, True), result.err
        return recorder

    return record


def test_without_options_it_is_the_recipe(recorded: Callable[..., _Recorder]) -> None:
    found = recorded("cifar10-resnet18", "--data", "images", "--output", "out")
    assert found.arguments == (read_recipe("cifar10-resnet18"), Path("images"), Path("out"))
    assert found.options["weights"] is None
    assert found.options["computation"] == Computation()


def test_every_option_arrives(recorded: Callable[..., _Recorder]) -> None:
    found = recorded(
        *("resnet34", "--data", "d", "-o", "out", "--epochs", 7, "--batch-size", 5, "--lr", 0.25, "--seed", 3),
        *("--set", "momentum=0.5", "--set", "optimizer=adamw", "--set", "nesterov=false", "--transform", "imagenet"),
        *("--pretrained", "--weights", "w.pt", "--device", "cpu", "--mixed-precision", "bf16", "--no-channels-last"),
        *("--compile", "--micro-batch", 2, "--workers", 3, "--memory", "1.5GiB", "--checkpoint-every", 9.5),
    )
    recipe = found.arguments[0]
    expected = {"epochs": 7, "batch_size": 5, "lr": 0.25, "seed": 3, "momentum": 0.5, "optimizer": "adamw"}
    expected |= {"nesterov": False, "transform": "imagenet", "pretrained": True, "model": "torchvision:resnet34"}
    own = read_recipe("resnet34").to_dict()
    changed = {name: value for name, value in recipe.to_dict().items() if own[name] != value and name != "title"}
    assert changed | {"model": recipe.model} == expected
    assert found.options["weights"] == Path("w.pt")
    assert found.options["computation"] == Computation(
        device="cpu",
        mixed_precision="bf16",
        channels_last=False,
        compile=True,
        micro_batch=2,
        workers=3,
        memory=3 * 2**29,
        checkpoint_seconds=9.5,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "epoch=3"), "has no 'epoch'; did you mean epochs?"),
        (("--set", "momentum"), "expected NAME=VALUE, such as lr=0.05; got 'momentum'"),
        (("--set", "momentum=much"), "momentum must be a number, not 'much'"),
        (("--set", "optimizer=best"), "optimizer must be one of sgd, adamw, not 'best'"),
        (("--set", "lr=0.1"), "lr is given twice, as lr=0.05 and lr=0.1; leave one out"),
        (("--epochs", 0), "epochs must be between 1 and"),
        (("--seed", -1), "seed must be between 0 and"),
        (("--lr", "nan"), "lr must be a number, not nan"),
        (("--transform", "mine.json"), "transform must be one of cifar10, cifar100, imagenet, not 'mine.json'"),
        (("--memory", "much"), "--memory must be a size such as 500MB or 4GiB, got 'much'"),
        (("--checkpoint-every", 0), "checkpoint_seconds must be above 0"),
        (("--weights", "absent.pt"), "absent.pt cannot be read: No such file"),
        (("--pretrained",), "nets.py:net"),
        (("--data", "absent"), "absent: no such folder; --data takes a folder of images"),
        (("--data", "empty"), "empty holds no image"),
        (("--data", "gap"), r"no image in 1 of 3 class folders \(b\)"),
        (("--data", "one"), "one has one class; a classifier needs at least 2"),
        (("--data", "flat"), "flat folder of images, without labels"),
        (("--output", "nets.py"), "nets.py is a file; give a new folder"),
        (("--output", "images"), "images is not empty and holds no training run; give a new folder"),
    ],
)
def test_mistakes(world: Path, options: tuple[str, ...], message: str) -> None:
    for folder, classes in (("empty", ""), ("gap", "ac"), ("one", "a")):
        for name in classes:
            shutil.copytree(Path("images") / name, Path(folder) / name)
        Path(folder).mkdir(exist_ok=True)
    Path("gap/b").mkdir()
    shutil.copytree("images/a", "flat")
    before = sorted(world.rglob("*"))
    result = run(*TRAIN, "run", *options)
    last = result.err[result.err.index("error: ") :]
    assert re.search(message, last), last
    assert (result.code, result.out) == (1, "")
    assert [path for path in sorted(world.rglob("*")) if "__pycache__" not in path.parts] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "images", "--output", "run"), "Missing argument 'RECIPE'"),
        (("resnet18", "--output", "run"), "Missing option '--data'"),
        (("resnet18", "--data", "images"), "Missing option '--output'"),
        (("resnet18", "--data", "images", "--output", "run", "--mixed-precision", "fp8"), "'fp8' is not one of"),
        (
            ("resnet18", "--data", "images", "--output", "run", "--micro-batch", "0"),
            "Invalid value for '--micro-batch'",
        ),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], message: str) -> None:
    result = run("train", *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in re.sub(r" ?│ ?", " ", result.err)


def test_an_unknown_recipe(world: Path) -> None:
    result = run("train", "cifar10-resnet", "--data", "images", "--output", "run")
    assert (result.code, "did you mean cifar10-resnet18?" in result.err) == (1, True)


@pytest.mark.parametrize("options", [(), ("--memory", "1kB"), ("--memory", "1kB", "--quiet")])
def test_an_unreadable_image_is_named(world: Path, options: tuple[str, ...]) -> None:
    broken = sorted((world / "images" / "b").iterdir())[3]
    broken.write_bytes(b"broken")
    result = run(*TRAIN, "run", *options)
    assert (result.code, result.out) == (1, "")
    assert f"error: {broken}: not an image" in result.err
    assert "replace or remove the file, and run again" in result.err


def test_a_complete_run_is_left_as_it_is(world: Path) -> None:
    assert run(*TRAIN, "run").code == 0
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("run").iterdir()}
    again = run(*TRAIN, "run")
    assert (again.code, "run is complete: the same recipe on the same images" in again.err) == (0, True)
    assert _value(again, "epochs") == "2 of 2, 14 steps"
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("run").iterdir()} == before


def test_a_folder_of_another_run_is_refused(world: Path) -> None:
    assert run(*TRAIN, "run").code == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    result = run(*TRAIN, "run", "--seed", 1, "--set", "momentum=0.8")
    assert result.code == 1
    assert "run holds another training run; give a new folder. What differs:" in result.err
    assert "recipe.seed: 0 there, 1 now" in result.err
    assert "recipe.momentum: 0.9 there, 0.8 now" in result.err
    (world / "images" / "a" / "000.png").unlink()
    result = run(*TRAIN, "run")
    assert (result.code, "What differs: images." in result.err) == (1, True)
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("step", [1, STEPS_AN_EPOCH, 10])
def test_ctrl_c_leaves_usable_weights_and_the_same_command_goes_on(world: Path, step: int) -> None:
    assert run(*TRAIN, "whole").code == 0
    Path("mood").write_text(f"interrupt {step}")
    result = run(*TRAIN, "run")
    assert result.code == 130
    assert f"interrupted after step {step} of 14; run/model.safetensors holds the weights as of then" in result.err
    assert "to go on: grood" in result.err
    assert _value(result, "epochs") == f"{step // STEPS_AN_EPOCH} of 2, {step} steps"
    assert "next" not in result.out
    assert _record("run")["status"] == "interrupted"
    load_model("nets.py:net", "run/model.safetensors")
    Path("mood").unlink()
    result = run(*TRAIN, "run")
    assert (result.code, f"going on from step {step} of 14" in result.err) == (0, True)
    assert _value(result, "epochs") == "2 of 2, 14 steps"
    _assert_same("run", "whole")


def test_ctrl_c_before_the_first_step(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torch_grood.training.loop.open_images", interrupt)
        result = run(*TRAIN, "run")
    assert (result.code, result.out, result.err.endswith("interrupted")) == (130, "", True)
    assert run(*TRAIN, "run").code == 0


def test_a_loss_that_is_not_finite_leaves_the_checkpoint(world: Path) -> None:
    assert run(*TRAIN, "whole").code == 0
    Path("mood").write_text("poison 10")
    result = run(*TRAIN, "run")
    assert (result.code, result.out) == (1, "")
    assert "error: the loss is no longer finite, at step" in result.err
    assert "(--set lr=0.005)" in result.err
    assert read_checkpoint(Path("run/checkpoint.safetensors")).step == STEPS_AN_EPOCH
    load_model("nets.py:net", "run/model.safetensors")
    Path("mood").unlink()
    assert run(*TRAIN, "run").code == 0
    _assert_same("run", "whole")


def test_a_learning_rate_beyond_all_reason(world: Path) -> None:
    result = run("train", "nets.py:plain", *TRAIN[2:], "run", "--set", "nesterov=false", *("--set", "warmup_epochs=0"))
    assert result.code == 0, result.err
    recipe = [*RECIPE[:-1], 1e6]
    result = run("train", "nets.py:plain", "--data", "images", *recipe, *FASTER, "--output", "other")
    assert (result.code, "the loss is no longer finite" in result.err) == (1, True)
    assert not Path("other/model.safetensors").exists()


def _start(*arguments: object, largest_file: int | None = None) -> subprocess.Popen[str]:
    """The command in a process of its own."""

    def prepare() -> None:
        import resource

        # A shell's background job, as CI may be, ignores Ctrl-C, and its children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [*MAIN, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
        preexec_fn=prepare,
    )


def _wait_for(path: Path, child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_in_a_real_process(world: Path) -> None:
    command = [*TRAIN, "run"]
    Path("mood").write_text("slow 0.1")
    child = _start(*command)
    _wait_for(Path("run/checkpoint.safetensors"), child)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, "weights" in out) == (130, True), err
    assert "Traceback" not in err
    assert "interrupted after step" in err
    # The line can be pasted.
    assert err.splitlines()[-1] == f"to go on: {shlex.join(['grood', *map(str, command)])}"
    Path("mood").unlink()
    for folder in ("run", "whole"):
        assert run(*command[:-1], folder).code == 0
    _assert_same("run", "whole")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_at_any_moment_it_ends_with_the_same_bits(world: Path) -> None:
    options = ("--epochs", 4, "--batch-size", 4, "--checkpoint-every", 0.001, "--quiet")
    assert run(*TRAIN, "whole", *options).code == 0
    Path("mood").write_text("slow 0.02")
    generator = random.Random(0)
    for _ in range(5):
        Path("began").unlink(missing_ok=True)
        child = _start(*TRAIN, "run", *options)
        _wait_for(Path("began"), child)
        time.sleep(generator.uniform(0, 1))
        child.kill()
        child.communicate()
    assert _record("run")["status"] == "running"
    Path("mood").unlink()
    result = run(*TRAIN, "run", *options[:-1])
    assert (result.code, "going on from step" in result.err) == (0, True), result.err
    _assert_same("run", "whole")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits")
def test_a_disk_that_takes_no_more_leaves_the_checkpoint(world: Path) -> None:
    Path("mood").write_text("interrupt 10")
    assert run(*TRAIN, "run").code == 130
    Path("mood").unlink()
    checkpoint, weights = Path("run/checkpoint.safetensors").read_bytes(), _weights("run")
    child = _start(*TRAIN, "run", "--quiet", largest_file=len(checkpoint) // 2)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (1, "")
    assert re.fullmatch(r"error: cannot write run/checkpoint\.safetensors: .*File too large.*\n", err), err
    assert (Path("run/checkpoint.safetensors").read_bytes(), _weights("run")) == (checkpoint, weights)
    assert [path.name for path in Path("run").glob(".*")] == [".lock"]
    assert run(*TRAIN, "run").code == 0
    assert run(*TRAIN, "whole").code == 0
    _assert_same("run", "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"),
        ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29518"),
    ],
)
def test_two_processes_of_which_one_speaks(world: Path, launcher: tuple[str, ...]) -> None:
    command = ["-m", *launcher, "-m", "torch_grood", *map(str, TRAIN), "run", "--set", "seed=1"]
    found = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False, env=os.environ
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("2 of 2, 14 steps") == 1
    assert found.stderr.count("epoch 2/2: ") == found.stderr.count("recipe own-images: ") == 1
    assert _record("run")["computation"]["processes"] == 2
    assert float(_figures("run")[-1]["val_accuracy"]) > 0.8
    load_model("nets.py:net", "run/model.safetensors")
