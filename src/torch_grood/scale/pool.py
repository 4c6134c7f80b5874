"""Actors of Ray that do tasks, and what is known of those that die.

What a dead worker had comes back as lost, and whoever asked decides whether it is tried again. A new worker takes the
place of a dead one; workers that a cluster has no room for are waited for only as long as others work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from torch_grood._optional import require
from torch_grood.errors import GroodError

__all__ = ["LIVES", "STILLBORN", "Pool", "cluster"]

LIVES = 3
"""Workers that a task may end."""
STILLBORN = 8
"""Workers that may die before they begin, one after the other: what kills workers at random seldom does so."""

Task = TypeVar("Task")


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A cluster while it lasts: the one that is connected to already, that of an address, or one of this machine's own.

    Args:
        address: "auto" for the one that this machine belongs to; None: one of its own.

    Raises:
        GroodError: if there is none.
    """
    ray = require("ray", extra="scale")
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise GroodError(f"there is no cluster at {address!r}: {one_line(error)}") from None
    try:
        yield
    finally:
        ray.shutdown()


class Pool(Generic[Task]):
    """Workers of one kind, each with one core.

    Args:
        worker: class of the actor; `ready`, without arguments, is its first task.
        arguments: of the class; sent to each actor.
        workers: how many; None: one for each core (or for each GPU, if these are asked for) of the cluster.
        gpus: of each.
    """

    def __init__(self, worker: type, arguments: tuple[Any, ...], workers: int | None, gpus: float) -> None:
        self._ray = require("ray", extra="scale")
        self._actor: Any = self._ray.remote(num_cpus=1, num_gpus=gpus)(worker)
        self._arguments = arguments
        self._workers = workers or self._room(gpus)
        self._stillborn = 0
        # What is under way, with its worker; no task: the worker is beginning.
        self._busy: dict[Any, tuple[Any, Task | None]] = {}

    def run(self, left: deque[Task], begin: Callable[[Any, Task], Any]) -> Iterator[tuple[Task, Any]]:
        """Do all tasks.

        Args:
            left: tasks; whoever iterates may add some.
            begin: starts a task on an actor, and gives the reference of what comes of it.

        Yields:
            A task and what came of it, as they end; None if it ended its worker.

        Raises:
            GroodError: as a worker raised it; if workers cannot begin, or fail in a way that nobody expected.
        """
        idle: list[Any] = []
        for _ in range(min(self._workers, len(left))):
            self._start_worker()
        while left or any(task is not None for _, task in self._busy.values()):
            while left and idle:
                worker, task = idle.pop(), left.popleft()
                self._busy[begin(worker, task)] = worker, task
            ready, _ = self._ray.wait(list(self._busy), num_returns=1)
            worker, over = self._busy.pop(ready[0])
            result, lives = self._result(ready[0], over)
            if lives:
                idle.append(worker)
            else:
                self._start_worker()
            if over is not None:
                yield over, result

    def _start_worker(self) -> None:
        worker = self._actor.remote(*self._arguments)
        self._busy[worker.ready.remote()] = worker, None

    def _result(self, reference: Any, task: Task | None) -> tuple[Any, bool]:
        """What a task has come to, and whether its worker lives."""
        errors = self._ray.exceptions
        try:
            found = self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, GroodError):
                raise error.cause from None
            what = "a worker cannot begin" if task is None else f"{task} failed"
            raise GroodError(f"{what}: {one_line(error.cause)}") from error
        except (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            if task is None:
                self._stillborn += 1
                if self._stillborn >= STILLBORN:
                    raise GroodError(
                        f"{STILLBORN} workers in a row died before they could begin: {one_line(error)}"
                    ) from None
            return None, False
        self._stillborn = 0
        return found, True

    def _room(self, gpus: float) -> int:
        found = self._ray.cluster_resources()
        return max(1, int(found.get("GPU", 0) / gpus) if gpus else int(found.get("CPU", 1)))


def one_line(error: BaseException) -> str:
    """What it says, in one line."""
    return " ".join(str(error).split())[:500]
