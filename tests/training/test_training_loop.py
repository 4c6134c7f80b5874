"""A training learns what its recipe says, step by step as a plain loop would, and leaves everything else as it was."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
import signal
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    CPU,
    PowerCutError,
    assert_close_weights,
    assert_same_run,
    at_step,
    cut_power,
    figures_of,
    press_ctrl_c,
    run,
    weights_of,
)
from torch import Tensor, nn

from torch_grood import GroodError
from torch_grood.data import BadImageError, load_image
from torch_grood.data.transforms import PRESETS
from torch_grood.models import load_model
from torch_grood.training import Computation, Recipe, TrainingRun, read_recipe, train
from torch_grood.training.checkpoint import read_checkpoint, write_weights
from torch_grood.training.images import find_images
from torch_grood.training.learner import Learner
from torch_grood.training.plan import Plan, Step, learning_rate

pytestmark = pytest.mark.usefixtures("quick")


def test_an_easy_task_is_learnt_and_recorded(done: TrainingRun, recipe: Recipe, data: Path) -> None:
    assert done.complete
    assert (done.steps, done.n_steps) == (27, 27)
    assert [(one.epoch, one.steps) for one in done.figures] == [(1, 9), (2, 18), (3, 27)]
    first, _, last = done.figures
    assert last.loss < first.loss / 3
    assert last.val_loss < first.val_loss / 3
    assert last.val_accuracy > 0.9
    assert [one.lr for one in done.figures] == [learning_rate(recipe, step, 9) for step in (8, 17, 26)]
    figures_of(done)
    assert sorted(path.name for path in done.folder.path.iterdir()) == [
        *(".lock", "curve.png", "log.csv", "model.safetensors", "run.json", "train.txt", "transform.json", "val.txt")
    ]
    record = json.loads((done.folder.path / "run.json").read_text())
    assert record["status"] == "complete"
    # All that the result depends on.
    assert record["recipe"] | {"title": recipe.title, "reference": recipe.reference} == recipe.to_dict()
    assert record["model"] == {"spec": recipe.model, "num_classes": 3}
    assert record["classes"] == ["a", "b", "c"]
    assert record["transform"] == PRESETS["cifar10"].to_dict()
    assert record["computation"]["device"].startswith("cpu")
    assert record["computation"]["processes"] == 1
    # The weights on the disk are those of the last figures.
    model = load_model(recipe.model, done.folder.weights).model
    images = find_images(recipe, data).val
    with torch.no_grad():
        logits = model(torch.stack([PRESETS["cifar10"](load_image(path)) for path in images.paths]))
    labels = torch.tensor(images.labels)
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(last.val_accuracy)
    assert float(nn.functional.cross_entropy(logits, labels)) == pytest.approx(last.val_loss, rel=1e-4)


def test_the_same_call_gives_the_same_bits(done: TrainingRun, recipe: Recipe, data: Path, tmp_path: Path) -> None:
    # Whatever random numbers were drawn before, and wherever images are kept and who reads them.
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert_same_run(run(recipe, tmp_path / "again", data), done)
    from_files = replace(CPU, memory=0, workers=2)
    assert_same_run(run(recipe, tmp_path / "files", data, from_files), done)
    other = run(replace(recipe, seed=6), tmp_path / "seed", data)
    assert other.folder.weights.read_bytes() != done.folder.weights.read_bytes()


def reference(recipe: Recipe, data: Path, model: nn.Module) -> tuple[nn.Module, list[float]]:
    """A plain loop over evaluation pixels; the mean loss of each epoch."""
    images = find_images(recipe, data).train
    inputs = torch.stack([PRESETS["cifar10"](load_image(path)) for path in images.paths])
    labels = torch.tensor(images.labels)
    parameters = list(model.parameters())
    if recipe.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
        )
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    plan = Plan(len(labels), min(recipe.batch_size, len(labels)), recipe.epochs, recipe.seed)
    losses: dict[int, list[float]] = {}
    for step in plan.steps():
        batch = list(step.positions)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step.number, plan.steps_per_epoch)
        optimizer.zero_grad()
        loss = criterion(model(inputs[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        losses.setdefault(step.epoch, []).append(loss.item() * len(batch))
    seen = sum(step.n_images for step in plan.steps()) / recipe.epochs
    return model, [sum(own) / seen for own in losses.values()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nesterov": False, "momentum": 0.5, "weight_decay": 0.1},
        {"nesterov": False, "momentum": 0.0},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.5},
        {"label_smoothing": 0.2, "warmup_epochs": 1},
        {"batch_size": 100},
        {"batch_size": 13},
    ],
    ids=str,
)
def test_it_learns_as_a_plain_loop_does(plain: Recipe, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Batches of 100 are more than there are images; 13 leaves a rest of one, which no epoch uses."""
    own = replace(plain, crop="none", **changes)
    found = run(own, tmp_path / "run", data, replace(CPU, channels_last=False))
    with torch.random.fork_rng():
        torch.manual_seed(own.seed)
        start = load_model(own.model, num_classes=3).model
    expected, losses = reference(own, data, start)
    assert found.n_steps == 3 * {8: 9, 100: 1, 13: 5}[own.batch_size]
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(weights_of(found)[name], tensor, rtol=1e-4, atol=1e-6)
    assert [one.loss for one in found.figures] == pytest.approx(losses, rel=1e-4)


