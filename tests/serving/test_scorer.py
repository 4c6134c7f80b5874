"""Batches across requests: no image is lost, none waits for another's fault, and none too many are held."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from serve_world import in_loop

from grey import REFUSED, Grey, png
from torch_grood.data import ImageTransform
from torch_grood.errors import GroodError
from torch_grood.runtime import Decisions
from torch_grood.serving import scorer as module
from torch_grood.serving.limits import RefusedError
from torch_grood.serving.scorer import Outcome, Scored, Scorer


class Gated(Grey):
    """Decides when it may; it tells when it is asked."""

    def __init__(self) -> None:
        self.asked, self.open = threading.Event(), threading.Event()
        super().__init__(self._wait)

    def _wait(self) -> None:
        self.asked.set()
        assert self.open.wait(30)


@asynccontextmanager
async def scoring(runtime: Any, **options: Any) -> AsyncIterator[Scorer]:
    scorer = Scorer(runtime, **options)
    scorer.start()
    try:
        yield scorer
    finally:
        if isinstance(runtime, Gated):
            runtime.open.set()
        await scorer.stop()
    assert not scorer.alive
    assert scorer.waiting == 0


async def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def greys(outcomes: Sequence[Outcome]) -> list[float | None]:
    return [one.decision.score if isinstance(one, Scored) else None for one in outcomes]


@in_loop
async def test_one_request_of_many_images_keeps_their_order() -> None:
    async with scoring(Grey(), batch_size=4, threads=3) as scorer:
        contents = [png(i, (1 + i % 3, 2)) for i in range(50)]
        assert greys(await scorer.score(contents)) == list(range(50))


class Meeting(Grey):
    """Whose first two calls wait for each other."""

    def __init__(self) -> None:
        calls, barrier = itertools.count(), threading.Barrier(2)
        super().__init__(lambda: None if next(calls) > 1 else (barrier.wait(30), None)[1])


@in_loop
async def test_several_batches_of_one_request_at_the_same_time() -> None:
    async with scoring(Meeting(), batch_size=1, threads=2, deciders=2) as scorer:
        outcomes = await scorer.score([png(i) if i % 7 else b"no image" for i in range(40)])
    assert greys(outcomes) == [i if i % 7 else None for i in range(40)]


def test_only_a_runtime_that_can_decides_about_several_batches() -> None:
    runtime = Grey()
    runtime.concurrent = False
    with pytest.raises(GroodError, match="one batch at a time"):
        Scorer(runtime, deciders=2)


@in_loop
async def test_requests_share_batches() -> None:
    runtime, told = Gated(), []
    async with scoring(runtime, batch_size=8, threads=2, on_batch=told.append) as scorer:
        first = asyncio.create_task(scorer.score([png(0)]))
        await until(runtime.asked.is_set)
        others = [asyncio.create_task(scorer.score([png(i)])) for i in range(1, 11)]
        await until(lambda: scorer.waiting == 11 and scorer._ready.qsize() == 10)
        runtime.open.set()
        assert [greys(await task) for task in (first, *others)] == [[i] for i in range(11)]
    assert runtime.sizes == told == [1, 8, 2]


@in_loop
async def test_a_full_queue_refuses_and_recovers() -> None:
    runtime = Gated()
    async with scoring(runtime, queue=3) as scorer:
        tasks = [asyncio.create_task(scorer.score([png(i)])) for i in range(3)]
        await until(lambda: scorer.waiting == 3)
        with pytest.raises(RefusedError, match="3 images wait") as found:
            await scorer.score([png(3)])
        assert (found.value.status, found.value.retry_after) == (503, 1)
        runtime.open.set()
        assert [greys(await task) for task in tasks] == [[0], [1], [2]]
        assert greys(await scorer.score([png(3)])) == [3]


@in_loop
async def test_one_request_may_be_larger_than_the_queue() -> None:
    async with scoring(Grey(), queue=3) as scorer:
        assert len(await scorer.score([png(i) for i in range(10)])) == 10


@in_loop
async def test_what_takes_too_long_is_given_up_and_not_decided_about() -> None:
    runtime = Gated()
    async with scoring(runtime) as scorer:
        first = asyncio.create_task(scorer.score([png(0)]))
        await until(runtime.asked.is_set)
        with pytest.raises(RefusedError, match=r"within 0\.01 seconds") as found:
            await scorer.score([png(1), png(2)], seconds=0.01)
        assert (found.value.status, found.value.retry_after) == (503, 1)
        runtime.open.set()
        assert greys(await first) == [0]
        assert greys(await scorer.score([png(3)])) == [3]
    assert runtime.sizes == [1, 1]


@in_loop
async def test_who_waits_may_go() -> None:
    runtime = Gated()
    async with scoring(runtime) as scorer:
        first = asyncio.create_task(scorer.score([png(0)]))
        await until(runtime.asked.is_set)
        second = asyncio.create_task(scorer.score([png(1)]))
        await until(lambda: scorer.waiting == 2)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        runtime.open.set()
        assert greys(await first) == [0]
    assert runtime.sizes == [1]


@in_loop
async def test_a_bad_image_takes_no_other_with_it() -> None:
    async with scoring(Grey(), max_pixels=100) as scorer:
        contents = [png(1), b"no image", png(REFUSED), png(2, (11, 10)), b"", png(3)]
        found = await scorer.score(contents)
        assert greys(found) == [1, None, None, None, None, 3]
        errors = [str(one) for one in found if isinstance(one, GroodError)]
        for error, reason in zip(
            errors, ("not an image", "no finite score", "limit of 100", "file is empty"), strict=True
        ):
            assert reason in error


@in_loop
async def test_a_runtime_that_fails_ends_its_batch_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    failures = [RuntimeError("the card is lost")]

    def fail() -> None:
        if failures:
            raise failures.pop()

    async with scoring(Grey(fail)) as scorer:
        with pytest.raises(RefusedError, match="its log says why") as found:
            await scorer.score([png(1)])
        assert found.value.status == 500
        assert scorer.failures == 1
        assert scorer.alive
        assert greys(await scorer.score([png(1)])) == [1]
    assert "the card is lost" in caplog.text


@in_loop
async def test_a_decoder_that_fails_ends_one_image(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode = module.decode_image

    def failing(content: bytes, name: str, *, max_pixels: int) -> Any:
        if content == b"!":
            raise RuntimeError
        return decode(content, name, max_pixels=max_pixels)

    monkeypatch.setattr(module, "decode_image", failing)
    async with scoring(Grey()) as scorer:
        assert greys(await scorer.score([b"!", png(1)])) == [None, 1]
        assert scorer.alive
    assert "an image could not be decoded" in caplog.text


class Infinite(Grey):
    def decide(self, pixels: NDArray[np.uint8]) -> Decisions:
        found = super().decide(pixels)
        return found._replace(score=np.where(found.score == 7, np.inf, found.score))


@in_loop
async def test_an_infinite_score_is_none() -> None:
    async with scoring(Infinite()) as scorer:
        found = await scorer.score([png(6), png(7)])
        assert greys(found) == [6, None]
        assert str(found[1]) == "the network gives it no finite score"


class Lonely(Grey):
    def neighbors(self, pixels: NDArray[np.uint8], k: int) -> NDArray[np.int64]:
        if pixels.mean() == 7:
            raise GroodError("it has no neighbours")
        return super().neighbors(pixels, k)


@in_loop
async def test_neighbors_are_asked_for_where_they_are_wanted() -> None:
    async with scoring(Lonely()) as scorer:
        found = await scorer.score([png(6), png(7)], neighbors=3)
        assert isinstance(found[0], Scored)
        assert found[0].neighbors == (0, 1, 2)
        assert str(found[1]) == "it has no neighbours"
        assert greys(await scorer.score([png(7)])) == [7]


@in_loop
async def test_decoded_images_that_wait_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small their files."""
    monkeypatch.setattr(module, "_MAX_DECODED_BYTES", 100)
    runtime, size = Gated(), 4 * 4 * 3
    async with scoring(runtime, threads=2) as scorer:
        task = asyncio.create_task(scorer.score([png(i) for i in range(20)]))
        await until(lambda: runtime.asked.is_set() and scorer._decoded_bytes >= 100)
        for _ in range(20):
            assert scorer._decoded_bytes <= 100 + size
            await asyncio.sleep(0.005)
        runtime.open.set()
        assert greys(await task) == list(range(20))
        assert scorer._decoded_bytes == 0


