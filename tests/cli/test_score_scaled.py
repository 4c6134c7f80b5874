"""`grood score --engine`: the decisions of the plain command, as Parquet parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")

import pyarrow.parquet as pq
from command import run

MODEL = ("--model", "nets.py:net", "--weights", "net.safetensors")


def plain(*arguments: object) -> dict[str, dict[str, object]]:
    found = run("score", "net.grood", "test", "ood", *MODEL, "--format", "json", "--batch-size", "16", *arguments)
    assert found.code == 0
    return {Path(row["path"]).name: row for row in json.loads(found.raw)}


def written(folder: str, kind: str = "scores") -> dict[str, dict[str, object]]:
    rows = [row for file in Path(folder, kind).glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    return {Path(row["path"]).name: row for row in rows}


def assert_same(found: dict[str, dict[str, object]], expected: dict[str, dict[str, object]]) -> None:
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        assert {key: found[name][key] for key in row if key != "path"} == {
            key: row[key] for key in row if key != "path"
        }


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")


@pytest.mark.usefixtures("digits", "one_rank")
def test_one_process_of_a_launcher_decides_as_the_plain_command() -> None:
    scaled = ("--engine", "torchrun", "--output", "out", "--batch-size", "16", *MODEL)
    found = run("score", "net.grood", "test", "ood", *scaled)
    assert (found.code, found.out) == (0, "")
    expected = plain()
    assert_same(written("out"), expected)
    flagged = sum(row["is_ood"] is True for row in expected.values())
    assert (
        f"done: {len(expected)} images scored, {flagged} of them OOD; 0 inputs left out (out/scores and bad)"
        in found.err
    )
    again = run("score", "net.grood", "test", "ood", *scaled)
    assert (again.code, again.err) == (0, found.err)
    other = run("score", "net.grood", "test", "ood", *scaled, "--fpr", "0.3")
    assert other.code == 1
    assert "another job, which has another detector, rate or preprocessing" in other.err


@pytest.mark.usefixtures("digits")
@pytest.mark.slow
def test_several_processes_of_a_launcher(digits: Path) -> None:
    (digits / "test" / "one" / "broken.png").write_bytes(b"no image")
    command = [sys.executable, "-m", "torch_grood", "score", "net.grood", "test", "ood", *MODEL]
    command += ["--engine", "torchrun", "--output", "out", "--batch-size", "16"]
    environment = {**os.environ, "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    said = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert "1 inputs left out" in said[0]
    assert said[1] == said[2] == ""
    assert_same(written("out"), plain("--skip-bad"))
    assert [row["error"] for row in written("out", "bad").values()] == ["not an image, or damaged at its beginning"]


@pytest.mark.usefixtures("digits")
@pytest.mark.slow
def test_ray_decides_as_the_plain_command() -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "torch_grood", "score", "net.grood", "test", "ood", *MODEL]
    command += ["--engine", "ray", "--parallel", "2", "--output", "out", "--batch-size", "16"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert found.returncode == 0, found.stderr
    assert_same(written("out"), plain())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "ray"), "name it: --output DIR"),
        (("--engine", "ray", "--output", "net.grood"), "is a file; --engine writes a folder"),
        (("--engine", "ray", "--output", "out", "--explain", "--fdr", "0.1"), "--fdr, --explain is for --engine local"),
        (("--engine", "torchrun", "--output", "out"), "run: torchrun --nproc-per-node 4 -m torch_grood score"),
        (("--parallel", "2"), "are for --engine ray"),
        (("--image-column", "x"), "are for --engine ray"),
        (("--engine", "spark"), "'spark' is not one of"),
    ],
)
@pytest.mark.usefixtures("digits")
def test_what_does_not_go_together(arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found = run("score", "net.grood", "test", *MODEL, *arguments)
    assert found.code == (2 if "spark" in arguments else 1)
    assert message in found.err
    assert not Path("out").exists()
