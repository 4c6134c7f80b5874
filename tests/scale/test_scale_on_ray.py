"""A job on a cluster of this machine's: the same scores, whatever becomes of the workers."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
import scaled_world
from scaled_world import POISON, Poisonable, Together, expected, greys, written

import grey
from torch_grood.errors import GroodError
from torch_grood.scale import Job, inputs_of, score_on_ray
from torch_grood.scale.job import Counts
from torch_grood.scale.parts import Folder
from torch_grood.scale.pool import LIVES, STILLBORN, Pool
from torch_grood.scale.pool import cluster as cluster_of

pytestmark = [
    pytest.mark.slow,
    # Ray's own files and sockets, and what it says of them.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

VALUES = [(37 * place) % 240 for place in range(120)]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    for module in (grey, scaled_world, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()
    # What is left of its processes complains here, and not in some later test.
    gc.collect()


def job_of(tmp_path: Path, span: int = 8) -> Job:
    return Job(inputs_of([str(tmp_path / "images")]), Folder(str(tmp_path / "out")), "a", 4, span)


def refusing() -> Any:
    raise GroodError("this detector cannot be opened here")


def dying() -> Any:
    os._exit(7)


class Slow(Together):
    """Gives whoever kills workers time to do so."""

    def decide(self, pixels: Any) -> Any:
        time.sleep(0.02)
        return super().decide(pixels)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_bit(workers: int, tmp_path: Path) -> None:
    greys(tmp_path / "images", VALUES)
    told: list[Counts] = []
    summary = score_on_ray(job_of(tmp_path), Together, workers=workers, tell=told.append)
    assert {row["number"]: row["score"] for row in written(tmp_path / "out")} == expected(VALUES, 4)
    assert (summary.images, summary.bad, sum(counts.images for counts in told)) == (120, 0, 120)
    # All is done: nothing is started again.
    assert score_on_ray(job_of(tmp_path), refusing) == summary


def test_workers_that_are_killed_lose_nothing_and_score_nothing_twice(tmp_path: Path) -> None:
    values = VALUES * 4
    greys(tmp_path / "images", values)
    over, generator, killed = threading.Event(), random.Random(0), []

    def kill() -> None:
        while not over.wait(0.3):
            pids = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if "ray::_Worker" in name_of(pid)]  # noqa: PTH208
            if pids and len(killed) < 6:
                killed.append(generator.choice(pids))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        summary = score_on_ray(job_of(tmp_path), Slow, workers=2)
    finally:
        over.set()
        killer.join()
    assert killed
    rows = written(tmp_path / "out")
    assert [row["number"] for row in rows] == list(range(len(values)))
    assert {row["number"]: row["score"] for row in rows} == expected(values, 4)
    assert summary.bad == 0


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def test_an_image_that_ends_its_worker_is_left_out_and_its_batch_is_scored_without_it(tmp_path: Path) -> None:
    values = [value if value != POISON else 0 for value in VALUES[:24]]
    values[9] = POISON
    paths = greys(tmp_path / "images", values)
    summary = score_on_ray(job_of(tmp_path), Poisonable, workers=2)
    assert (summary.images, summary.bad) == (23, 1)
    (bad,) = written(tmp_path / "out", "bad")
    assert (bad["number"], bad["path"]) == (9, paths[9])
    assert f"ended {LIVES} worker processes" in bad["error"]
    assert {row["number"]: row["score"] for row in written(tmp_path / "out")} == expected(values, 4, {9})


def test_workers_that_cannot_begin_end_the_job(tmp_path: Path) -> None:
    greys(tmp_path / "images", VALUES[:8])
    with pytest.raises(GroodError, match="this detector cannot be opened here"):
        score_on_ray(job_of(tmp_path), refusing, workers=1)
    with pytest.raises(GroodError, match=f"{STILLBORN} workers in a row died before they could begin"):
        score_on_ray(job_of(tmp_path), dying, workers=1)
    # And the folder is as good as before.
    assert score_on_ray(job_of(tmp_path), Together, workers=1).images == 8


class Doomed:
    """Three meet; told so, one ends with the others, as they do when their machine is lost. Only the first time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def ready(self) -> None:
        pass

    def meet(self) -> int:
        (self._folder / f"{os.getpid()}.pid").touch()
        while len(list(self._folder.glob("*.pid"))) < 3:
            time.sleep(0.02)
        return 0

    def die(self) -> int:
        if (self._folder / "over").exists():
            return 1
        (self._folder / "over").touch()
        # The others have nothing to do by then.
        others = [int(path.stem) for path in self._folder.glob("*.pid") if path.stem != str(os.getpid())]
        for other in others:
            os.kill(other, signal.SIGKILL)
        while any("ray::" in name_of(other) for other in others):
            time.sleep(0.02)
        os._exit(9)


def test_a_task_is_not_lost_again_to_idle_workers_that_died_with_its_own(tmp_path: Path) -> None:
    pool: Pool[str] = Pool(Doomed, (tmp_path,), 3, 0)
    done: list[tuple[str, Any]] = []

    left = deque(["meet", "meet", "meet"])
    for task, result in pool.run(left, lambda worker, task: getattr(worker, task).remote()):
        done.append((task, result))
        if len(done) == 3 or result is None:
            left.append("die")
    assert done == [("meet", 0)] * 3 + [("die", None), ("die", 1)]


class BornLate:
    """As many as there may be in a row die before they begin, all of them at the same time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def ready(self) -> None:
        for number in range(STILLBORN):
            try:
                (self._folder / str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            os._exit(9)

    def double(self, number: int) -> int:
        return 2 * number


def test_many_workers_that_are_lost_together_are_one_loss(tmp_path: Path) -> None:
    pool: Pool[int] = Pool(BornLate, (tmp_path,), STILLBORN, 0)
    found = dict(pool.run(deque(range(20)), lambda worker, number: worker.double.remote(number)))
    assert found == {number: 2 * number for number in range(20)}


def test_a_cluster_without_room_is_told_of() -> None:
    with pytest.warns(UserWarning, match="no machine of the cluster has 1 GPU for a worker; waiting for one"):
        Pool(Doomed, (Path(),), None, 1)


@pytest.mark.parametrize(
    ("address", "environment", "asked"),
    [(None, None, "local"), (None, "10.0.0.1:6379", None), ("auto", None, "auto")],
)
def test_a_cluster_that_runs_is_joined_only_by_those_who_say_so(
    address: str | None, environment: str | None, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str | None] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **options: found.append(address))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    with cluster_of(address):
        assert found == [asked]
