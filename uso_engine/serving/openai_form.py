"""OpenAI's edits: a form of pictures and fields becomes what `openai_call` takes. File names are never looked at."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Mapping, Sequence

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from uso_engine.api.fields import MAX_IMAGES
from uso_engine.api.request import GenerationRequest

from .image_call import ImageCall
from .openai_dialect import openai_call
from .refusal import Refusal, bad_request
from .request_body import check_media_type
from .settings import ServerSettings

_FILES = ("image", "image[]")
_MOST_FIELDS = 40
_LONGEST_FIELD = 64 * 1024
_NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,19})(?:\.\d{1,20})?")
_TEXT_FIELDS = ("model", "prompt", "negative_prompt", "size", "response_format", "user", "output_format")


class _InMemory(MultiPartParser):
    """The whole body is bounded already: nothing of it goes to a disk."""

    spool_max_size = 2**40


async def edits_call(request: Request, kind: type[GenerationRequest], settings: ServerSettings) -> ImageCall:
    """A request of ``images.edit``: ``image`` or ``image[]`` is the content image, then up to two styles.

    Args:
        request: whose body is a form.
        kind: the request class of this server.
        settings: the model's names.

    Raises:
        Refusal: 415 for what is no form, 400 for one that is broken, or what `openai_call` refuses.
    """
    check_media_type(request, "multipart/form-data")
    texts, files = await _read_form(request)
    if not files:
        raise bad_request("image is required: one picture, or several: content, then styles", fields=["image"])
    images = await asyncio.to_thread(lambda: [_data_uri(data) for data in files])
    return openai_call({name: _value(name, text) for name, text in texts.items()}, kind, settings, images=images)


async def _read_form(request: Request) -> tuple[Mapping[str, str], Sequence[bytes]]:
    parser = _InMemory(
        request.headers, request.stream(), max_files=MAX_IMAGES, max_fields=_MOST_FIELDS, max_part_size=_LONGEST_FIELD
    )
    try:
        form = await parser.parse()
    except Refusal:
        raise
    except MultiPartException as error:
        raise bad_request(f"the form cannot be read: {error.message}") from None
    except (ValueError, LookupError) as error:  # a charset or a header that is none
        raise bad_request("the form cannot be read") from error
    texts: dict[str, str] = {}
    files: list[bytes] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in _FILES:
                raise bad_request(f"{name[:60]!r} is no picture here; pictures are in 'image' or 'image[]'", fields=[name[:60]])
            files.append(await value.read())
        elif name in texts:
            raise bad_request(f"{name[:60]} is given more than once", fields=[name[:60]])
        else:
            texts[name] = value
    return texts, files


def _data_uri(data: bytes) -> str:
    # What kind of picture it is says its content; what the client calls it does not count.
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode('ascii')}"


def _value(name: str, text: str) -> object:
    """A form has text alone: what is a number, true or false in JSON is one here, but for fields that are text."""
    if name in _TEXT_FIELDS:
        return text
    if text in ("true", "false"):
        return text == "true"
    return json.loads(text) if _NUMBER.fullmatch(text) else text
