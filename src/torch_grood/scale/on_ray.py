"""A job on Ray: actors hold the model, spans go to whoever is free, and what a dead worker had goes to another one.

An input that ends its worker again and again must not end the job. A span that has lost three workers is cut down to
the batch, and the batch to the input: the one that does it is left out with that reason, and its batch is scored
without it, as if it could not be read.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch_grood._optional import require
from torch_grood.errors import GroodError
from torch_grood.scale.inputs import Inputs, Span
from torch_grood.scale.job import Counts, Job, Summary, probe, score_span
from torch_grood.scale.parts import Folder

if TYPE_CHECKING:
    from torch_grood.runtime import Runtime

__all__ = ["LIVES", "STILLBORN", "score_on_ray"]

LIVES = 3
"""Workers that a span, or an input, may end."""
STILLBORN = 8
"""Workers that may die before they begin, one after the other: what kills workers at random seldom does so."""

_POISON = f"reading or scoring it ended {LIVES} worker processes"


class _Task(NamedTuple):
    """A span to score; or, if `alone`, one input to try."""

    span: Span
    alone: bool = False


class _Worker:
    """The actor."""

    def __init__(self, make_runtime: Callable[[], Runtime]) -> None:
        self._make_runtime = make_runtime

    def ready(self) -> Counts:
        """Open the runtime: here, where an error is told as it is, and not when the actor is made."""
        self._runtime = self._make_runtime()
        return Counts()

    def score(self, inputs: Inputs, span: Span, folder: Folder, batch_size: int, excluded: dict[int, str]) -> Counts:
        return score_span(self._runtime, inputs, span, folder, batch_size, excluded)

    def probe(self, inputs: Inputs) -> Counts:
        probe(self._runtime, inputs)
        return Counts()


def score_on_ray(
    job: Job,
    make_runtime: Callable[[], Runtime],
    *,
    workers: int | None = None,
    address: str | None = None,
    gpus: float = 0,
    tell: Callable[[Counts], None] = lambda counts: None,
) -> Summary:
    """Score all inputs of a job that are not scored yet.

    Args:
        job: to do.
        make_runtime: called by each worker; it is sent there, so that what it names must be there, too. It opens a
            runtime of one thread: then no number of workers changes a bit.
        workers: how many; None: one for each core (or for each GPU, if these are asked for) of the cluster.
        address: of a cluster, "auto" for the one that this machine belongs to; None: one of this machine's own.
        gpus: of each worker.
        tell: is told what each part adds.

    Raises:
        GroodError: if the folder is another job's, a part cannot be written, or a worker cannot begin.
    """
    ray = require("ray", extra="scale")
    left = deque(_Task(span) for span in job.begin())
    if not left:
        return job.finish()
    owned = not ray.is_initialized()
    if owned:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="error")
    try:
        _Run(ray, job, make_runtime, workers or _all_workers(ray, gpus), gpus, tell).do(left)
    finally:
        if owned:
            ray.shutdown()
    return job.finish()


def _all_workers(ray: Any, gpus: float) -> int:
    found = ray.cluster_resources()
    return max(1, int(found.get("GPU", 0) / gpus) if gpus else int(found.get("CPU", 1)))


class _Run:
    """The state of `score_on_ray`."""

    def __init__(
        self,
        ray: Any,
        job: Job,
        make_runtime: Callable[[], Runtime],
        workers: int,
        gpus: float,
        tell: Callable[[Counts], None],
    ) -> None:
        self._ray, self._job, self._tell = ray, job, tell
        self._make_runtime, self._workers = make_runtime, workers
        self._actor: Any = ray.remote(num_cpus=1, num_gpus=gpus)(_Worker)
        self._deaths: Counter[_Task] = Counter()
        self._stillborn = 0
        self._excluded: dict[int, str] = {}
        # Of a batch that has lost too many workers: inputs that are still to be tried before it is scored.
        self._trying: dict[Span, set[int]] = {}
        # What is under way, with its worker; no task: the worker is beginning.
        self._busy: dict[Any, tuple[Any, _Task | None]] = {}

    def do(self, left: deque[_Task]) -> None:
        """All tasks, and what comes of them."""
        idle: list[Any] = []
        for _ in range(min(self._workers, len(left))):
            self._start_worker()
        # Workers that a cluster has no room for may be beginning for ever.
        while left or any(task is not None for _, task in self._busy.values()):
            while left and idle:
                worker, task = idle.pop(), left.popleft()
                self._busy[self._begin(worker, task)] = worker, task
            ready, _ = self._ray.wait(list(self._busy), num_returns=1)
            worker, over = self._busy.pop(ready[0])
            if self._over(ready[0], over, left):
                idle.append(worker)
            else:
                self._start_worker()

    def _start_worker(self) -> None:
        worker = self._actor.remote(self._make_runtime)
        self._busy[worker.ready.remote()] = worker, None

    def _begin(self, worker: Any, task: _Task) -> Any:
        inputs = self._job.inputs.slice(task.span)
        if task.alone:
            return worker.probe.remote(inputs)
        here = {number: why for number, why in self._excluded.items() if task.span[0] <= number < task.span[1]}
        return worker.score.remote(inputs, task.span, self._job.folder, self._job.batch_size, here)

    def _over(self, reference: Any, task: _Task | None, left: deque[_Task]) -> bool:
        """Take what a task has come to; whether its worker lives."""
        errors = self._ray.exceptions
        try:
            counts = self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, GroodError):
                raise error.cause from None
            what = "a worker cannot begin" if task is None else f"scoring the inputs from {task.span[0]} on failed"
            raise GroodError(f"{what}: {_line(error.cause)}") from error
        except (errors.RayActorError, errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            self._lost(task, left, error)
            return False
        self._stillborn = 0
        if task is None:
            return True
        if task.alone:
            self._tried(task, left)
        else:
            self._tell(counts)
        return True

    def _lost(self, task: _Task | None, left: deque[_Task], error: Exception) -> None:
        if task is None:
            self._stillborn += 1
            if self._stillborn >= STILLBORN:
                raise GroodError(f"{STILLBORN} workers in a row died before they could begin: {_line(error)}")
            return
        self._deaths[task] += 1
        if self._deaths[task] < LIVES:
            left.appendleft(task)
            return
        start, stop = task.span
        size = self._job.batch_size
        if task.alone:
            self._excluded[start] = _POISON
            self._tried(task, left)
        elif stop - start > size:
            # Batches begin where they began before: their images round as they did.
            left.extendleft(_Task((at, min(at + size, stop))) for at in range(start, stop, size))
        else:
            self._trying[task.span] = set(range(start, stop)) - self._excluded.keys()
            left.extendleft(_Task((number, number + 1), alone=True) for number in sorted(self._trying[task.span]))

    def _tried(self, task: _Task, left: deque[_Task]) -> None:
        """An input was tried; with the last of its batch, the batch can be scored."""
        span, numbers = next((one, tried) for one, tried in self._trying.items() if one[0] <= task.span[0] < one[1])
        numbers.discard(task.span[0])
        if not numbers:
            del self._trying[span]
            self._deaths[_Task(span)] = 0
            left.appendleft(_Task(span))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
