"""Who may ask, before anything is read; and what is noted of every request, whatever comes of it."""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from torch_grood.serving.asgi import App, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from torch_grood.serving.metrics import Metrics
    from torch_grood.serving.settings import Settings

__all__ = ["Guard", "error_body"]

log = logging.getLogger("torch_grood.serving")
access = logging.getLogger("torch_grood.serving.access")

# As nginx says it.
_CANCELLED = 499
_CROWDED = (503, "there are too many connections; try again later")

# Open to all that may connect: they say nothing of the images or the detector.
_OPEN = frozenset({"/healthz", "/readyz", "/", "/page.css", "/page.js", "/docs", "/openapi.json"})
_OPEN_BELOW = "/static-offline-docs/"
_ROUTES = frozenset({"/v1/score", "/v1/info", "/v1/drift", "/metrics"}) | _OPEN
_TRAINING = "/v1/training/"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_BEARER = b"bearer "

_OWN = b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'"
# Swagger's page starts by a script in the page, and styles its elements one by one.
_SWAGGER = (
    b"default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    b"img-src 'self' data:; connect-src 'self'"
)
_NEVER_FRAMED = b"; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]


def error_body(reason: str) -> bytes:
    """What an error says, as JSON."""
    return json.dumps({"error": reason}).encode()


class Guard:
    """ASGI middleware; outermost.

    Args:
        app: behind it.
        settings: of the service.
        metrics: count.
    """

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._token = None if settings.token is None else settings.token.encode()
        self._hosts = _hosts(settings)
        self._logs = settings.log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        path: str = scope["path"]
        scope.setdefault("state", {})
        status = 0

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                policy = _SWAGGER if path == "/docs" else _OWN
                message["headers"] = [
                    *message["headers"],
                    *_HEADERS,
                    (b"content-security-policy", policy + _NEVER_FRAMED),
                ]
            await send(message)

        try:
            refused = _CROWDED if "crowded" in scope["state"] else self._refusal(scope["headers"], path)
            if refused is None:
                await self._app(scope, receive, sent)
            else:
                await _refuse(sent, *refused)
        except Exception:
            # Of nothing that is known; and the next request has nothing to do with it.
            log.exception("a request failed")
            if status:
                raise
            await _refuse(sent, 500, "the service failed; its log says why")
        finally:
            self._note(scope, path, status, time.perf_counter() - began)

    def _refusal(self, headers: Iterable[tuple[bytes, bytes]], path: str) -> tuple[int, str] | None:
        """Status and reason, for a request that must not be answered."""
        host = origin = authorization = None
        for name, value in headers:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"authorization":
                authorization = value
        if self._hosts is not None and (host is None or _name_of(host) not in self._hosts):
            return 400, "this service is not known by that name; start it with --allow-host NAME"
        if origin is not None and host is not None and _foreign(origin, host):
            return 403, "requests from other web pages are refused"
        if self._token is None or path in _OPEN or path.startswith(_OPEN_BELOW):
            return None
        given = authorization or b""
        if given[: len(_BEARER)].lower() != _BEARER or not hmac.compare_digest(given[len(_BEARER) :], self._token):
            return 401, "this service needs its token: Authorization: Bearer TOKEN"
        return None

    def _note(self, scope: Scope, path: str, status: int, seconds: float) -> None:
        route = path if path in _ROUTES else _TRAINING + "*" if path.startswith(_TRAINING) else "other"
        # One that ended without an answer was ended with the service.
        status = status or _CANCELLED
        self._metrics.count_request(route, status, seconds)
        if self._logs:
            fields = {
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(seconds, 6),
                **scope["state"].get("noted", {}),
            }
            access.info("request", extra={"fields": fields})


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = error_body(reason)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        # What there is of its body is not read.
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _hosts(settings: Settings) -> frozenset[str] | None:
    """By which names the service may be asked; None: by any."""
    if "*" in settings.allowed_hosts:
        return None
    # Whoever listens to a whole network is asked by names that only its operator knows.
    if settings.host in ("0.0.0.0", "::") and not settings.allowed_hosts:
        return None
    return _LOOPBACK | {settings.host.lower()} | {name.lower() for name in settings.allowed_hosts}


def _name_of(host: bytes) -> str:
    """Without the port."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


def _foreign(origin: bytes, host: bytes) -> bool:
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower() != host.decode("latin-1").lower()
    except ValueError:
        return True
