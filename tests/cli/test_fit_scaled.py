"""`grood fit --engine`: the file of the plain command, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import PREPARED, run

FIT = (
    *("fit", "--model", "nets.py:net", "--weights", "net.safetensors", *PREPARED, "--batch-size", "16"),
    *("--train", "train", "--calibrate", "val"),
)


@pytest.mark.usefixtures("digits")
def test_a_process_of_a_launcher_writes_the_same_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run(*FIT, "--output", "plain.grood", "--quiet").code == 0
        scaled = (*FIT, "--output", "scaled.grood", "--cache", "features", "--engine", "torchrun", "--quiet")
        # The first process would wait for the other one.
        for rank in ("1", "0"):
            monkeypatch.setenv("RANK", rank)
            found = run(*scaled)
            assert (found.code, found.err) == (0, "")
            assert Path("scaled.grood").exists() == (rank == "0")
    finally:
        torch.set_num_threads(before)
    assert Path("scaled.grood").read_bytes() == Path("plain.grood").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "ray"), "a folder for features that all workers see: --cache DIR"),
        (("--engine", "ray", "--cache", "c", "--outliers", "mixup"), "which one process must do"),
        (("--parallel", "3"), "are for --engine ray"),
        (("--engine", "torchrun", "--cache", "c"), "no launcher has told"),
    ],
)
@pytest.mark.usefixtures("digits")
def test_what_does_not_go_together(arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found = run(*FIT, "--output", "x.grood", *arguments)
    assert found.code == 1
    assert message in found.err
    assert not Path("x.grood").exists()
