"""The service on uvicorn: what listens, what it says on stderr, and how it ends."""

from __future__ import annotations

import json
import logging
import math
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from torch_grood._text import plain
from torch_grood.errors import GroodError
from torch_grood.serving.app import make_app

if TYPE_CHECKING:
    from asyncio import TimerHandle, Transport

    from torch_grood.runtime import Runtime
    from torch_grood.serving.settings import Settings

__all__ = ["run"]

# Of a request: its first line and all that comes before its body.
_MAX_HEAD = 32 * 2**10
_HEAD_SECONDS = 10.0
# Until a client reads on.
_READ_SECONDS = 20.0
_KEEP_ALIVE_SECONDS = 30
_BACKLOG = 2048


def run(runtime: Runtime, settings: Settings, *, ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve until SIGTERM or Ctrl-C, which let the requests under way come to their end.

    Args:
        runtime: decides.
        settings: of the service.
        ready: is told the URL as soon as connections are taken.

    Raises:
        GroodError: if the address cannot be listened at, or the settings do not go with the detector.
    """
    app = make_app(runtime, settings)
    listening = _listen(settings.host, settings.port)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{listening.getsockname()[1]}/"
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.limits.connections,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.limits.seconds) + 1,
        proxy_headers=False,
    )
    server = uvicorn.Server(config)
    with _logging(), listening, _ended_by_signals(server):
        _log.info("listening", extra={"fields": {"url": url}})
        ready(url)
        server.run(sockets=[listening])
        _log.info("stopped")


_log = logging.getLogger("torch_grood.serving")


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with an end to clients that send heads slowly or without end, or do not read; bodies have their own.

    A connection is aborted where uvicorn would close it: closing waits for what the client has not read.
    """

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # The guard answers instead: it says when to try again.
        self.limit_concurrency = None
        self._cycles: list[RequestResponseCycle] = []
        self._head_bytes = 0
        self._timer: TimerHandle | None = None
        self._unread: TimerHandle | None = None
        self._expect(_HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        self._read()
        # uvicorn tells the last one only. An earlier one, which is answered before it, would write where nothing is.
        for cycle in self._cycles:
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # What comes between two requests may be anything, and stops the time that uvicorn lets a connection idle.
        if self.cycle is None or self.cycle.response_complete:
            self._expect(_HEAD_SECONDS)
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._arrived()
        most = self.config.limit_concurrency
        if most is not None and len(self.connections) > most:
            self.scope["state"]["crowded"] = True
        super().on_headers_complete()
        self._cycles = [*(cycle for cycle in self._cycles if not cycle.response_complete), self.cycle]

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._expect(_READ_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read()
        self._unread = self.loop.call_later(_READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._read()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()

    def _count(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > _MAX_HEAD:
            # The parser ends the connection with 400.
            raise ValueError("the head of the request is too long")

    def _expect(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _arrived(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise GroodError(f"cannot listen at {host}:{port}: {reason}; choose another --host or --port") from None


@contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """From the first word on: uvicorn listens to signals later, and raises what ended it once more when all is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _logging() -> Iterator[None]:
    """While it lasts, all that is logged or warned of is lines of JSON on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    levels = dict.fromkeys(("uvicorn", "asyncio", "py.warnings"), logging.WARNING)
    # What is odd about an image is told to its sender.
    levels |= {"torch_grood.serving": logging.INFO, "PIL": logging.CRITICAL}
    loggers = {logging.getLogger(name): level for name, level in levels.items()}
    before = {one: (one.level, one.propagate) for one in loggers}
    for one, level in loggers.items():
        one.addHandler(handler)
        one.setLevel(level)
        one.propagate = False
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        logging.captureWarnings(False)
        for one, (level, propagate) in before.items():
            one.removeHandler(handler)
            one.setLevel(level)
            one.propagate = propagate


class _Formatter(logging.Formatter):
    """A record as one JSON object, whose fields are numbers and words of ours, never what a client has sent."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": plain(record.getMessage()),
        }
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)
