"""A few of the kills of benchmarks/kills.py, which make hundreds."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command import PREPARED

from torch_grood import GROOD

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started by fork")


@pytest.fixture(scope="module")
def kills() -> Iterator[ModuleType]:
    path = Path(__file__).parents[2] / "benchmarks" / "kills.py"
    spec = importlib.util.spec_from_file_location("kills", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = module
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        spec.loader.exec_module(module)
        yield module
    torch.set_num_threads(before)
    del sys.modules["kills"]


def test_killed_fits_end_with_the_same_bytes(kills: ModuleType, digits: Path) -> None:
    arguments = ["--model", "nets.py:net", "--weights", "net.safetensors", *PREPARED, "--train", "train"]
    arguments += ["--calibrate", "val", "--batch-size", "16", "--quiet"]
    report = kills.kill_fits(arguments, digits, 4, 64, random.Random(0))
    assert report.failures == []
    assert report.kills >= 4
    assert report.fits >= 1


def test_killed_saves_leave_the_old_file_or_the_new_one(kills: ModuleType, tmp_path: Path) -> None:
    labels = torch.arange(400) % 4
    detectors = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(4, 32, generator=generator)
        detectors.append(GROOD(None).fit_features(centres[labels] + torch.randn(400, 32, generator=generator), labels))
    report = kills.kill_saves(*detectors, tmp_path / "a.grood", 5, random.Random(0))
    assert report.failures == []
    assert report.old + report.new == report.kills == 5
