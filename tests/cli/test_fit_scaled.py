"""`grood fit --engine`: the file of the plain command, byte for byte."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import PREPARED, run

from torch_grood import GROOD

pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

MODEL = ("--model", "nets.py:net", "--weights", "net.safetensors")
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
        (("--parallel", "3"), "are for --engine ray"),
        (("--shards", "2"), "are for --engine ray"),
        (("--shards", "2", "--engine", "torchrun", "--cache", "c"), "--shards needs --engine ray, not torchrun"),
        (("--shards", "2", "--engine", "ray", "--cache", "c", "--outliers", "mixup"), "Mixup mixes images of all"),
        (("--shards", "99", "--engine", "ray", "--cache", "c"), "batches of images make 1 to"),
        (("--shards", "2", "--engine", "ray", "--cache", "c", "--index", "IVF4,Flat"), "shards are searched exactly"),
        (("--shards", "2", "--engine", "ray", "--cache", "c", "--per-class", "50%"), "a subset is chosen from all"),
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


@pytest.mark.slow
@pytest.mark.usefixtures("digits")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_detector_in_shards_is_fitted_and_scores_as_one() -> None:
    pytest.importorskip("ray")
    # Each command in a process of its own: Ray leaves threads behind.
    grood = [sys.executable, "-m", "torch_grood"]
    run_fit = [*grood, *FIT, "--quiet", "--output"]
    subprocess.run([*run_fit, "plain.grood"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    scaled = ["many.grood", "--cache", "features", "--engine", "ray", "--parallel", "2", "--shards", "3"]
    found = subprocess.run([*run_fit, *scaled], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert len(list(Path().glob("many-*-of-00003.grood"))) == 3
    Path("joined").mkdir()
    GROOD.load("many.grood").save("joined/plain.grood")
    assert Path("joined/plain.grood").read_bytes() == Path("plain.grood").read_bytes()
    score = [*grood, "score", "many.grood", "ood", *MODEL]
    for number, engine in enumerate((["--engine", "ray", "--output", "out"], ["--output", "plain.csv"])):
        found = subprocess.run([*score, *engine], check=False, capture_output=True, text=True)
        assert found.returncode == 0, (number, found.stderr)
    scores = [row["score"] for file in sorted(Path("out/scores").iterdir()) for row in pq.read_table(file).to_pylist()]
    with Path("plain.csv").open() as file:
        assert scores == [float(row["score"]) for row in csv.DictReader(file)]