def test_parts_of_a_batch_are_the_batch(plain: Recipe, data: Path, tmp_path: Path) -> None:
    whole = run(plain, tmp_path / "whole", data)
    for micro_batch in (1, 3):
        parts = run(plain, tmp_path / str(micro_batch), data, replace(CPU, micro_batch=micro_batch))
        # 27 steps make of a last bit what they like; a part that is left out, or counted twice, makes far more.
        assert_close_weights(parts, whole, rtol=0.01, atol=3e-4)
        for found, expected in zip(parts.figures, whole.figures, strict=True):
            assert (found.val_loss, found.loss) == pytest.approx((expected.val_loss, expected.loss), rel=1e-4)


def test_normalisation_never_meets_a_part_of_one_image(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    """Batches of 9 in parts of 4 are 3 + 3 + 3, not 4 + 4 + 1."""
    sizes: set[int] = set()
    forward = nn.BatchNorm2d.forward

    def counted(self: nn.BatchNorm2d, inputs: Tensor) -> Tensor:
        if self.training:
            sizes.add(len(inputs))
        return forward(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.BatchNorm2d, "forward", counted)
        run(replace(recipe, batch_size=9, epochs=1), tmp_path / "run", data, replace(CPU, micro_batch=4))
    assert sizes == {3}


def test_the_layout_changes_no_more_than_rounding(
    recipe: Recipe, data: Path, done: TrainingRun, tmp_path: Path
) -> None:
    found = run(recipe, tmp_path / "run", data, replace(CPU, channels_last=False))
    assert_close_weights(found, done, rtol=0.05, atol=0.01)
    assert all(tensor.is_contiguous() for tensor in weights_of(found).values())


def test_bfloat16_keeps_float32_weights(recipe: Recipe, data: Path, done: TrainingRun, tmp_path: Path) -> None:
    found = run(recipe, tmp_path / "bf16", data, replace(CPU, mixed_precision="bf16"))
    assert found.folder.read()["computation"]["mixed_precision"] == "bf16"
    assert {tensor.dtype for tensor in weights_of(found).values()} == {torch.float32, torch.int64}
    assert found.figures[-1].val_accuracy > 0.9
    # It was used: bits differ; and not too much.
    assert found.folder.weights.read_bytes() != done.folder.weights.read_bytes()
    assert_close_weights(found, done, rtol=0.2, atol=0.1)
    # Nothing of it is left for the next training of this process.
    assert_same_run(run(recipe, tmp_path / "full", data), done)


def test_fp16_on_a_cpu_is_not_claimed(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    """accelerate takes it and computes in float32; a record that says fp16 would be wrong."""
    with pytest.raises(GroodError, match="on the CPU use bf16"):
        run(recipe, tmp_path / "fp16", data, replace(CPU, mixed_precision="fp16"))
    assert not (tmp_path / "fp16").exists()


@pytest.mark.parametrize("network", ["with_logits", "with_auxiliary"])
def test_what_a_network_returns_in_training(plain: Recipe, data: Path, tmp_path: Path, network: str) -> None:
    expected = run(plain, tmp_path / "plain", data)
    found = run(replace(plain, model=plain.model.replace("plain", network)), tmp_path / "run", data)
    ours, theirs = weights_of(found), weights_of(expected)
    assert {name.removeprefix("body."): tensor.tolist() for name, tensor in ours.items()} == {
        name: tensor.tolist() for name, tensor in theirs.items()
    }


def test_a_network_of_maps_is_refused(plain: Recipe, data: Path, tmp_path: Path) -> None:
    with pytest.raises(GroodError, match="logits"):
        run(replace(plain, model=plain.model.replace("plain", "with_maps")), tmp_path / "run", data)


def test_frozen_parameters_stay(plain: Recipe, data: Path, tmp_path: Path) -> None:
    own = replace(plain, model=plain.model.replace("plain", "half_frozen"))
    with torch.random.fork_rng():
        torch.manual_seed(own.seed)
        start = load_model(own.model, num_classes=3).model.state_dict()
    found = weights_of(run(own, tmp_path / "run", data))
    assert torch.equal(found["0.weight"], start["0.weight"])
    assert not torch.equal(found["4.weight"], start["4.weight"])


def test_weights_of_a_file_are_the_start(plain: Recipe, data: Path, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(77)
        start = load_model(plain.model, num_classes=3).model
        other = load_model(plain.model, num_classes=5).model
    write_weights(tmp_path / "start.safetensors", start)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    still = replace(plain, lr=0.0, final_lr=0.0, epochs=1)
    found = run(still, tmp_path / "same", data, weights=tmp_path / "start.safetensors")
    assert all(torch.equal(tensor, start.state_dict()[name]) for name, tensor in weights_of(found).items())
    assert found.folder.read()["start"] == hashlib.sha256((tmp_path / "start.safetensors").read_bytes()).hexdigest()
    # A head of other classes starts anew, and nothing else.
    found = run(still, tmp_path / "head", data, weights=tmp_path / "other.pt")
    assert torch.equal(weights_of(found)["0.weight"], other.state_dict()["0.weight"])
    assert weights_of(found)["4.weight"].shape == (3, 128)
    with pytest.raises(GroodError, match=r"(?s)another training run.*start: '[0-9a-f]{64}' there, None now"):
        run(still, tmp_path / "head", data)
    with pytest.raises(GroodError, match=r"no\.pt cannot be read: No such file"):
        run(still, tmp_path / "none", data, weights=tmp_path / "no.pt")


def test_a_loss_that_is_not_finite_ends_it(plain: Recipe, data: Path, tmp_path: Path) -> None:
    wild = replace(plain, lr=1e6, nesterov=False)
    with pytest.raises(GroodError, match=r"the loss is no longer finite, at step 9 or up to 20 before it .*--set lr=1"):
        run(wild, tmp_path / "run", data)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_weights_that_an_epochs_last_step_ruined_are_not_kept(
    plain: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is that of the weights before it; those after the last one meet the validation images."""
    step = Learner.step

    def ruin(self: Learner, at: Step, *rest: Any) -> None:
        step(self, at, *rest)
        if at.number == 17:
            for parameter in self.model.parameters():
                parameter.data.fill_(torch.nan)

    monkeypatch.setattr(Learner, "step", ruin)
    with pytest.raises(GroodError, match=r"the loss of the validation images is not finite \(epoch 2\)"):
        run(plain, tmp_path / "run", data)
    assert read_checkpoint(tmp_path / "run" / "checkpoint.safetensors").step == 9
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "model.safetensors").values())


def test_what_was_kept_before_a_loss_became_infinite_is_still_there(plain: Recipe, data: Path, tmp_path: Path) -> None:
    from torch_grood.training import loop

    def explode(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
        return learning_rate(recipe, step, steps_per_epoch) if step < 13 else 1e30

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learning_rate", explode)
        with pytest.raises(GroodError, match=r"no longer finite.*\(epoch 2\)"):
            run(plain, tmp_path / "run", data)
    assert read_checkpoint(tmp_path / "run" / "checkpoint.safetensors").step == 9
    weights = load_model(plain.model, tmp_path / "run" / "model.safetensors").model.state_dict()
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert_same_run(run(plain, tmp_path / "run", data), run(plain, tmp_path / "undisturbed", data))


def test_a_bad_image_is_named_and_can_be_mended(recipe: Recipe, world: Path, done: TrainingRun, tmp_path: Path) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    bad = data / "train" / "b" / "007.png"
    good = data / "train" / "b" / "001.png"
    bad = next(path for path in (data / "train" / "b").iterdir() if path != good)
    content = bad.read_bytes()
    bad.write_bytes(content[: len(content) // 2])
    for computation in (CPU, replace(CPU, memory=0)):
        with pytest.raises(BadImageError, match=rf"{bad.name}: .*; replace or remove the file, and run again"):
            run(recipe, tmp_path / "run", data, computation)
    bad.write_bytes(content)
    found = run(recipe, tmp_path / "run", data)
    assert found.folder.weights.read_bytes() == done.folder.weights.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transform": None}, "does not say how its images are prepared; name a preset"),
        ({"transform": "cifar"}, "transform must be one of cifar10, cifar100, imagenet, not 'cifar'"),
        ({"batch_size": 1}, "66 training images in batches of 1 do not give each of 1 processes 2 images"),
        ({"model": "no_such_module:net"}, "no module 'no_such_module'"),
        ({"model": "torchvision:resnet19"}, "did you mean resnet1"),
        ({"pretrained": True}, "published weights"),
    ],
    ids=str,
)
def test_what_cannot_be_is_told_before_anything_is_written(
    plain: Recipe, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(GroodError, match=message):
        run(replace(plain, **changes), tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else_is_left_alone(
    done: TrainingRun, recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    before = done.folder.weights.stat()
    with pytest.raises(GroodError, match=r"(?s)holds another training run.*recipe\.lr: 0\.05 there, 0\.1 now"):
        run(replace(recipe, lr=0.1), done.folder.path, data)
    # A complete run is returned as it is.
    again = run(recipe, done.folder.path, data)
    assert (again.complete, again.steps, again.n_steps, again.figures) == (True, 27, 27, done.figures)
    assert done.folder.weights.stat() == before


def test_progress_is_the_callers_own(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    lengths: list[int] = []

    def watch(items: Iterable[Any]) -> Iterable[Any]:
        lengths.append(len(items))  # type: ignore[arg-type]
        return items

    train(recipe, data, tmp_path / "run", computation=CPU, progress=watch)
    # Training and validation images are decoded; then come the steps.
    assert lengths[-1] == 27
    assert len(lengths) == 3


def test_the_log_tells_each_epoch(recipe: Recipe, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "torch_grood"):
        run(recipe, tmp_path / "run", data / "train")
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].endswith("of 66 images are held out for validation, by the seed")
    assert [message.partition(":")[0] for message in messages[1:]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]


def surroundings() -> dict[str, Any]:
    """All of a process that a caller could find changed."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]  # noqa: NPY002
        "python": random.getstate(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled),
        "matmul": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        # torch names its compiler's folder there when that is first imported.
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")},
        "folder": Path.cwd(),
        "states": [dict(state._shared_state) for state in (AcceleratorState, GradientState, PartialState)],
        "threads running": threading.active_count(),
    }


@pytest.mark.parametrize("how", ["complete", "interrupted", "failed", "refused"])
def test_the_surroundings_are_as_before(recipe: Recipe, data: Path, tmp_path: Path, how: str) -> None:
    handler = signal.getsignal(signal.SIGINT)
    mixed = replace(CPU, mixed_precision="bf16")
    with pytest.MonkeyPatch.context() as patch:
        signal.signal(signal.SIGINT, lambda *_: None)
        try:
            before = surroundings()
            if how == "complete":
                assert run(recipe, tmp_path / "run", data, mixed).complete
            elif how == "interrupted":
                at_step(patch, 4, press_ctrl_c)
                assert not run(recipe, tmp_path / "run", data, mixed).complete
            elif how == "failed":
                at_step(patch, 4, cut_power)
                with pytest.raises(PowerCutError):
                    run(recipe, tmp_path / "run", data, mixed)
            else:
                with pytest.raises(GroodError):
                    run(replace(recipe, model="no_such_module:net"), tmp_path / "run", data, mixed)
            after = surroundings()
        finally:
            signal.signal(signal.SIGINT, handler)
    for name, value in before.items():
        assert after[name] == value, name


def test_an_accelerator_of_the_caller_still_works(plain: Recipe, data: Path, tmp_path: Path) -> None:
    import accelerate

    state = accelerate.state
    own = accelerate.Accelerator(cpu=True)
    try:
        model, optimizer = own.prepare(nn.Linear(2, 2), torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1))
        run(plain, tmp_path / "run", data, replace(CPU, mixed_precision="bf16"))
        assert own.mixed_precision == "no"
        assert own.device.type == "cpu"
        assert own.is_main_process
        own.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        assert own.reduce(torch.ones(1)).item() == 1
    finally:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def test_it_runs_outside_the_main_thread(recipe: Recipe, data: Path, done: TrainingRun, tmp_path: Path) -> None:
    results: list[TrainingRun] = []
    thread = threading.Thread(target=lambda: results.append(run(recipe, tmp_path / "run", data)))
    thread.start()
    thread.join()
    assert_same_run(results[0], done)


@pytest.mark.slow
def test_the_papers_network_takes_a_step(data: Path, tmp_path: Path) -> None:
    own = replace(read_recipe("cifar10-resnet18"), epochs=1, batch_size=33)
    found = run(own, tmp_path / "run", data)
    assert found.steps == 2
    assert load_model(own.model, found.folder.weights).model.fc.out_features == 3


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(recipe: Recipe, data: Path, done: TrainingRun, tmp_path: Path) -> None:
    found = run(recipe, tmp_path / "run", data, replace(CPU, compile=True))
    assert weights_of(found).keys() == weights_of(done).keys()
    assert found.figures[-1].val_accuracy > 0.9
    # Dropout draws other numbers in compiled code.
    own = replace(recipe, model=recipe.model.replace(":net", ":plain"))
    plain_run = run(own, tmp_path / "plain", data)
    assert_close_weights(
        run(own, tmp_path / "compiled", data, replace(CPU, compile=True)), plain_run, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, mps, not 'gpu'"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, fp16, not 'fp8'"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, not 0"),
        ({"checkpoint_seconds": 0}, "checkpoint_seconds must be above 0"),
        ({"checkpoint_seconds": float("nan")}, "checkpoint_seconds must be above 0"),
        ({"workers": -1}, "workers must be 0"),
        ({"memory": -1}, "memory must be 0"),
    ],
    ids=str,
)
def test_a_computation_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GroodError, match=message):
        Computation(**settings)


def test_a_device_that_is_not_there_is_refused(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for device in itertools.compress(there, [not is_there for is_there in there.values()]):
        with pytest.raises(GroodError, match=f"PyTorch finds no {device} device here"):
            run(recipe, tmp_path / "run", data, replace(CPU, device=device))
    assert not (tmp_path / "run").exists()
