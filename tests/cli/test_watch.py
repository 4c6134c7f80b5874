"""`grood watch` as its users run it: the rows are those of `grood score`, and a restart goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import run

MODEL = ("--model", "nets.py:net", "--weights", "net.safetensors")
QUICK = ("--once", "--settle", "0", "--interval", "0.05")
# With torch, and one thread of it: as grood itself does.
GROOD = (sys.executable, "-c", "from torch_grood.cli import main; main()")


def rows_of(path: str) -> dict[str, dict[str, object]]:
    found = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    named = {row["path"]: row for row in found}
    assert len(named) == len(found)
    return named


def test_rows_are_those_of_score(digits: Path) -> None:
    watched = run("watch", "net.grood", "ood", "-o", "out.jsonl", *MODEL, *QUICK, "--fpr", "0.2")
    assert (watched.code, watched.out) == (0, "")
    scored = run("score", "net.grood", "ood", *MODEL, "--format", "json", "--fpr", "0.2", "-q")
    expected = {row["path"]: row for row in json.loads(scored.raw)}
    found = rows_of("out.jsonl")
    assert set(found) == set(expected)
    for path, row in expected.items():
        assert found[path]["score"] == pytest.approx(row["score"], rel=1e-6)
        same = ("is_ood", "label", "prototype_label")
        assert [found[path][name] for name in same] == [row[name] for name in same]
    n_ood = sum(row["is_ood"] is True for row in found.values())
    assert f"done: {len(found)} images, {n_ood} of them OOD" in watched.err


def test_a_restart_goes_on(digits: Path) -> None:
    first = run("watch", "net.grood", "ood", "-o", "out.jsonl", *MODEL, *QUICK)
    n = len(rows_of("out.jsonl"))
    shutil.copy(next((digits / "ood").iterdir()), "ood/new.png")
    (digits / "ood/bad.png").write_bytes(b"no image")
    second = run("watch", "net.grood", "ood", "-o", "out.jsonl", *MODEL, *QUICK)
    assert (first.code, second.code) == (0, 0)
    assert f"{n} inputs are done" in second.err
    assert "done: 1 images" in second.err
    assert "1 that could not be scored" in second.err
    assert len(rows_of("out.jsonl")) == n + 2


def test_lines_and_an_earlier_output(digits: Path) -> None:
    paths = sorted((digits / "ood").iterdir())
    (digits / "lines.jsonl").write_text("".join(f'{{"path": "{path.name}"}}\n' for path in paths))
    found = run("watch", "net.grood", "lines.jsonl", "-o", "out.jsonl", "--root", "ood", *MODEL, "--once")
    assert found.code == 0
    assert len(rows_of("out.jsonl")) == len(paths)
    refused = run("watch", "net.grood", "lines.jsonl", "-o", "out.jsonl", "--fpr", "0.3", *MODEL, "--once")
    assert refused.code == 1
    assert "Give another --output" in refused.err
    again = run(
        *("watch", "net.grood", "lines.jsonl", "-o", "new.jsonl", "--done", "out.jsonl", "--fpr", "0.3"),
        *(*MODEL, "--once", "--root", "ood"),
    )
    assert again.code == 0
    assert "done: 0 images" in again.err


def test_an_uncalibrated_detector(digits: Path) -> None:
    fitted = run(
        *("fit", "--model", "nets.py:net", "--weights", "net.safetensors", "--mean", "0.5,0.5,0.5"),
        *("--std", "0.5,0.5,0.5", "--train", "train", "-o", "plain.grood", "-q"),
    )
    assert fitted.code == 0
    found = run("watch", "plain.grood", "ood", "-o", "out.jsonl", *MODEL, *QUICK)
    assert found.code == 0
    assert "not calibrated" in found.err
    assert {row["is_ood"] for row in rows_of("out.jsonl").values()} == {None}
    own = run("watch", "plain.grood", "ood", "-o", "own.jsonl", *MODEL, *QUICK, "--tau", "0")
    assert own.code == 0
    assert {row["is_ood"] for row in rows_of("own.jsonl").values()} == {True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none", "-o", "o.jsonl"), "none: no such folder or file"),
        (("ood", "-o", "none/o.jsonl"), "the folder none does not exist"),
        (("ood", "-o", "ood"), "ood is a folder"),
        (("ood", "-o", "net.grood"), "would overwrite an input"),
        (("ood", "-o", "nets.py"), "line 1: not a row that grood watch wrote"),
        (("ood", "-o", "o.jsonl", "--root", "."), "leave it out for a folder"),
        (("lines", "-o", "o.jsonl", "--root", "none"), "no such folder"),
        (("lines", "-o", "lines"), "would overwrite an input"),
        (("ood", "-o", "o.jsonl", "--fpr", "0.001"), "cannot be promised"),
        (("ood", "-o", "o.jsonl", "--fpr", "0.1", "--tau", "1"), "give one of them"),
        (("/dev/null", "-o", "o.jsonl"), "neither a folder nor a file"),
    ],
)
def test_mistakes(digits: Path, arguments: tuple[str, ...], message: str) -> None:
    Path("lines").write_text('{"path": "a"}\n')
    before = Path("nets.py").read_bytes()
    found = run("watch", "net.grood", *arguments, *MODEL, *QUICK)
    assert found.code == 1
    assert message in found.err
    assert Path("nets.py").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_after_the_batch(digits: Path, number: int) -> None:
    command = [*GROOD, "watch", "net.grood", "ood", "-o", "out.jsonl", *MODEL, "--interval", "0.1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not (Path("out.jsonl").is_file() and Path("out.jsonl").stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped:" in err
    assert len(rows_of("out.jsonl")) == len(list((digits / "ood").iterdir()))


@pytest.mark.slow
def test_stdin(digits: Path) -> None:
    paths = sorted((digits / "ood").iterdir())[:5]
    found = subprocess.run(
        [*GROOD, "watch", "net.grood", "-", "-o", "out.jsonl", *MODEL, "--max-wait", "0.01"],
        input="".join(f'{{"path": "ood/{path.name}", "id": {i}}}\n' for i, path in enumerate(paths)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert {row["id"] for row in rows_of("out.jsonl").values()} == set(range(5))
