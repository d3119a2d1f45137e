"""The routes beside generation: stored images, the model's names, health, metrics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from .caller import Caller
from .files import FILE_NAME
from .metrics import MEDIA_TYPE
from .openapi import ERRORS
from .refusal import Refusal
from .service import Service


class ModelObject(BaseModel):
    """A name that the model answers to."""

    model_config = ConfigDict(frozen=True)
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "bytedance"


class ModelList(BaseModel):
    """All of them, as OpenAI's API lists models."""

    model_config = ConfigDict(frozen=True)
    object: str = "list"
    data: tuple[ModelObject, ...]


class Health(BaseModel):
    """Whether the process lives, and where the engine stands."""

    model_config = ConfigDict(frozen=True)
    status: str


def plain_router(service: Service) -> APIRouter:
    """The routes.

    Args:
        service: has the files, the engine's state and the metrics.
    """
    router = APIRouter()

    @router.head("/files/{name}", include_in_schema=False)
    @router.get(
        "/files/{name}",
        tags=["files"],
        response_class=Response,
        responses={200: {"content": {"image/png": {}, "image/jpeg": {}}, "description": "The image."}, 404: ERRORS[404]},
    )
    async def file(name: Annotated[str, Path(description=f"Of the form {FILE_NAME}.")]) -> Response:
        """A stored image. Its name is the secret: whoever has it may read it, without a key."""
        found = await service.find_file(name)
        if found is None:
            raise Refusal(404, "There is no such file, or it has expired.")
        data, media_type, left = found
        headers = {
            "Cache-Control": f"private, max-age={int(left)}, immutable",
            "ETag": f'"{name}"',
            "Content-Security-Policy": "default-src 'none'; sandbox",
        }
        return Response(data, media_type=media_type, headers=headers)

    @router.get("/v1/models", tags=["models"], responses={401: ERRORS[401]})
    async def models(key: Caller) -> ModelList:
        """The names that the model answers to."""
        return ModelList(data=tuple(ModelObject(id=name) for name in service.settings.models))

    @router.get("/healthz", tags=["operation"])
    async def healthz() -> Health:
        """Whether the process answers at all."""
        return Health(status="ok")

    @router.get("/readyz", tags=["operation"], responses={503: ERRORS[503]})
    async def readyz() -> Health:
        """Whether requests are taken: after warm-up, and not while draining or once the engine is dead."""
        service.state.ready()
        return Health(status="ready")

    @router.get("/metrics", tags=["operation"], response_class=Response, responses={401: ERRORS[401]})
    async def metrics(request: Request, key: Caller) -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type=MEDIA_TYPE)

    return router
