"""OpenAI's dialect: ``images.generate`` and ``images.edit`` in the engine's words, and the answer in theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from uso_engine.api.fields import MODEL
from uso_engine.api.messages import shown, suggested
from uso_engine.api.request import GenerationRequest
from uso_engine.api.response import GenerationResponse

from .image_call import ImageCall, Write, now
from .refusal import bad_request, invalid
from .settings import ServerSettings

STATUS = 200
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
RENAMED = {"num_images": "n", "image_size": "size"}
"""The engine's fields that have another name here."""
OWN = ("model", "prompt", "n", "size", "response_format", "user")
# Fields of the engine's request that are not asked for by the names above.
REPLACED = ("model", "prompt", "num_images", "image_size", "sync_mode", "image_urls")
_LONGEST_USER = 256


class OpenAIImage(BaseModel):
    """One image: where it is, or its bytes in base64."""

    model_config = ConfigDict(frozen=True)
    url: str | None = None
    b64_json: str | None = None


class OpenAIImages(BaseModel):
    """The answer of OpenAI's dialect; ``seed`` and ``has_nsfw_concepts`` are extensions."""

    model_config = ConfigDict(frozen=True)
    created: int = Field(description="Seconds since 1970.")
    data: tuple[OpenAIImage, ...]
    seed: int
    has_nsfw_concepts: tuple[bool, ...]


def is_openai(body: Mapping[str, object], settings: ServerSettings) -> bool:
    """Whether a body is OpenAI's dialect and not the hosted API's: no ``image_urls``, or an alias of the model."""
    model = body.get("model")
    return "image_urls" not in body or (isinstance(model, str) and model != MODEL and model in settings.models)


def openai_call(
    body: Mapping[str, object],
    kind: type[GenerationRequest],
    settings: ServerSettings,
    *,
    images: Sequence[str] | None = None,
) -> ImageCall:
    """A request in OpenAI's words, with the engine's other fields as extensions.

    Args:
        body: its fields.
        kind: the request class of this server.
        settings: the model's names.
        images: data URIs of pictures that came as files, content first; None where fields may name pictures by URL.

    Raises:
        Refusal: 400 for another model, an unknown field, or what is outside the schema.
    """
    extensions = [name for name in kind.model_fields if name not in REPLACED]
    pictures = ["image_urls"] if images is None else []
    _refuse_unknown(body, [*OWN, *extensions, *pictures])
    _check_model(body.get("model", MODEL), settings)
    user = body.get("user", "")
    if not isinstance(user, str) or len(user) > _LONGEST_USER:
        raise bad_request(f"user must be a string of at most {_LONGEST_USER} characters, got {shown(user)}", fields=["user"])
    form = _response_format(body.get("response_format"))
    fields: dict[str, object] = {name: body[name] for name in extensions if name in body}
    fields |= {"model": MODEL, "image_urls": list(images) if images is not None else body.get("image_urls", [])}
    fields["sync_mode"] = form == "b64_json"
    for ours, theirs in (("prompt", "prompt"), ("num_images", "n")):
        if body.get(theirs) is not None:
            fields[ours] = body[theirs]
    size = body.get("size")
    if size is not None and size != "auto":
        fields["image_size"] = _size(size)
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise invalid(error, RENAMED) from None
    return ImageCall("openai", request, STATUS, _writer(form))


def _writer(form: str) -> Write:
    def write(response: GenerationResponse) -> bytes:
        data = tuple(
            OpenAIImage(b64_json=item.b64_json) if form == "b64_json" else OpenAIImage(url=item.url) for item in response.data
        )
        made = OpenAIImages(created=now(), data=data, seed=response.seed, has_nsfw_concepts=response.has_nsfw_concepts)
        return to_json(made, exclude_none=True)

    return write


def _refuse_unknown(body: Mapping[str, object], known: Sequence[str]) -> None:
    unknown = [name for name in body if name not in known]
    if not unknown:
        return
    problems = []
    for name in unknown:
        other = RENAMED.get(name) or ("response_format" if name == "sync_mode" else None)
        near = f"{other!r}?" if other else suggested(name, known)
        hint = f"did you mean {near}" if near else f"known: {', '.join(known)}"
        why = "without image_urls a request is read in OpenAI's dialect"
        problems.append(f"{name[:60]!r} is not a field here ({why}); {hint}")
    raise bad_request(*problems, fields=[name[:60] for name in unknown])


def _check_model(model: object, settings: ServerSettings) -> None:
    if model not in settings.models:
        raise bad_request(f"model must be one of {', '.join(settings.models)}, got {shown(model)}", fields=["model"])


def _response_format(value: object) -> Literal["url", "b64_json"]:
    if value is None or value == "url":
        return "url"
    if value != "b64_json":
        raise bad_request(f"response_format must be 'url' or 'b64_json', got {shown(value)}", fields=["response_format"])
    return "b64_json"


def _size(value: object) -> dict[str, int]:
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise bad_request(f"size must be 'auto' or WIDTHxHEIGHT, such as '1024x768', got {shown(value)}", fields=["size"])
    return {"width": int(match[1]), "height": int(match[2])}