@in_loop
async def test_a_batch_of_large_images_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where preprocessing leaves their size."""
    monkeypatch.setattr(module, "_MAX_UNCROPPED", 50)
    runtime = Gated()
    async with scoring(runtime, threads=2) as scorer:
        task = asyncio.create_task(scorer.score([png(i) for i in range(20)]))
        await until(lambda: runtime.asked.is_set() and scorer._incoming.qsize() == 0)
        runtime.open.set()
        assert greys(await task) == list(range(20))
        assert max(runtime.sizes) <= 4
        found = await scorer.score([png(1, (8, 8))])
        assert "limit of 50" in str(found[0])


@in_loop
async def test_a_fixed_size_allows_large_images() -> None:
    runtime = Grey()
    runtime.transform = ImageTransform(4, 4, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    async with scoring(runtime) as scorer:
        assert greys(await scorer.score([png(9, (3000, 2000))])) == [9]


@in_loop
async def test_it_ends_when_all_is_done() -> None:
    runtime = Gated()
    scorer = Scorer(runtime, threads=2)
    scorer.start()
    tasks = [asyncio.create_task(scorer.score([png(i)])) for i in range(5)]
    await until(lambda: scorer.waiting == 5)
    stopping = asyncio.create_task(scorer.stop())
    await asyncio.sleep(0.01)
    assert not stopping.done()
    runtime.open.set()
    assert [greys(found) for found in await asyncio.gather(*tasks)] == [[i] for i in range(5)]
    await stopping
