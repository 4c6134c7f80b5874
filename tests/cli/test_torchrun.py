"""`--engine torchrun` with the launcher itself: what the plain commands find, also after a process was killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")

import pyarrow.parquet as pq
from command import PREPARED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE = 200
MODEL = ("--model", "held.py:net", "--weights", "net.safetensors", "--batch-size", "16")
FIT = ("fit", *MODEL, *PREPARED, "--train", "train", "--calibrate", "val", "--quiet")
SCORE = ("score", "net.grood", "images.txt", *MODEL)

# A network of which one process stops, told so, and leaves its number.
HELD = """
import os
import time
from pathlib import Path

import nets


def net(num_classes=10):
    made = nets.net(num_classes)
    calls = 0

    def hold(*_):
        nonlocal calls
        calls += 1
        if calls == int(os.environ["HOLD_AT"]):
            Path("held.part").write_text(str(os.getpid()))
            Path("held.part").replace("held")
            time.sleep(1000)

    if os.environ["RANK"] == os.environ.get("HOLD_RANK"):
        made.register_forward_pre_hook(hold)
    return made
"""


@pytest.fixture
def work(digits: Path) -> Path:
    """With a list of more images than two spans have."""
    (digits / "held.py").write_text(HELD)
    files = [path for folder in ("test", "ood") for path in sorted(Path(folder).rglob("*.png"))]
    times = -(-2500 // len(files))
    (digits / "images.txt").write_text("".join(f"{path}\n" for path in files * times))
    return digits


def environment(**more: str) -> dict[str, str]:
    # Where `import nets` finds it.
    path = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def plain(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch_grood", *arguments]
    found = subprocess.run(command, env=environment(RANK=""), capture_output=True, text=True, timeout=PATIENCE)
    assert found.returncode == 0, found.stderr
    return found.stdout


def launcher(*arguments: str, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "torch_grood", *arguments, "--engine", "torchrun"]
    return subprocess.Popen(
        command, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def launched(*arguments: str) -> None:
    run = launcher(*arguments)
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, said


def killed(*arguments: str, at: int, folder: str) -> None:
    """The second process is killed at that call of its network, when something is kept in a folder."""
    run = launcher(*arguments, HOLD_RANK="1", HOLD_AT=str(at))
    until = time.monotonic() + PATIENCE
    while not (Path("held").exists() and any(path.is_file() for path in Path(folder).rglob("*"))):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
    os.kill(int(Path("held").read_text()), signal.SIGKILL)
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode != 0
    assert "SIGKILL" in said


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def rows(folder: str) -> list[dict[str, Any]]:
    found = [row for file in Path(folder, "scores").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    return sorted(found, key=lambda row: row["number"])


def decisions(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    keys = ("path", "score", "p_value", "is_ood", "label", "prototype_label")
    return sorted((str(Path(row["path"]).absolute()), *(row[key] for key in keys[1:])) for row in found)


@pytest.mark.usefixtures("work")
def test_score_is_that_of_the_plain_command_also_after_a_kill() -> None:
    launched(*SCORE, "--output", "out")
    assert decisions(rows("out")) == decisions(json.loads(plain(*SCORE, "--format", "json")))
    assert [row["number"] for row in rows("out")] == list(range(len(Path("images.txt").read_text().splitlines())))
    killed(*SCORE, "--output", "again", at=20, folder="again/scores")
    assert not Path("again", "done.json").exists()
    assert 0 < len(rows("again")) < len(rows("out"))
    launched(*SCORE, "--output", "again")
    assert rows("again") == rows("out")


@pytest.mark.usefixtures("work")
def test_fit_is_that_of_the_plain_command_also_after_a_kill() -> None:
    plain(*FIT, "--output", "plain.grood")
    launched(*FIT, "--cache", "features", "--output", "launched.grood")
    assert sha256("launched.grood") == sha256("plain.grood")
    killed(*FIT, "--cache", "others", "--output", "again.grood", at=8, folder="others")
    assert not Path("again.grood").exists()
    launched(*FIT, "--cache", "others", "--output", "again.grood")
    assert sha256("again.grood") == sha256("plain.grood")
