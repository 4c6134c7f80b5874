"""Wherever a training is stopped, and however, it ends with the bits of one that was not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import (
    CPU,
    PowerCutError,
    assert_same_run,
    at_step,
    cut_power,
    figures_of,
    press_ctrl_c,
    run,
)

from torch_grood import GroodError
from torch_grood.models import load_model
from torch_grood.training import Computation, Recipe, TrainingRun
from torch_grood.training.checkpoint import read_checkpoint, write_checkpoint

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe, data: Path) -> Path:
    """A run that Ctrl-C ended after step 4, not to be written to."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    stopped_at(4, press_ctrl_c, recipe, folder, data)
    return folder


@pytest.fixture
def stopped(begun: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(begun, tmp_path / "stopped"))


def stopped_at(
    number: int, how: Callable[[], object], recipe: Recipe, output: Path, data: Path, computation: Computation = CPU
) -> TrainingRun | None:
    """Begin, or go on with, a run that ends after the step of this number."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, number, how)
        if how is press_ctrl_c:
            return run(recipe, output, data, computation)
        with pytest.raises(PowerCutError):
            run(recipe, output, data, computation)
    return None


@pytest.mark.parametrize("number", [0, 8, 9, 19])
def test_ctrl_c_after_any_step(done: TrainingRun, recipe: Recipe, data: Path, tmp_path: Path, number: int) -> None:
    """Steps 8 and 17 end epochs, of nine steps each; after step 19 comes a check within an epoch."""
    stopped = stopped_at(number, press_ctrl_c, recipe, tmp_path / "run", data)
    assert stopped is not None
    assert (stopped.complete, stopped.steps, stopped.n_steps) == (False, number + 1, 27)
    assert len(stopped.figures) == (number + 1) // 9
    figures_of(stopped)
    record = stopped.folder.read()
    assert (record["status"], record["steps"]) == ("interrupted", number + 1)
    assert read_checkpoint(stopped.folder.checkpoint).step == number + 1
    # The weights are those of the checkpoint, and a model.
    weights = load_model(recipe.model, stopped.folder.weights).model.state_dict()
    kept = read_checkpoint(stopped.folder.checkpoint).model
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights.items())
    finished = run(recipe, tmp_path / "run", data)
    assert_same_run(finished, done)
    assert finished.folder.read()["resumed_at_steps"] == [number + 1]


def test_ctrl_c_in_the_last_step_is_too_late(done: TrainingRun, recipe: Recipe, data: Path, tmp_path: Path) -> None:
    finished = stopped_at(26, press_ctrl_c, recipe, tmp_path / "run", data)
    assert finished is not None
    assert_same_run(finished, done)


def test_a_power_cut_costs_the_steps_since_the_checkpoint(
    done: TrainingRun, recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    """Within the first epoch nothing is kept; later an epoch's end, or step 20 where checkpoints are frequent."""
    output = tmp_path / "run"
    stopped_at(5, cut_power, recipe, output, data)
    assert not (output / "checkpoint.safetensors").exists()
    stopped_at(15, cut_power, recipe, output, data)
    assert read_checkpoint(output / "checkpoint.safetensors").step == 9
    stopped_at(23, cut_power, recipe, output, data, replace(CPU, checkpoint_seconds=1e-9))
    assert read_checkpoint(output / "checkpoint.safetensors").step == 20
    assert json.loads((output / "run.json").read_text())["status"] == "running"
    finished = run(recipe, output, data)
    assert_same_run(finished, done)
    assert finished.folder.read()["resumed_at_steps"] == [9, 20]


