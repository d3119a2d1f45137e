"""Reading what a client sent: a JSON object, switches of the query."""

from __future__ import annotations

import asyncio

from pydantic_core import from_json
from starlette.requests import Request

from .refusal import Refusal, bad_request

_LARGE = 256 * 1024


async def json_object(request: Request) -> dict[str, object]:
    """The body, which has to be a JSON object.

    Raises:
        Refusal: 415 for another media type, 400 for what is no JSON object.
    """
    check_media_type(request, "application/json")
    body = await request.body()
    # A body with pictures in it is megabytes: other requests go on meanwhile.
    parsed = await asyncio.to_thread(_parse, body) if len(body) > _LARGE else _parse(body)
    if not isinstance(parsed, dict):
        kind = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(type(parsed), "a number")
        raise bad_request(f"the body must be a JSON object, got {kind}")
    return parsed


def check_media_type(request: Request, expected: str) -> None:
    """Refuse a body that says it is something else.

    Raises:
        Refusal: 415.
    """
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != expected:
        raise Refusal(415, "The body has the wrong media type.", errors=[f"expected {expected}, got {given[:60] or 'none'!r}"])


def query_switch(request: Request, name: str) -> bool:
    """A switch of the query, false where it is left out.

    Raises:
        Refusal: 400 for anything but true and false.
    """
    values = request.query_params.getlist(name)
    if not values:
        return False
    if len(values) > 1 or values[0] not in ("true", "false"):
        raise bad_request(f"the query's {name} must be true or false, once, got {values[0][:40]!r}", fields=[name])
    return values[0] == "true"


def _parse(body: bytes) -> object:
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}") from None
