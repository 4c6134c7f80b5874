"""Images of many requests, decided about together.

    submit ──▶ threads that decode ──▶ a thread that decides, with what is ready, up to a batch ──▶ the event loop

Nothing waits for a batch to fill: while one is decided about, the next one gathers. So an image that comes alone is
scored at once, and many make large batches. There may be several deciding threads: a small network keeps them all at
work, where one batch on all cores would wait for the slowest of them again and again. All that is counted is counted in
the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from torch_grood.data.images import BadImageError, decode_image
from torch_grood.errors import GroodError
from torch_grood.runtime.base import Decision, decide_each
from torch_grood.serving.limits import RefusedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from torch_grood.runtime import Runtime

__all__ = ["Outcome", "Scored", "Scorer"]

log = logging.getLogger("torch_grood.serving")

# Where preprocessing leaves the size to the image: of one image, and of a batch. Its activations take a hundred times
# as much memory.
_MAX_UNCROPPED = 4_000_000
# Decoded images that wait for their batch. Files of a few kilobytes become megabytes.
_MAX_DECODED_BYTES = 2**28
_RETRY_AFTER = 1


@dataclass(frozen=True, slots=True)
class Scored:
    """A decision and, where asked for, the nearest training images, nearest first."""

    decision: Decision
    neighbors: tuple[int, ...]


Outcome = Scored | GroodError
"""Of one image: a decision, or why there is none."""


@dataclass(eq=False, slots=True)
class _Job:
    """The images of one request."""

    future: asyncio.Future[list[Outcome]]
    neighbors: int
    left: int
    outcomes: list[Outcome | None]
    # Nobody waits for it any more.
    given_up: bool = False
    # It was in a batch that failed.
    failed: bool = False


@dataclass(eq=False, slots=True)
class _Ticket:
    """One image of a job, on its way."""

    job: _Job
    position: int
    content: bytes
    pixels: NDArray[np.uint8] | None = None
    # None in the end: nobody waits for it, or its batch failed.
    outcome: Outcome | None = None


class Scorer:
    """See the module's docstring. All methods are for the thread of the event loop.

    Args:
        runtime: decides.
        batch_size: images that it gets at a time, at most.
        queue: images that wait, at most.
        max_pixels: that an image declares.
        threads: that decode.
        deciders: threads that decide, each about a batch.
        on_batch: is told the size of each batch, in the event loop.

    Attributes:
        waiting: images that are not done.
        failures: batches that ended by an error that nobody expected.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        batch_size: int = 64,
        queue: int = 1024,
        max_pixels: int = 50_000_000,
        threads: int = 1,
        deciders: int = 1,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._runtime, self._batch_size, self._queue, self._on_batch = runtime, batch_size, queue, on_batch
        size = runtime.transform.output_size
        self._max_pixels = min(max_pixels, _MAX_UNCROPPED) if size is None else max_pixels
        self._batch_pixels = _MAX_UNCROPPED if size is None else batch_size * size[0] * size[1]
        self._decoded_bytes = 0
        self._room = threading.Condition()
        self._incoming: SimpleQueue[_Ticket | None] = SimpleQueue()
        self._ready: SimpleQueue[_Ticket | None] = SimpleQueue()
        self._decoders = [
            threading.Thread(target=self._decode, name=f"grood-decode-{i}", daemon=True) for i in range(threads)
        ]
        if deciders > 1 and not runtime.concurrent:
            raise GroodError("this detector decides about one batch at a time; leave --parallel out, or export it")
        self._deciders = [
            threading.Thread(target=self._decide, name=f"grood-decide-{i}", daemon=True) for i in range(deciders)
        ]
        self._loop: asyncio.AbstractEventLoop | None = None
        self.waiting = 0
        self.failures = 0

    def start(self) -> None:
        """Begin; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        for thread in (*self._decoders, *self._deciders):
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether images are being decided about."""
        return all(thread.is_alive() for thread in (*self._decoders, *self._deciders))

    async def stop(self) -> None:
        """End when all that was submitted is done."""
        for threads, queue in ((self._decoders, self._incoming), (self._deciders, self._ready)):
            for _ in threads:
                queue.put(None)
            for thread in threads:
                await asyncio.to_thread(thread.join)

    async def score(self, contents: Sequence[bytes], neighbors: int = 1, seconds: float = 30.0) -> list[Outcome]:
        """Decide about image files.

        Args:
            contents: of the files.
            neighbors: training images wanted of each.
            seconds: after which they are given up.

        Raises:
            RefusedError: if too many images wait, or it takes too long (503), or the runtime failed in a way that
                nobody expected (500).
        """
        if self.waiting and self.waiting + len(contents) > self._queue:
            raise RefusedError(503, f"{self.waiting} images wait already; try again later", retry_after=_RETRY_AFTER)
        assert self._loop is not None
        job = _Job(self._loop.create_future(), neighbors, len(contents), [None] * len(contents))
        self.waiting += len(contents)
        for position, content in enumerate(contents):
            self._incoming.put(_Ticket(job, position, content))
        late = self._loop.call_later(seconds, self._give_up, job, seconds)
        try:
            return await job.future
        finally:
            late.cancel()
            job.given_up = True

    def _give_up(self, job: _Job, seconds: float) -> None:
        if not job.future.done():
            reason = f"the images were not decided about within {seconds:g} seconds"
            job.future.set_exception(RefusedError(503, reason, retry_after=_RETRY_AFTER))

    def _decode(self) -> None:
        """The work of a decoding thread."""
        while (ticket := self._incoming.get()) is not None:
            if not ticket.job.given_up:
                try:
                    image = decode_image(ticket.content, "image", max_pixels=self._max_pixels)
                    ticket.pixels = self._runtime.transform.pixels(image)
                except GroodError as error:
                    ticket.outcome = error
                # Whatever a file can do, it must not end the thread.
                except Exception as error:
                    log.exception("an image could not be decoded")
                    ticket.outcome = BadImageError("image", f"cannot be decoded ({type(error).__name__})")
            ticket.content = b""
            if ticket.pixels is not None:
                with self._room:
                    self._room.wait_for(lambda: self._decoded_bytes < _MAX_DECODED_BYTES)
                    self._decoded_bytes += ticket.pixels.nbytes
            self._ready.put(ticket)

    def _decide(self) -> None:
        """The work of the deciding thread."""
        assert self._loop is not None
        ended = False
        while not ended:
            tickets: list[_Ticket] = []
            ticket, pixels = self._ready.get(), 0
            while ticket is not None:
                tickets.append(ticket)
                pixels += 0 if ticket.pixels is None else ticket.pixels.size // 3
                if len(tickets) == self._batch_size or pixels >= self._batch_pixels:
                    break
                try:
                    ticket = self._ready.get_nowait()
                except Empty:
                    break
            ended = ticket is None
            n_decided, failed = self._batch(tickets)
            with self._room:
                self._decoded_bytes -= sum(one.pixels.nbytes for one in tickets if one.pixels is not None)
                self._room.notify_all()
            try:
                self._loop.call_soon_threadsafe(self._deliver, tickets, n_decided, failed)
            except RuntimeError:
                # The loop is closed: nobody waits any more.
                return

    def _batch(self, tickets: Sequence[_Ticket]) -> tuple[int, bool]:
        """Decide about a batch; how many images were in it, and whether it failed."""
        readable = [ticket for ticket in tickets if ticket.pixels is not None and not ticket.job.given_up]
        images = [ticket.pixels for ticket in readable if ticket.pixels is not None]
        try:
            for ticket, decision in zip(readable, decide_each(self._runtime, images), strict=True):
                ticket.outcome = self._scored(decision, ticket)
        # A graphics card that is lost, memory that is short: the service answers, and says so.
        except Exception:
            log.exception("a batch failed")
            return 0, True
        return len(readable), False

    def _scored(self, decision: Decision | GroodError, ticket: _Ticket) -> Outcome:
        if isinstance(decision, GroodError):
            return decision
        if not math.isfinite(decision.score):
            return GroodError("the network gives it no finite score")
        if ticket.job.neighbors <= 1 or ticket.pixels is None:
            return Scored(decision, (decision.neighbor,))
        try:
            found = self._runtime.neighbors(ticket.pixels[None], ticket.job.neighbors)
        except GroodError as error:
            return error
        return Scored(decision, tuple(found[0].tolist()))

    def _deliver(self, tickets: Sequence[_Ticket], n_decided: int, failed: bool) -> None:
        self.waiting -= len(tickets)
        self.failures += failed
        if n_decided:
            self._on_batch(n_decided)
        for ticket in tickets:
            job = ticket.job
            job.outcomes[ticket.position] = ticket.outcome
            job.failed = job.failed or (failed and ticket.pixels is not None)
            job.left -= 1
            if job.left == 0 and not job.future.done():
                self._finish(job)

    @staticmethod
    def _finish(job: _Job) -> None:
        if job.failed:
            job.future.set_exception(RefusedError(500, "the service failed; its log says why"))
        else:
            job.future.set_result([outcome for outcome in job.outcomes if outcome is not None])
