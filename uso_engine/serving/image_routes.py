"""The routes that make images: generations (the hosted API's words or OpenAI's) and edits (OpenAI's form)."""

from __future__ import annotations

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from .caller import Caller
from .event_stream import MEDIA_TYPE
from .hosted import hosted_call
from .image_call import ImageCall
from .openai_dialect import is_openai, openai_call
from .openai_form import edits_call
from .openapi import ERRORS, answers, form_body, json_body
from .request_body import json_object, query_switch
from .service import Service

_STREAM = Query("false", pattern="^(true|false)$", description="Answer with server-sent events: progress, then the answer.")
_PREVIEWS = Query("false", pattern="^(true|false)$", description="With stream: small pictures of where the image is heading.")
_MADE = {
    **ERRORS,
    **answers(
        s200=("OpenAIImages", "The images, asked for in OpenAI's dialect; with stream=true, events in every dialect."),
        s201=("GenerationResponse", "The images, asked for in the hosted API's dialect."),
    ),
}
_EDITED = {**ERRORS, **answers(s200=("OpenAIImages", "The images; with stream=true, events."))}
for _answers in (_MADE, _EDITED):
    _answers[200]["content"][MEDIA_TYPE] = {}


def image_router(service: Service) -> APIRouter:
    """The routes.

    Args:
        service: runs requests.
    """
    router = APIRouter(prefix="/v1/images", tags=["images"])

    @router.post(
        "/generations",
        status_code=201,
        response_class=Response,
        responses=_MADE,
        openapi_extra=json_body("GenerationRequest", "OpenAIImageRequest"),
    )
    async def generations(request: Request, key: Caller, stream: str = _STREAM, previews: str = _PREVIEWS) -> Response:
        """Make images. A body without `image_urls`, or with an alias for the model, is OpenAI's dialect."""
        service.limits.admit(key)
        body = await json_object(request)
        openai = is_openai(body, service.settings)
        call = openai_call(body, service.request_type, service.settings) if openai else hosted_call(body, service.request_type)
        return await _answer(request, key, call)

    @router.post("/edits", response_class=Response, responses=_EDITED, openapi_extra=form_body("OpenAIEditRequest"))
    async def edits(request: Request, key: Caller, stream: str = _STREAM, previews: str = _PREVIEWS) -> Response:
        """Make images from pictures that are sent as files: content, then styles."""
        service.limits.admit(key)
        return await _answer(request, key, await edits_call(request, service.request_type, service.settings))

    async def _answer(request: Request, key: Caller, call: ImageCall) -> Response:
        if query_switch(request, "stream"):
            return await service.stream(request, key, call, previews=query_switch(request, "previews"))
        return await service.answer(request, key, call)

    return router
