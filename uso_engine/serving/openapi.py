"""The OpenAPI document: the request schemas of all dialects under this server's limits, and every error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi.openapi.utils import get_openapi

from uso_engine.api.fields import MAX_IMAGES, MODEL
from uso_engine.api.request import GenerationRequest
from uso_engine.api.response import ErrorBody, GenerationResponse
from uso_engine.version import VERSION

from .openai_dialect import REPLACED, OpenAIImages
from .settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

Schema = dict[str, Any]
_REFERENCE = "#/components/schemas/{model}"
_STATUSES = {
    400: "The request breaks the schema, or names a picture that cannot be used.",
    401: "No key, or one that is not valid.",
    403: "A page of another origin sent the request.",
    404: "There is nothing of that name.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body has another media type.",
    421: "The Host header is none that this server answers to.",
    429: "Too many requests, or the queue is full; Retry-After says when to come again.",
    500: "The server failed, or the safety checker could not run.",
    503: "The engine is loading, draining or dead, or the store cannot be reached; Retry-After says when to come again.",
    504: "The request was not done in time.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _STATUSES.items()
}
KEY_REUSED: dict[int | str, dict[str, Any]] = {
    422: {"model": ErrorBody, "description": "The Idempotency-Key was used for another request."}
}
"""Besides, of the route that takes such a key."""


def json_body(*names: str) -> dict[str, Any]:
    """What a route says of its body: one of these schemas."""
    references = [{"$ref": _REFERENCE.format(model=name)} for name in names]
    schema: Schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_body(name: str) -> dict[str, Any]:
    """What a route says of its form."""
    schema = {"$ref": _REFERENCE.format(model=name)}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def openapi_document(app: FastAPI, kind: type[GenerationRequest], settings: ServerSettings) -> Schema:
    """The document.

    Args:
        app: whose routes it describes.
        kind: the request class of this server.
        settings: names of the model, and whether keys are needed.
    """
    document = get_openapi(
        title="uso-engine", version=VERSION, description=_DESCRIPTION, routes=app.routes, openapi_version="3.1.0"
    )
    schemas: Schema = document["components"]["schemas"]
    schemas |= _request_schemas(kind, settings)
    schemas |= {
        "GenerationResponse": _flat(GenerationResponse.model_json_schema(ref_template=_REFERENCE), schemas),
        "OpenAIImages": _flat(OpenAIImages.model_json_schema(ref_template=_REFERENCE), schemas),
    }
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    _describe_answers(document)
    _describe_names(document, settings)
    if settings.has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _request_schemas(kind: type[GenerationRequest], settings: ServerSettings) -> Schema:
    hosted = kind.model_json_schema(ref_template=_REFERENCE)
    hosted.pop("$defs", None)
    fields: Schema = hosted["properties"]
    fields["seed"] = {**fields["seed"], "type": ["integer", "null"]}
    model = {"type": "string", "enum": list(settings.models), "default": MODEL, "description": "The model's name."}
    extensions = {name: schema for name, schema in fields.items() if name not in REPLACED}
    openai = {
        "model": model,
        "prompt": fields["prompt"],
        "n": fields["num_images"],
        "size": _size(fields["image_size"]),
        "response_format": {
            "type": "string",
            "enum": ["url", "b64_json"],
            "default": "url",
            "description": "Where the images are, or the images themselves in base64.",
        },
        "user": {"type": "string", "maxLength": 256, "description": "Not used."},
        "image_urls": {**fields["image_urls"], "description": "Extension, with an alias of the model: pictures by URL."},
        **extensions,
    }
    picture = {"type": "string", "contentMediaType": "application/octet-stream", "format": "binary"}
    pictures = {"type": "array", "items": picture, "minItems": 1, "maxItems": MAX_IMAGES}
    edits = {"image": {"anyOf": [picture, pictures], "description": "The content image, then up to two styles."}, **openai}
    del edits["image_urls"]
    queued = {name: schema for name, schema in fields.items() if name != "model"}
    own_name = {"input_image_urls": {**fields["image_urls"], "description": "fal's own name of image_urls."}}
    return {
        "GenerationRequest": hosted,
        "OpenAIImageRequest": _object("OpenAIImageRequest", openai, ["prompt"]),
        "OpenAIEditRequest": _object("OpenAIEditRequest", edits, ["image", "prompt"]),
        "FalRequest": _object("FalRequest", {**queued, **own_name}, ["prompt"]),
    }


def _object(title: str, properties: Mapping[str, object], required: list[str]) -> Schema:
    return {
        "title": title,
        "type": "object",
        "properties": dict(properties),
        "required": required,
        "additionalProperties": False,
    }


def _size(image_size: Schema) -> Schema:
    side = next(option for option in image_size["anyOf"] if option["type"] == "object")["properties"]["width"]
    return {
        "type": "string",
        "pattern": r"^(auto|\d{1,5}x\d{1,5})$",
        "default": "auto",
        "description": f"WIDTHxHEIGHT with sides from {side['minimum']} to {side['maximum']}; auto is the default size.",
    }


def _flat(schema: Schema, schemas: Schema) -> Schema:
    """A schema without definitions of its own: they are the document's."""
    for name, definition in schema.pop("$defs", {}).items():
        schemas.setdefault(name, definition)
    return schema


def _describe_answers(document: Schema) -> None:
    """FastAPI describes an unchecked body as 422; here everything that breaks a schema is 400."""
    for path in document["paths"].values():
        for operation in path.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]


def _describe_names(document: Schema, settings: ServerSettings) -> None:
    """The parts of the model's name that fal's paths take."""
    pairs = [name.split("/") for name in settings.queue_models]
    for path, operations in document["paths"].items():
        if path.startswith(("/queue/", "/run/")):
            for operation in operations.values():
                for parameter in operation["parameters"]:
                    if parameter["name"] in ("owner", "name"):
                        place = 0 if parameter["name"] == "owner" else 1
                        parameter["schema"]["enum"] = sorted({pair[place] for pair in pairs})


def answers(**by_status: tuple[str, str]) -> dict[int | str, dict[str, Any]]:
    """What a route answers with: by status, a schema's name and what it means (``s201=("GenerationResponse", "…")``)."""
    return {
        int(status.removeprefix("s")): {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model=name)}}},
        }
        for status, (name, text) in by_status.items()
    }


_DESCRIPTION = """Images from a prompt, a content image and style images, in three dialects: the hosted `bytedance/uso` API's,
OpenAI's and fal's queue. Unknown fields are refused in every one of them."""
