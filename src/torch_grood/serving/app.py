"""The routes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi_offline import FastAPIOffline
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException

from torch_grood._text import encodable, plain
from torch_grood.data.images import BadImageError, load_image
from torch_grood.data.training_files import training_file
from torch_grood.errors import GroodError
from torch_grood.serving.asgi import App, Receive, Scope, Send
from torch_grood.serving.bodies import Held, Upload, images_of, read_body
from torch_grood.serving.drift import DriftMonitor
from torch_grood.serving.guard import Guard, error_body
from torch_grood.serving.limits import Limits, RefusedError
from torch_grood.serving.metrics import CONTENT_TYPE, Metrics
from torch_grood.serving.schema import DRIFT, INFO, READY, SCORE, TRAINING
from torch_grood.serving.scorer import Outcome, Scored, Scorer
from torch_grood.serving.settings import Settings

if TYPE_CHECKING:
    from torch_grood.runtime import Runtime

__all__ = ["make_app"]

_PAGE = Path(__file__).parent / "page"
_PAGE_TYPES = {"index.html": "text/html; charset=utf-8", "page.css": "text/css", "page.js": "text/javascript"}
_MOST_NEIGHBORS = 20
_THUMBNAIL = 160
_LONGEST_ERROR = 500
_JSON = "application/json"
_SCORE_PATH = "/v1/score"


class _Service:
    """What the routes share."""

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self.runtime, self.settings = runtime, settings
        self.drift: DriftMonitor | None = None
        self.no_drift = "the detector promises no false-alarm rate; calibrate it"
        if runtime.fpr is not None and runtime.n_calibration is not None:
            sizes = runtime.class_sizes or runtime.n_calibration
            self.drift = DriftMonitor(runtime.fpr, sizes, settings.drift_window, settings.drift_level)
        self.metrics = Metrics(runtime.log_tau, self.drift, lambda: self.scorer.waiting)
        self.held = Held(settings.limits.held_bytes)
        self.scorer = Scorer(
            runtime,
            batch_size=settings.batch_size,
            queue=settings.limits.queue,
            max_pixels=settings.limits.pixels,
            threads=settings.threads,
            deciders=settings.deciders,
            on_batch=self.metrics.count_batch,
        )
        root = settings.training_root
        # The names are a file's, and the files are few kinds: what was looked at lately is asked for again.
        self.thumbnail = lru_cache(maxsize=512)(lambda sample: _thumbnail(runtime, sample, root))

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.scorer.start()
        try:
            yield
        finally:
            await self.scorer.stop()

    def rows(self, uploads: list[Upload], outcomes: list[Outcome]) -> list[dict[str, Any]]:
        """The answer about each image, counted."""
        return [self._row(upload.name, outcome) for upload, outcome in zip(uploads, outcomes, strict=True)]

    def _row(self, name: str | None, outcome: Outcome) -> dict[str, Any]:
        if isinstance(outcome, GroodError):
            self.metrics.count_unreadable()
            reason = outcome.reason if isinstance(outcome, BadImageError) else str(outcome)
            nothing = dict.fromkeys(("label", "prototype_label", "score", "p_value", "is_ood", "neighbors"))
            return {"name": name, **nothing, "error": plain(reason)[:_LONGEST_ERROR]}
        decision = outcome.decision
        self.metrics.count_scored(decision)
        if self.drift is not None and decision.is_ood is not None:
            self.drift.add(decision.prototype_label, decision.is_ood)
        classes = self.runtime.classes
        return {
            "name": name,
            "label": classes[decision.label],
            "prototype_label": classes[decision.prototype_label],
            "score": decision.score,
            "p_value": decision.p_value,
            "is_ood": decision.is_ood,
            "neighbors": [self._neighbor(sample) for sample in outcome.neighbors],
            "error": None,
        }

    def _neighbor(self, sample: int) -> dict[str, Any]:
        # The names of training images are told only by an operator who shows them, and not where they were.
        name = None if self.settings.training_root is None else self.runtime.sample_name(sample)
        if name is None:
            return {"sample": sample, "name": None, "image": None}
        shown = encodable(plain("/".join(PurePath(name).parts[-2:])))
        return {"sample": sample, "name": shown, "image": f"/v1/training/{sample}"}


def make_app(runtime: Runtime, settings: Settings) -> App:
    """The service as an ASGI application.

    Args:
        runtime: decides; only the service may use it from now on.
        settings: of the service.

    Raises:
        GroodError: if the windows for drift cannot keep their level.
    """
    service = _Service(runtime, settings)
    app = FastAPIOffline(
        redoc_url=None,
        redirect_slashes=False,
        title="torch-grood",
        description="Which images a classifier was not trained for. `POST` images to `/v1/score`.",
        version=_version(),
        lifespan=service.lifespan,
    )
    _describe_scoring(app)
    _add_facts(app, service)
    _add_state(app, service)
    _add_page(app)

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return _refused(error)

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> Response:
        return Response(error_body(str(error.detail)), error.status_code, error.headers, _JSON)

    return Guard(_Score(service, app), settings, service.metrics)


class _Score:
    """`POST /v1/score`, as an ASGI application: a route of FastAPI's takes longer than all of this.

    Args:
        service: what is shared.
        others: takes the requests that are none.
    """

    def __init__(self, service: _Service, others: App) -> None:
        self._service, self._others = service, others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != _SCORE_PATH:
            # uvicorn leaves the body of an answer to HEAD out.
            await self._others({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)
            return
        try:
            response = await self._answer(scope, receive)
        except RefusedError as error:
            response = _refused(error)
        await response(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive) -> Response:
        if scope["method"] != "POST":
            return Response(error_body("images are sent by POST"), 405, {"Allow": "POST"}, _JSON)
        service = self._service
        limits, held = service.settings.limits, service.held
        headers = Headers(scope=scope)
        neighbors = _neighbors(scope["query_string"])
        body = await read_body(receive, headers.get("content-length"), limits, held)
        try:
            uploads = images_of(headers.get("content-type", ""), body, limits)
            # For the guard's log.
            scope["state"]["noted"] = {"images": len(uploads), "bytes": len(body)}
            outcomes = await service.scorer.score([upload.content for upload in uploads], neighbors, limits.seconds)
        finally:
            held.now -= len(body)
        rows = service.rows(uploads, outcomes)
        status = 200 if any(isinstance(outcome, Scored) for outcome in outcomes) else 422
        return Response(json.dumps({"results": rows}, allow_nan=False).encode(), status, media_type=_JSON)


def _describe_scoring(app: FastAPI) -> None:
    """Add what FastAPI does not route to what it says of its routes."""
    made = app.openapi

    def with_scoring() -> dict[str, Any]:
        schema = made()
        schema["paths"] = {_SCORE_PATH: {"post": SCORE}} | schema["paths"]
        return schema

    app.openapi = with_scoring  # type: ignore[method-assign]


def _refused(error: RefusedError) -> Response:
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.close:
        headers["Connection"] = "close"
    return Response(error_body(error.reason), error.status, headers, _JSON)


def _neighbors(query: bytes) -> int:
    if not query:
        return 1
    text = QueryParams(query).get("neighbors", "1")
    if not text.isdecimal() or len(text) > 3 or not 1 <= int(text) <= _MOST_NEIGHBORS:
        raise RefusedError(422, f"neighbors is a number from 1 to {_MOST_NEIGHBORS}")
    return int(text)


def _add_facts(app: FastAPI, service: _Service) -> None:
    facts = _info(service.runtime, service.settings)

    @app.get("/v1/info", openapi_extra=INFO, summary="The detector, its rule and the limits", tags=["detector"])
    async def info() -> Response:
        return _json(facts)

    @app.get("/v1/drift", openapi_extra=DRIFT, summary="Whether late images are like known ones", tags=["detector"])
    async def drift() -> Response:
        if service.drift is None:
            raise RefusedError(404, service.no_drift)
        return _json(service.drift.described())

    @app.get("/v1/training/{sample}", openapi_extra=TRAINING, summary="A training image, small", tags=["images"])
    async def training(request: Request) -> Response:
        # As FastAPI's own parameter it would have an error of its own form.
        sample: str = request.path_params["sample"]
        if service.settings.training_root is None or not sample.isdecimal() or len(sample) > 12:
            raise RefusedError(404, "there is no such training image here")
        picture = await asyncio.to_thread(service.thumbnail, int(sample))
        if picture is None:
            raise RefusedError(404, "there is no such training image here")
        return Response(picture, media_type="image/webp")


def _add_state(app: FastAPI, service: _Service) -> None:
    @app.get("/healthz", summary="Whether the process lives", tags=["state"])
    async def healthz() -> Response:
        return _json({"status": "ok"})

    @app.get("/readyz", openapi_extra=READY, summary="Whether it takes images", tags=["state"])
    async def readyz() -> Response:
        if not service.scorer.alive:
            raise RefusedError(503, "not ready", retry_after=1)
        return _json({"status": "ready", "waiting": service.scorer.waiting})

    @app.get("/metrics", summary="For Prometheus", tags=["state"])
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    def add(path: str, name: str) -> None:
        content, kind = (_PAGE / name).read_bytes(), _PAGE_TYPES[name]

        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=kind)

    add("/", "index.html")
    add("/page.css", "page.css")
    add("/page.js", "page.js")


def _info(runtime: Runtime, settings: Settings) -> dict[str, Any]:
    limits: Limits = settings.limits
    return {
        "version": _version(),
        "classes": runtime.classes,
        "transform": runtime.transform.to_dict(),
        "fpr": runtime.fpr,
        "calibration_images": runtime.n_calibration,
        "per_class": runtime.class_sizes is not None,
        "shows_training_images": settings.training_root is not None,
        "limits": {
            "request_bytes": limits.request_bytes,
            "images": limits.images,
            "pixels": limits.pixels,
            "seconds": limits.seconds,
        },
        # Its metadata are whatever fitted it noted, such as where its files were.
        "detector": {name: fact for name, fact in settings.facts.items() if name != "metadata"},
    }


def _thumbnail(runtime: Runtime, sample: int, root: Path | None) -> bytes | None:
    """A training image, no larger than the page shows it; None if it is not there, or is no image."""
    with contextlib.suppress(GroodError):
        file = training_file(runtime.sample_name(sample), root) if root is not None else None
        if file is None:
            return None
        image = load_image(str(file))
        # A small one is enlarged by whole pixels, which browsers would blur.
        factor = max(1, _THUMBNAIL // max(image.size))
        image = image.resize((image.width * factor, image.height * factor), 0) if factor > 1 else image
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        content = io.BytesIO()
        image.save(content, "WEBP", quality=85)
        return content.getvalue()
    return None


def _json(content: Any) -> Response:
    return Response(json.dumps(content, allow_nan=False).encode(), media_type=_JSON)


def _version() -> str:
    from importlib.metadata import version

    return version("torch-grood")