def test_a_power_cut_while_results_are_written(
    done: TrainingRun, recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the checkpoint of the last epoch, and before the weights, the record or the end."""
    from torch_grood.training import loop
    from torch_grood.training.folder import RunFolder

    def fail(*_: object, **__: object) -> None:
        raise PowerCutError

    stopped_at(25, press_ctrl_c, recipe, tmp_path / "run", data)
    for owner, name in ((loop, "write_weights"), (RunFolder, "write"), (loop, "write_checkpoint"), (Path, "unlink")):
        output = Path(shutil.copytree(tmp_path / "run", tmp_path / name))
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(PowerCutError):
                run(recipe, output, data)
        assert_same_run(run(recipe, output, data), done)


def test_time_is_counted_over_all_calls(recipe: Recipe, data: Path, stopped: Path) -> None:
    kept = read_checkpoint(stopped / "checkpoint.safetensors")
    assert kept.record["seconds"] > 0
    write_checkpoint(stopped / "checkpoint.safetensors", replace(kept, record=kept.record | {"seconds": 10_000.0}))
    first, second, _ = run(recipe, stopped, data).figures
    assert first.seconds > 10_000
    assert first.images_per_second < 66 / 10_000 + 0.1
    assert second.seconds < 10_000


@pytest.mark.parametrize(
    ("changes", "computation"),
    [
        ({"crop": "resized", "flip": True}, CPU),
        ({"optimizer": "adamw", "lr": 0.003, "label_smoothing": 0.1, "warmup_epochs": 1}, CPU),
        ({}, replace(CPU, micro_batch=3)),
        ({}, replace(CPU, mixed_precision="bf16")),
        pytest.param({"crop": "resized", "flip": True}, replace(CPU, workers=2), marks=pytest.mark.slow),
        pytest.param({"momentum": 0.0, "nesterov": False}, CPU, marks=pytest.mark.slow),
        pytest.param({"batch_size": 100}, CPU, marks=pytest.mark.slow),
        pytest.param({}, replace(CPU, channels_last=False), marks=pytest.mark.slow),
    ],
    ids=["resized", "adamw", "parts", "bf16", "workers", "no momentum", "one batch", "contiguous"],
)
def test_however_it_is_computed(
    recipe: Recipe, data: Path, tmp_path: Path, changes: dict[str, Any], computation: Computation
) -> None:
    own = replace(recipe, **changes)
    whole = run(own, tmp_path / "whole", data, computation)
    middle = whole.n_steps // 2
    stopped_at(middle, press_ctrl_c, own, tmp_path / "run", data, computation)
    assert_same_run(run(own, tmp_path / "run", data, computation), whole)


def test_a_gradient_scaler_goes_on_where_it_was(
    recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fp16 has one on an accelerator; here it doubles its factor after every fourth step."""
    import accelerate

    states: list[dict[str, Any]] = []

    class Scaled(accelerate.Accelerator):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=4)

        def free_memory(self, *objects: Any) -> Any:
            states.append(self.scaler.state_dict())
            return super().free_memory(*objects)

    monkeypatch.setattr(accelerate, "Accelerator", Scaled)
    whole = run(recipe, tmp_path / "whole", data)
    stopped_at(13, press_ctrl_c, recipe, tmp_path / "run", data)
    assert_same_run(run(recipe, tmp_path / "run", data), whole)
    end, middle, end_again = states
    assert (end["scale"], end["_growth_tracker"]) == (4.0 * 2**6, 3)
    assert (middle["scale"], middle["_growth_tracker"]) == (4.0 * 2**3, 2)
    assert end_again == end


def test_from_weights_of_a_file(plain: Recipe, data: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.pt"
    torch.save(load_model(plain.model, num_classes=3).model.state_dict(), start)
    whole = run(plain, tmp_path / "whole", data, weights=start)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 13, press_ctrl_c)
        run(plain, tmp_path / "run", data, weights=start)
    assert_same_run(run(plain, tmp_path / "run", data, weights=start), whole)


