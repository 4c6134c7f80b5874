"""Machines of a cluster that are lost while they work: what they had is done elsewhere, once, with the same bits."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
from filling_world import MakeFiller, N, fitted, write_photos
from ray.cluster_utils import Cluster
from scaled_world import Together, expected, greys, written

from torch_grood.scale import Job, inputs_of, score_on_ray
from torch_grood.scale.filling import Filler, fill_on_ray
from torch_grood.scale.job import Counts
from torch_grood.scale.parts import Folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # Ray's own files and sockets, and what it says of them.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

VALUES = [(37 * place) % 240 for place in range(120)]
# Long enough for any machine; nothing waits so long where all is well.
PATIENCE = 200


class Machines:
    """A cluster: a head that computes nothing, and machines of one core each, by number."""

    def __init__(self) -> None:
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self._cluster.address
        self._nodes: dict[str, Any] = {}

    def add(self) -> str:
        node = self._cluster.add_node(num_cpus=1)
        self._nodes[node.node_id] = node
        return str(node.node_id)

    def lose(self, which: str) -> None:
        """At once, as if its power were cut."""
        self._cluster.remove_node(self._nodes.pop(which), allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    # Workers find this module where this process does.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    # Not where Ray looks for a cluster that may be joined: other tests begin their own. Sockets need short paths.
    folder = tempfile.mkdtemp(prefix="grood-")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    found = Machines()
    try:
        ray.init(address=found.address, log_to_driver=False, logging_level="error")
        yield found
    finally:
        ray.shutdown()
        found.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        # What is left of its processes complains here, and not in some later test.
        gc.collect()


def wait_for(what: Callable[[], object], job: Future[Any] | None = None) -> None:
    """Wait for it, unless the job fails before."""
    until = time.monotonic() + PATIENCE
    while not what():
        if job is not None and job.done():
            job.result()
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def beside(what: Callable[[], Any]) -> Future[Any]:
    """Do it in a thread that keeps nobody from ending. Machines can be added by the main thread only."""
    found: Future[Any] = Future()

    def run() -> None:
        try:
            found.set_result(what())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found


class Gate:
    """Workers stop at it, and leave the number of their machine there, until it is opened."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def __call__(self) -> None:
        (self._folder / ray.get_runtime_context().get_node_id()).touch()
        wait_for((self._folder / "open").exists)

    def open(self) -> None:
        (self._folder / "open").touch()

    def before(self) -> set[str]:
        """Machines of those who came to it."""
        return set(os.listdir(self._folder)) - {"open"}  # noqa: PTH208


class Gated(Together):
    """Stops at each gate when so many parts are there."""

    def __init__(self, parts: Path, gates: dict[int, Gate]) -> None:
        super().__init__()
        self._parts, self._gates = parts, gates

    def decide(self, pixels: Any) -> Any:
        done = len(os.listdir(self._parts)) if self._parts.exists() else 0  # noqa: PTH208
        for after, gate in self._gates.items():
            if done >= after:
                gate()
        return super().decide(pixels)


class GatedFiller(MakeFiller):
    """Stops at a gate before it fills."""

    def __init__(self, images: Path, cache: Path, gate: Gate) -> None:
        super().__init__(images, cache)
        self._gate = gate

    def __call__(self) -> Filler:
        found = super().__call__()
        fill = found.fill

        def gated(piece: range) -> int:
            self._gate()
            return fill(piece)

        found.fill = gated  # type: ignore[method-assign]
        return found


def test_every_machine_is_lost_and_another_one_ends_the_job(machines: Machines, tmp_path: Path) -> None:
    greys(tmp_path / "images", VALUES)
    first, second = machines.add(), machines.add()
    begun, midway = Gate(tmp_path / "begun"), Gate(tmp_path / "midway")

    job = Job(inputs_of([str(tmp_path / "images")]), Folder(str(tmp_path / "out")), "a", 4, 8)
    runtime = partial(Gated, tmp_path / "out" / "scores", {0: begun, 3: midway})
    told: list[Counts] = []
    # More workers than there ever is room for.
    scoring = beside(lambda: score_on_ray(job, runtime, workers=4, tell=told.append))
    wait_for(lambda: begun.before() == {first, second}, scoring)
    machines.lose(first)
    begun.open()
    wait_for(lambda: second in midway.before(), scoring)
    machines.lose(second)
    third = machines.add()
    wait_for(lambda: third in midway.before(), scoring)
    midway.open()
    summary = scoring.result(PATIENCE)
    rows = written(tmp_path / "out")
    assert [row["number"] for row in rows] == list(range(len(VALUES)))
    assert {row["number"]: row["score"] for row in rows} == expected(VALUES, 4)
    assert (summary.images, summary.bad, sum(counts.images for counts in told)) == (120, 0, 120)


def test_a_fit_after_a_machine_was_lost(machines: Machines, tmp_path: Path) -> None:
    photos, cache = write_photos(tmp_path / "photos"), tmp_path / "cache"
    first, second = machines.add(), machines.add()
    gate = Gate(tmp_path / "gate")

    told: list[int] = []
    filling = beside(
        lambda: fill_on_ray(GatedFiller(photos / "train", cache, gate), workers=3, tell=told.append),
    )
    wait_for(lambda: gate.before() == {first, second}, filling)
    machines.lose(first)
    gate.open()
    filling.result(PATIENCE)
    assert sum(told) == N
    assert MakeFiller(photos / "train", cache)().missing() == []
    assert fitted(photos, cache) == fitted(photos, None)
