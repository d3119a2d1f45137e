"""fal's synchronous call: one request, whose answer the connection waits for."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .caller import Caller
from .fal_answer import fal_call, fal_fields
from .fal_routes import ANSWERED, Name, Owner, check_model
from .openapi import ERRORS, json_body
from .refusal import bad_request
from .request_body import json_object
from .service import Service

_QUEUE_ALONE = "X-Fal-Request-Timeout"


def fal_run_router(service: Service) -> APIRouter:
    """The route.

    Args:
        service: runs requests.
    """
    router = APIRouter(prefix="/run", tags=["fal"], responses=ERRORS)

    @router.post("/{owner}/{name}", openapi_extra=json_body("FalRequest"), response_class=Response, responses=ANSWERED)
    async def run(request: Request, owner: Owner, name: Name, key: Caller) -> Response:
        """Make images and answer with them. Nothing of it is kept, and a client that goes away cancels it."""
        check_model(service, owner, name)
        if _QUEUE_ALONE in request.headers:
            raise bad_request(f"{_QUEUE_ALONE} is for the queue; here the server's deadline counts", fields=[_QUEUE_ALONE])
        service.limits.admit(key)
        return await service.answer(request, key, fal_call(fal_fields(await json_object(request)), service.request_type))

    return router
