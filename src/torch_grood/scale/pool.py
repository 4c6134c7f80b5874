"""Actors of Ray that do tasks, and what is known of those that die, alone or with their machine.

What a lost worker had comes back as lost, and whoever asked decides whether it is tried again. A new worker takes the
place of a lost one as long as there is something to do. One that a cluster has no room for keeps nobody from working:
it begins when there is room, on a machine that joins later, or never.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from torch_grood._optional import require
from torch_grood.errors import GroodError

__all__ = ["LIVES", "STILLBORN", "Pool", "cluster", "got"]

LIVES = 3
"""Workers that a task may end."""
STILLBORN = 8
"""Workers that may die before they begin, each in the place of the one before: what kills workers at random seldom
does so, and many that are lost with one machine are one loss."""

Task = TypeVar("Task")


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A cluster while it lasts: the one that is connected to already, that of an address, or one of its own.

    Args:
        address: "auto" for the one that this machine belongs to; None: that of RAY_ADDRESS, else one of its own.

    Raises:
        GroodError: if there is none.
    """
    ray = require("ray", extra="scale")
    if ray.is_initialized():
        yield
        return
    # Without an address, Ray would join whatever was begun last on this machine.
    address = address or (None if os.environ.get("RAY_ADDRESS") else "local")
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
        room = self._room(gpus)
        self._workers = workers or max(1, room)
        # What is under way, with its worker; no task: the worker is beginning.
        self._busy: dict[Any, tuple[Any, Task | None]] = {}
        # Of workers that are beginning: how many were lost, one after the other, in whose places they are.
        self._lost_before: dict[Any, int] = {}
        self._stillborn = 0

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
        while left or len(self._busy) > len(self._lost_before):
            while left and idle:
                worker, task = idle.pop(), left.popleft()
                self._busy[begin(worker, task)] = worker, task
            while len(self._busy) < self._workers and len(self._lost_before) < len(left):
                self._start_worker()
            ready, _ = self._ray.wait(list(self._busy), num_returns=1)
            worker, over = self._busy.pop(ready[0])
            result, lives = self._result(ready[0], over)
            if lives:
                idle.append(worker)
            else:
                # It may live where nobody reaches it. And others may have gone with it: a task is not to be lost to
                # one that is known to nobody as dead.
                self._ray.kill(worker)
                idle.clear()
            if over is not None:
                yield over, result

    def _start_worker(self) -> None:
        worker = self._actor.remote(*self._arguments)
        begun = worker.ready.remote()
        self._busy[begun] = worker, None
        self._lost_before[begun] = self._stillborn

    def _result(self, reference: Any, task: Task | None) -> tuple[Any, bool]:
        """What a task has come to, and whether its worker lives."""
        errors = self._ray.exceptions
        before = self._lost_before.pop(reference, 0)
        try:
            found = self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, GroodError):
                raise error.cause from None
            raise GroodError(f"{_failed(task)}: {one_line(error.cause)}") from error
        except _lost(errors) as error:
            if task is None:
                self._stillborn = max(self._stillborn, before + 1)
                if self._stillborn >= STILLBORN:
                    raise GroodError(
                        f"{STILLBORN} workers in a row died before they could begin: {one_line(error)}"
                    ) from None
            return None, False
        except errors.RayError as error:
            raise GroodError(f"{_failed(task)}: {one_line(error)}") from error
        self._stillborn = 0
        self._lost_before = dict.fromkeys(self._lost_before, 0)
        return found, True

    def _room(self, gpus: float) -> int:
        found = self._ray.cluster_resources()
        room = int(found.get("GPU", 0) / gpus) if gpus else int(found.get("CPU", 0))
        if room == 0:
            # Not an error: a cluster may grow when somebody asks.
            what = f"{gpus:g} GPU" if gpus else "a core"
            warnings.warn(f"no machine of the cluster has {what} for a worker; waiting for one", stacklevel=3)
        return room


def _lost(errors: Any) -> tuple[type[Exception], ...]:
    """What is raised when a process, its machine, the way to it, or what was on it is gone."""
    return (
        errors.RayActorError,
        errors.WorkerCrashedError,
        errors.OutOfMemoryError,
        errors.NodeDiedError,
        errors.LocalRayletDiedError,
        errors.ObjectLostError,
        errors.RaySystemError,
        errors.RpcError,
        errors.ActorUnschedulableError,
    )


def _failed(task: object) -> str:
    return "a worker cannot begin" if task is None else f"{task} failed"


def got(references: list[Any], what: str) -> list[Any]:
    """What actors have come to that last: their loss is made good by Ray.

    Args:
        references: to it.
        what: it is, for messages.

    Raises:
        GroodError: as an actor raised it, or if it failed otherwise.
    """
    ray = require("ray", extra="scale")
    try:
        found: list[Any] = ray.get(references)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, GroodError):
            raise error.cause from None
        raise GroodError(f"{what} failed: {one_line(error.cause)}") from error
    except ray.exceptions.RayError as error:
        raise GroodError(f"{what} failed: {one_line(error)}") from None
    return found


def one_line(error: BaseException) -> str:
    """What it says, in one line."""
    return " ".join(str(error).split())[:500]
