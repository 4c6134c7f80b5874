"""Several processes train as one: the same steps, the same figures, one folder; and they go on together."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import run

from torch_grood.training import Recipe
from torch_grood.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
import pytest
from small_runs import CPU, at_step, press_ctrl_c, run
from torch_grood.training import Recipe
from pathlib import Path

# Not under pytest.main, and spawned workers import this file.
if __name__ == "__main__":
    recipe, output, data, stop, rank = json.loads(sys.argv[1])
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None and os.environ["RANK"] == rank:
            at_step(patch, stop, press_ctrl_c)
        done = run(Recipe.from_dict(recipe), Path(output), Path(data))
    Path(f"{output}.{os.environ['RANK']}.json").write_text(json.dumps([done.complete, done.steps, len(done.figures)]))
"""


def in_processes(
    folder: Path, recipe: Recipe, output: Path, data: Path, stop: int | None = None, rank: str = "1", n: int = 2
) -> list[Any]:
    """What each of n processes says: complete, steps, epochs. The one of that rank may get a Ctrl-C."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    arguments = json.dumps([recipe.to_dict(), str(output), str(data), stop, rank])
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    finished = subprocess.run(
        [*launcher, str(script), arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads(Path(f"{output}.{number}.json").read_text()) for number in range(n)]


def history(output: Path) -> list[dict[str, Any]]:
    """Figures but for times."""
    figures: list[dict[str, Any]] = json.loads((output / "run.json").read_text())["history"]
    return [{name: one[name] for name in one if name not in ("seconds", "images_per_second")} for one in figures]


def test_two_processes_learn_as_one(plain: Recipe, data: Path, tmp_path: Path) -> None:
    """66 images in batches of 11: 6 and 5 a process."""
    own = replace(plain, batch_size=11)
    one = run(own, tmp_path / "one", data)
    assert in_processes(tmp_path, own, tmp_path / "two", data) == [[True, 18, 3]] * 2
    expected = load_file(one.folder.weights)
    for name, tensor in load_file(tmp_path / "two" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.01, atol=3e-4)
    for found, figures in zip(history(tmp_path / "two"), history(tmp_path / "one"), strict=True):
        assert found == pytest.approx(figures, rel=1e-3)
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["computation"]["processes"] == 2
    assert not (tmp_path / "two" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_two_processes_stop_and_go_on_together(recipe: Recipe, data: Path, tmp_path: Path, rank: str) -> None:
    """16 steps of 4 an epoch; a Ctrl-C at step 18 is agreed on at the next check, after step 20 and within an epoch."""
    own = replace(recipe, batch_size=4)
    assert in_processes(tmp_path, own, tmp_path / "whole", data) == [[True, 48, 3]] * 2
    assert in_processes(tmp_path, own, tmp_path / "run", data, stop=17, rank=rank) == [[False, 20, 1]] * 2
    kept = read_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    # The sums are those of both processes.
    assert (kept.step, int(kept.sums["images"])) == (20, 16)
    assert in_processes(tmp_path, own, tmp_path / "run", data) == [[True, 48, 3]] * 2
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    for found, expected in zip(history(tmp_path / "run"), history(tmp_path / "whole"), strict=True):
        # The sums of two processes became one in the checkpoint, and are rounded otherwise.
        assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
        assert found == expected


def test_validation_may_be_shared_unequally(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    """29 images in batches of 14: two batches for one process, one for the other."""
    own_data = Path(shutil.copytree(data, tmp_path / "data"))
    next(iter((own_data / "val" / "a").iterdir())).unlink()
    own = replace(recipe, batch_size=14, epochs=1)
    assert in_processes(tmp_path, own, tmp_path / "run", own_data) == [[True, 5, 1]] * 2
    # What was validated is what was saved.
    (figures,) = history(tmp_path / "run")
    accuracy, loss = validate(own, tmp_path / "run" / "model.safetensors", own_data)
    assert figures["val_accuracy"] == pytest.approx(accuracy)
    assert figures["val_loss"] == pytest.approx(loss, rel=1e-4)


def validate(recipe: Recipe, weights: Path, data: Path) -> tuple[float, float]:
    """Accuracy and loss of saved weights."""
    from torch_grood.data import load_image
    from torch_grood.data.transforms import PRESETS
    from torch_grood.models import load_model
    from torch_grood.training.images import find_images

    images = find_images(recipe, data).val
    labels = torch.tensor(images.labels)
    with torch.no_grad():
        logits = load_model(recipe.model, weights).model(
            torch.stack([PRESETS["cifar10"](load_image(path)) for path in images.paths])
        )
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return float((logits.argmax(1) == labels).float().mean()), float(loss)
