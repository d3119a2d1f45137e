"""The hosted API's dialect: its own request and response."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from uso_engine.api.request import GenerationRequest

from .image_call import ImageCall, written_hosted
from .refusal import invalid

STATUS = 201


def hosted_call(body: Mapping[str, object], kind: type[GenerationRequest]) -> ImageCall:
    """A request in the hosted API's words.

    Args:
        body: the JSON object.
        kind: the request class of this server.

    Raises:
        Refusal: 400 for what is outside the schema.
    """
    try:
        request = kind.model_validate(dict(body))
    except ValidationError as error:
        raise invalid(error) from None
    return ImageCall("hosted", request, STATUS, written_hosted)
