"""kill -9 at any moment: every image has exactly one row in the end."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watch_world import put, rows_of

WATCHER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from grey import Grey
from torch_grood.watching import Folder, Stream, opened_journal, watch
folder, kind = Path(sys.argv[1]), sys.argv[2]
with opened_journal(folder / "out", "d", kind) as journal:
    done = journal.done
    source = (
        Folder(folder / "in", done.seen, settle=0, interval=0.01)
        if kind == "folder"
        else Stream(folder / "s.jsonl", done.spans, done.last, interval=0.01)
    )
    print("open", flush=True)
    watch(source, Grey(lambda: time.sleep(0.004)), journal, "d", batch_size=3, max_wait=0.005, retry_after=0.02)
"""


@pytest.mark.parametrize("kind", ["folder", "stream"])
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kills(tmp_path: Path, kind: str, kills: int) -> None:
    chance = random.Random(kills)
    (tmp_path / "in").mkdir()
    (tmp_path / "s.jsonl").touch()
    n = 0
    for _ in range(kills):
        command = [sys.executable, "-c", WATCHER, str(tmp_path), kind, str(Path(__file__).parent.parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            until = time.monotonic() + chance.uniform(0, 0.3)
            while time.monotonic() < until:
                n += 1
                _add(tmp_path, n)
                time.sleep(0.002)
            process.kill()
    # The last one ends when all is done.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while len(_paths(tmp_path)) < n and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
    paths = _paths(tmp_path)
    assert len(paths) == len(set(paths)) == n > kills
    assert sum(row["error"] is not None for row in rows_of(tmp_path / "out")) == n // 7


def _add(folder: Path, number: int) -> None:
    """One more image, of which every seventh is damaged."""
    path = folder / f"in/{number:05}.png"
    temporary = put(folder / f"in/.{number}", number % 200)
    if number % 7 == 0:
        temporary.write_bytes(b"damaged")
    temporary.rename(path)
    with (folder / "s.jsonl").open("a") as file:
        file.write(f'{{"path": "in/{number:05}.png"}}\n')


def _paths(folder: Path) -> list[str]:
    whole = (folder / "out").read_bytes().rpartition(b"\n")[0]
    (folder / "whole").write_bytes(whole)
    return [Path(row["path"]).name for row in rows_of(folder / "whole")]
