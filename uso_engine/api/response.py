"""What a caller gets: the hosted API's response and error bodies. Importing this needs no torch."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field

VALIDATION_MESSAGE = "Body validation error!"


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageObject(_Body):
    """One image of a response. ``file_name`` and ``file_size`` are null, as in the hosted API."""

    url: str = Field(description="Where the image is; in sync mode a data URI that holds it.")
    content_type: str
    file_name: str | None = None
    file_size: int | None = None
    width: int
    height: int


class DataObject(ImageObject):
    """One image, with its bytes where they were asked for."""

    b64_json: str | None = Field(None, description="The encoded image in base64; in sync mode only.")


class Timings(_Body):
    """How long it took, in seconds."""

    inference: float


class Usage(_Body):
    """What it cost."""

    tokens_used: int = Field(description="Transformer tokens, summed over steps.")


class Meta(_Body):
    """About the response."""

    usage: Usage


class GenerationResponse(_Body):
    """The body of a successful answer (HTTP 201)."""

    images: tuple[ImageObject, ...]
    seed: int
    has_nsfw_concepts: tuple[bool, ...]
    prompt: str
    timings: Timings
    data: tuple[DataObject, ...]
    meta: Meta


class ErrorBody(_Body):
    """The body of an unsuccessful answer.

    Extensions: ``errors`` says what is wrong, one sentence each, and ``fields`` names the fields that it is about.
    """

    message: str
    path: str
    requestId: str
    statusCode: int
    timestamp: str
    errors: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()


def error_body(
    message: str,
    *,
    path: str,
    status_code: int,
    request_id: str | None = None,
    errors: Sequence[str] = (),
    fields: Sequence[str] = (),
) -> ErrorBody:
    """The hosted API's error body.

    Args:
        message: what went wrong; ``VALIDATION_MESSAGE`` for a request that breaks the schema.
        path: the path that was asked, e.g. ``/v1/images/generations``.
        status_code: the HTTP status it goes with.
        request_id: the request's identifier; a new one by default.
        errors: details, such as ``validation_messages`` gives.
        fields: names of the offending fields.

    Returns:
        The body, stamped with the current time (UTC, ISO 8601, milliseconds).
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return ErrorBody(
        message=message,
        path=path,
        requestId=request_id or str(uuid.uuid4()),
        statusCode=status_code,
        timestamp=now,
        errors=tuple(errors),
        fields=tuple(fields),
    )
