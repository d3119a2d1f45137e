"""The routes of fal's queue: submit, follow, fetch, cancel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from .caller import Caller
from .event_stream import MEDIA_TYPE, EventResponse, with_beats
from .fal_answer import FalCancellation, FalStatus, FalTicket, fal_call, fal_fields, status_of, ticket
from .openapi import ERRORS, KEY_REUSED, answers, json_body
from .queue_records import QueuedRequest, is_identifier, new_id
from .queue_runner import QueueRunner
from .queue_submission import IdempotencyKey, check_single, submission_of, submitted_once
from .queue_waiting import QueueView
from .refusal import Refusal, bad_request
from .request_body import json_object
from .service import Service
from .wire_request import engine_request

_FOLLOW_EVERY_S = 0.5
_PRIORITIES = {"normal": 0, "low": -1}
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"description": "Events.", "content": {MEDIA_TYPE: {}}}}
ANSWERED = answers(s200=("GenerationResponse", "The images."))
Owner = Annotated[str, Path(max_length=64, description="First part of the model's name.")]
Name = Annotated[str, Path(max_length=64, description="Second part of the model's name.")]
Identifier = Annotated[str, Path(max_length=64, json_schema_extra={"format": "uuid"})]
_ACCEPTED: dict[int | str, dict[str, Any]] = {202: {"model": FalStatus, "description": "It is not completed yet."}}


def fal_router(service: Service, runner: QueueRunner) -> APIRouter:
    """The routes.

    Args:
        service: checks requests.
        runner: takes them.
    """
    router = APIRouter(prefix="/queue", tags=["fal"], responses=ERRORS)
    _add_submission(router, service, runner)
    _add_following(router, service, runner)
    _add_answers(router, service, runner)
    return router


def _add_submission(router: APIRouter, service: Service, runner: QueueRunner) -> None:
    @router.post("/{owner}/{name}", openapi_extra=json_body("FalRequest"), response_model=FalTicket, responses=KEY_REUSED)
    async def submit(request: Request, owner: Owner, name: Name, key: Caller, again: IdempotencyKey = None) -> Response:
        """Accept a request. When this answers, it is kept: it outlives the server's end."""
        model = check_model(service, owner, name)
        check_single(request)
        if "fal_webhook" in request.query_params:
            raise bad_request("fal_webhook is not supported: nothing is sent to other servers; follow status_url instead")
        service.limits.admit(key)
        fields = fal_fields(await json_object(request))
        call = fal_call(fields, service.request_type)
        service.note(request, key, call)
        wanted = engine_request(call.request, service.config).with_seed()
        submission = None if again is None else await asyncio.to_thread(submission_of, again, key.name, model, fields)
        queued = QueuedRequest(
            id=new_id(),
            model=model,
            fields={**fields, "seed": wanted.seed},
            key=key.name,
            base_url=service.base_url(request),
            priority=_priority(request),
            start_by=_start_by(request),
            submission=submission,
        )
        identifier, position = await submitted_once(runner, queued)
        return _json(ticket(queued.base_url, model, identifier, position), 200)


def _add_following(router: APIRouter, service: Service, runner: QueueRunner) -> None:
    @router.get("/{owner}/{name}/requests/{identifier}/status", response_model=FalStatus, responses=_ACCEPTED)
    async def status(request: Request, owner: Owner, name: Name, identifier: Identifier, key: Caller) -> Response:
        """Where a request stands: IN_QUEUE, IN_PROGRESS or COMPLETED; 202 until it is completed."""
        view = await _view(runner, check_model(service, owner, name), identifier, key.name)
        told = status_of(service.base_url(request), view.state, identifier, view.position)
        return _json(told, 200 if told.status == "COMPLETED" else 202)

    @router.get("/{owner}/{name}/requests/{identifier}/status/stream", response_class=Response, responses=_EVENTS)
    async def follow(request: Request, owner: Owner, name: Name, identifier: Identifier, key: Caller) -> Response:
        """The same, as server-sent events: one for each change, until it is completed."""
        model = check_model(service, owner, name)
        view = await _view(runner, model, identifier, key.name)
        base_url = service.base_url(request)

        async def changes() -> AsyncGenerator[bytes, None]:
            last, now = b"", view
            while True:
                told = status_of(base_url, now.state, identifier, now.position)
                event = f"data: {told.model_dump_json()}\n\n".encode()
                if event != last:
                    yield event
                last = event
                if told.status == "COMPLETED" or service.state.drained:  # Then no more is told here.
                    return
                await asyncio.sleep(_FOLLOW_EVERY_S)
                now = await _view(runner, model, identifier, key.name)

        return EventResponse(with_beats(changes()))


def _add_answers(router: APIRouter, service: Service, runner: QueueRunner) -> None:
    @router.get("/{owner}/{name}/requests/{identifier}", response_class=Response, responses=ANSWERED)
    async def result(request: Request, owner: Owner, name: Name, identifier: Identifier, key: Caller) -> Response:
        """The answer to a completed request, with the status that it ended with."""
        view = await _view(runner, check_model(service, owner, name), identifier, key.name)
        if view.state.status != "COMPLETED":
            raise Refusal(400, "The request is not completed yet.", errors=[f"it is {view.state.status}"])
        body = await runner.answer(identifier)
        if body is None:
            raise _unknown()
        return Response(body, view.state.status_code or 200, media_type="application/json")

    @router.put("/{owner}/{name}/requests/{identifier}/cancel", status_code=202, response_model=FalCancellation)
    async def cancel(request: Request, owner: Owner, name: Name, identifier: Identifier, key: Caller) -> Response:
        """Cancel a request that is not completed; one that runs ends at its next step."""
        model = check_model(service, owner, name)
        found = await runner.cancel(identifier, key.name, model) if is_identifier(identifier) else None
        if found is None:
            raise _unknown()
        if found == "completed":
            raise Refusal(400, "ALREADY_COMPLETED", errors=["the request is completed; its answer can be fetched"])
        return _json(FalCancellation(status="CANCELLATION_REQUESTED"), 202)


async def _view(runner: QueueRunner, model: str, identifier: str, key: str) -> QueueView:
    view = await runner.view(identifier, key, model) if is_identifier(identifier) else None
    if view is None:
        raise _unknown()
    return view


def check_model(service: Service, owner: str, name: str) -> str:
    """The model that a path names.

    Raises:
        Refusal: 404, there is none of that name.
    """
    model = f"{owner}/{name}"
    if model not in service.settings.queue_models:
        known = ", ".join(service.settings.queue_models)
        raise Refusal(404, "There is no such model.", errors=[f"expected one of {known}"], fields=["model"])
    return model


def _priority(request: Request) -> int:
    text = request.headers.get("x-fal-queue-priority", "normal")
    if text not in _PRIORITIES:
        raise bad_request(f"X-Fal-Queue-Priority must be normal or low, got {text[:40]!r}", fields=["X-Fal-Queue-Priority"])
    return _PRIORITIES[text]


def _start_by(request: Request) -> float | None:
    text = request.headers.get("x-fal-request-timeout")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 1e6:
        raise bad_request(
            f"X-Fal-Request-Timeout must be seconds from 0 to 1000000, got {text[:40]!r}", fields=["X-Fal-Request-Timeout"]
        )
    return time.time() + seconds


def _unknown() -> Refusal:
    return Refusal(404, "There is no such request.", errors=["it never was, it belongs to another key, or it has expired"])


def _json(body: FalTicket | FalStatus | FalCancellation, status: int) -> Response:
    return Response(
        body.model_dump_json(exclude_none=isinstance(body, FalTicket)).encode(), status, media_type="application/json"
    )
