"""The service in this process: its ASGI application, with nothing between it and a client."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from torch_grood.runtime import Runtime
from torch_grood.serving import Settings, make_app

PNG = {"Content-Type": "image/png"}


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """An async test, as one that pytest can run."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 60))  # type: ignore[arg-type]

    return run


@asynccontextmanager
async def served(
    runtime: Runtime, settings: Settings | None = None, **headers: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that has started, and ends with it."""
    app = make_app(runtime, settings or Settings())
    coming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    life = asyncio.create_task(app({"type": "lifespan", "state": {}}, coming.get, said.put))  # type: ignore[arg-type]
    await coming.put({"type": "lifespan.startup"})
    assert (await said.get())["type"] == "lifespan.startup.complete"
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            yield client
    finally:
        await coming.put({"type": "lifespan.shutdown"})
        await life