def test_other_settings_are_told(recipe: Recipe, data: Path, stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(recipe, stopped, data, replace(CPU, channels_last=False)).complete
    assert "began elsewhere or with other settings: last bits may differ" in caplog.text


def test_another_run_does_not_go_on(recipe: Recipe, data: Path, stopped: Path) -> None:
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(GroodError, match=r"recipe\.seed: 5 there, 6 now"):
        run(replace(recipe, seed=6), stopped, data)
    with pytest.raises(GroodError, match=r"images\.digest"):
        run(recipe, stopped, data / "train")
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_a_damaged_checkpoint_is_told(recipe: Recipe, data: Path, stopped: Path) -> None:
    file = stopped / "checkpoint.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 64
    file.write_bytes(content)
    with pytest.raises(GroodError, match=r"altered since it was written.*to begin anew, delete the folder"):
        run(recipe, stopped, data)


def test_a_checkpoint_of_another_form_is_told(recipe: Recipe, data: Path, stopped: Path) -> None:
    file = stopped / "checkpoint.safetensors"
    kept = read_checkpoint(file)
    other: list[dict[str, Any]] = [{"figures": 3}, {"figures": [{"epoch": 1}]}, {"seconds": "long"}, {"resumed": None}]
    for one in other:
        write_checkpoint(file, replace(kept, record=kept.record | one))
        with pytest.raises(GroodError, match="is damaged"):
            run(recipe, stopped, data)
    for step in (-1, 0, 28):
        write_checkpoint(file, replace(kept, step=step))
        with pytest.raises(GroodError, match="is damaged"):
            run(recipe, stopped, data)
    for record in ({}, kept.record | {"identity": {"recipe": {}}}):
        write_checkpoint(file, replace(kept, record=record))
        with pytest.raises(GroodError, match="is that of another run"):
            run(recipe, stopped, data)
    write_checkpoint(file, replace(kept, record=kept.record | {"steps_per_epoch": 8}))
    with pytest.raises(GroodError, match="with 1 processes an epoch has 9 steps, as each needs two images a step"):
        run(recipe, stopped, data)
    for changed in (
        replace(kept, model={name: tensor for name, tensor in kept.model.items() if name != "0.weight"}),
        replace(kept, model={name: tensor.reshape(-1)[:1] for name, tensor in kept.model.items()}),
        replace(kept, sums={}),
    ):
        write_checkpoint(file, changed)
        with pytest.raises(GroodError, match="the checkpoint is not one of this network"):
            run(recipe, stopped, data)


def test_a_disk_that_was_full_costs_nothing(
    done: TrainingRun, recipe: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    import safetensors.torch

    save = safetensors.torch.save_file

    def full(*arguments: Any, **keywords: Any) -> None:
        nonlocal calls
        calls += 1
        # Two files an epoch: the checkpoint, then the weights.
        if calls > 3:
            raise OSError(28, "No space left on device")
        save(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(GroodError, match=r"cannot write .*: No space left on device"):
            run(recipe, tmp_path / "run", data)
    assert read_checkpoint(tmp_path / "run" / "checkpoint.safetensors").step == 18
    assert_same_run(run(recipe, tmp_path / "run", data), done)


def test_a_checkpoint_holds_no_code(stopped: Path) -> None:
    """What is in it are tensors and JSON, so that a run of somebody else's may be gone on with."""
    file = stopped / "checkpoint.safetensors"
    assert {name.partition(".")[0] for name in load_file(file)} == {"model", "optimizer", "sums"}
    with safe_open(file, framework="pt") as opened:
        assert list(opened.metadata()) == ["torch-grood-training"]


@pytest.mark.parametrize("history", [[], {}, [{"epoch": 1}], None])
def test_an_altered_record_of_a_complete_run_is_told(
    recipe: Recipe, data: Path, done: TrainingRun, tmp_path: Path, history: object
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(done.folder.path, folder)
    record = json.loads((folder / "run.json").read_text()) | {"history": history}
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(GroodError, match=r"run\.json was altered"):
        run(recipe, folder, data)


def test_images_may_be_moved(done: TrainingRun, recipe: Recipe, data: Path, stopped: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(data, moved)
    assert_same_run(run(recipe, stopped, moved), done)
    assert str(moved) in (stopped / "train.txt").read_text()
