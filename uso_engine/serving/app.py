"""The application: routes, layers around them, and what runs beside them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from uso_engine.config import EngineConfig

from .auth import KeyRing
from .body_limit import BodyLimit
from .engine_state import EngineState, OpenEngine
from .fal_routes import fal_router
from .fal_run import fal_run_router
from .files import ImageFiles
from .host_check import HostCheck
from .image_routes import image_router
from .leases import Leases, server_name
from .metrics import Metrics
from .openapi import openapi_document
from .page_routes import page_router
from .plain_routes import plain_router
from .queue_records import QueueRecords
from .queue_runner import QueueRunner
from .queue_upkeep import QueueUpkeep
from .refusal import Refusal, bad_request
from .request_limit import RequestLimit
from .request_log import RefusalAnswers, RequestLog
from .request_record import record_of
from .service import Service
from .settings import ServerSettings
from .storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Application:
    """A server's application and what its process steers.

    Args:
        asgi: what answers.
        state: the engine.
        runner: fal's queue.
        document: its OpenAPI document.
    """

    asgi: ASGIApp
    state: EngineState
    runner: QueueRunner
    document: Callable[[], dict[str, Any]]


def make_application(
    config: EngineConfig,
    settings: ServerSettings,
    open_engine: OpenEngine,
    storage: Storage,
    keys: KeyRing | None = None,
    *,
    gpu_memory: Callable[[], dict[str, int]] = dict,
    host_name: str = "server",
) -> Application:
    """Put a server together.

    Args:
        config: of the engine.
        settings: of the server.
        open_engine: loads the engine, beside the running server.
        storage: of images and the queue.
        keys: who may ask; None lets everybody in.
        gpu_memory: bytes of GPU memory, by kind.
        host_name: of this machine; what the server calls itself in the storage begins with it and the port.

    Raises:
        ConfigError: settings that do not fit the configuration or the storage.
    """
    state = EngineState(open_engine)
    files = ImageFiles(storage, settings.expiry_s, signed_urls=settings.signed_urls)
    metrics = Metrics(state, lambda: limited.held_bytes, lambda: runner.waiting, gpu_memory)
    service = Service(config, settings, state, files, metrics)
    records, leases = QueueRecords(storage), Leases(storage, server_name(host_name, settings.port), settings.lease_s)
    runner = QueueRunner(service, records, leases.owner)
    upkeep = QueueUpkeep(runner, records, files, leases, expiry_s=settings.expiry_s)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.callback(service.close)
            await stack.enter_async_context(state.running())
            # Its lease is left last: what the runner is delivering then would be computed again elsewhere.
            await stack.enter_async_context(upkeep.running())
            await stack.enter_async_context(runner.running())
            try:
                yield
            except asyncio.CancelledError:
                logger.info("ended without waiting")  # By a second signal. What was entered is left all the same.

    app = _routed(service, runner, keys, lifespan)
    inner: ASGIApp = app
    if settings.cors_origins:
        inner = CORSMiddleware(
            inner,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )
    limited = BodyLimit(HostCheck(inner, settings), settings.transport)
    bounded = RequestLimit(limited, settings.transport.max_connections)
    return Application(RequestLog(bounded, metrics.observe_request), state, runner, app.openapi)


def _routed(
    service: Service,
    runner: QueueRunner,
    keys: KeyRing | None,
    lifespan: Callable[[FastAPI], object],
) -> FastAPI:
    # No pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(
        title="uso-engine",
        lifespan=lifespan,  # type: ignore[arg-type]
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.keys = keys
    app.include_router(image_router(service))
    app.include_router(fal_router(service, runner))
    app.include_router(fal_run_router(service))
    app.include_router(plain_router(service))
    if service.settings.page:
        app.include_router(page_router())
    document: list[dict[str, Any]] = []

    def openapi() -> dict[str, Any]:
        if not document:
            document.append(openapi_document(app, service.request_type, service.settings))
        return document[0]

    app.openapi = openapi  # type: ignore[method-assign]
    app.add_middleware(RefusalAnswers)
    app.add_exception_handler(HTTPException, _http_refused)
    app.add_exception_handler(RequestValidationError, _parameter_refused)
    return app


def _answer(request: Request, refusal: Refusal) -> Response:
    body = refusal.body(request.url.path, record_of(request.scope).request_id)
    return Response(body, refusal.status, headers=refusal.headers, media_type="application/json")


async def _http_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "There is nothing at this path.", 405: "The path does not take this method."}
    refusal = Refusal(error.status_code, words.get(error.status_code, str(error.detail)), headers=error.headers)
    return _answer(request, refusal)


async def _parameter_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    fields = [str(item["loc"][-1]) for item in found]
    refusal = bad_request(*(f"{field}: {item['msg']}" for field, item in zip(fields, found, strict=True)), fields=fields)
    return _answer(request, refusal)
