"""Scoring on Ray: actors hold the runtime, spans go to whoever is free, and what a dead worker had goes to another one.

An input that ends its worker again and again must not end the job. A span that has lost three workers is cut down to
the batch, and the batch to the input: the one that does it is left out with that reason, and its batch is scored
without it, as if it could not be read.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch_grood.scale.inputs import Inputs, Span
from torch_grood.scale.job import Counts, Job, Summary, probe, score_span
from torch_grood.scale.parts import Folder
from torch_grood.scale.pool import LIVES, Pool, cluster

if TYPE_CHECKING:
    from torch_grood.neighbors.sharded import ShardFiles
    from torch_grood.runtime import Runtime
    from torch_grood.scale.shards import RemoteSearcher

__all__ = ["score_on_ray"]

_POISON = f"reading or scoring it ended {LIVES} worker processes"


class _Task(NamedTuple):
    """A span to score; or, if `alone`, one input to try."""

    span: Span
    alone: bool = False

    def __str__(self) -> str:
        return f"scoring inputs {self.span[0]} to {self.span[1] - 1}"


class _Worker:
    """The actor."""

    def __init__(self, make_runtime: Callable[[], Runtime]) -> None:
        self._make_runtime = make_runtime

    def ready(self) -> None:
        """Open the runtime: here, where an error is told as it is, and not when the actor is made."""
        self._runtime = self._make_runtime()

    def score(self, inputs: Inputs, span: Span, folder: Folder, batch_size: int, excluded: dict[int, str]) -> Counts:
        return score_span(self._runtime, inputs, span, folder, batch_size, excluded)

    def probe(self, inputs: Inputs) -> Counts:
        probe(self._runtime, inputs)
        return Counts()


@dataclass(frozen=True)
class _WithSearcher:
    """Makes a runtime that asks actors for its neighbours."""

    make_runtime: Callable[[], Runtime]
    searcher: RemoteSearcher

    def __call__(self) -> Runtime:
        from torch_grood.runtime import DetectorRuntime

        runtime = self.make_runtime()
        assert isinstance(runtime, DetectorRuntime)
        runtime.detector.search_with(self.searcher)
        return runtime


def score_on_ray(
    job: Job,
    make_runtime: Callable[[], Runtime],
    *,
    workers: int | None = None,
    address: str | None = None,
    gpus: float = 0,
    shards: ShardFiles | None = None,
    tell: Callable[[Counts], None] = lambda counts: None,
) -> Summary:
    """Score all inputs of a job that are not scored yet.

    Args:
        job: to do.
        make_runtime: called by each worker; it is sent there, so that what it names must be there, too. It opens a
            runtime of one thread: then no number of workers changes a bit.
        workers: see `Pool`.
        address: see `cluster`.
        gpus: of each worker.
        shards: of the detector's gradients (`DetectorRuntime.shards`): each is searched by an actor of its own, which
            the workers ask; None: each worker searches all gradients by itself.
        tell: is told what each part adds.

    Raises:
        GroodError: if the folder is another job's, a part cannot be written, or as `Pool.run`.
    """
    left = deque(_Task(span) for span in job.begin())
    if left:
        with cluster(address), ExitStack() as stack:
            if shards is not None:
                from torch_grood.scale.shards import searching

                make_runtime = _WithSearcher(make_runtime, stack.enter_context(searching(shards)))
            _Scoring(job, tell).run(Pool(_Worker, (make_runtime,), workers, gpus), left)
    return job.finish()


class _Scoring:
    """The state of `score_on_ray`."""

    def __init__(self, job: Job, tell: Callable[[Counts], None]) -> None:
        self._job, self._tell = job, tell
        self._deaths: Counter[_Task] = Counter()
        self._excluded: dict[int, str] = {}
        # Of a batch that has lost too many workers: inputs that are still to be tried before it is scored.
        self._trying: dict[Span, set[int]] = {}

    def run(self, pool: Pool[_Task], left: deque[_Task]) -> None:
        """All tasks, and what comes of them."""
        for task, counts in pool.run(left, self._begin):
            if counts is None:
                self._lost(task, left)
            elif task.alone:
                self._tried(task, left)
            else:
                self._tell(counts)

    def _begin(self, worker: Any, task: _Task) -> Any:
        inputs = self._job.inputs.slice(task.span)
        if task.alone:
            return worker.probe.remote(inputs)
        here = {number: why for number, why in self._excluded.items() if task.span[0] <= number < task.span[1]}
        return worker.score.remote(inputs, task.span, self._job.folder, self._job.batch_size, here)

    def _lost(self, task: _Task, left: deque[_Task]) -> None:
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
