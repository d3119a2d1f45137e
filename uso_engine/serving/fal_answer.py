"""fal's dialect: a request's fields in fal's words, and what a client is told of it while it waits."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uso_engine.api.fields import MODEL
from uso_engine.api.request import GenerationRequest

from .image_call import ImageCall, written_hosted
from .queue_records import QueueState, Status
from .refusal import bad_request, invalid

STATUS = 200


class FalTicket(BaseModel):
    """What is told of an accepted request, and where it can be followed."""

    model_config = ConfigDict(frozen=True)
    request_id: str
    response_url: str
    status_url: str
    cancel_url: str
    queue_position: int | None = Field(None, description="How many requests are before it.")


class FalStatus(FalTicket):
    """Where a request stands."""

    status: Status
    logs: tuple[str, ...] = ()
    metrics: dict[str, float] = Field(default_factory=dict, description="inference_time in seconds, of a success.")
    error: str | None = None


class FalCancellation(BaseModel):
    """What became of a wish to cancel."""

    model_config = ConfigDict(frozen=True)
    status: str


def fal_fields(body: Mapping[str, object]) -> dict[str, object]:
    """A request's fields in the engine's words; pictures may be called ``input_image_urls``, as fal's own endpoint does.

    Raises:
        Refusal: 400 for both names at once, or a field that the path says already.
    """
    if "model" in body:
        raise bad_request("'model' is not a field here; the path names the model", fields=["model"])
    if all(name in body for name in ("image_urls", "input_image_urls")):
        raise bad_request("image_urls and input_image_urls are the same field; give one of them", fields=["image_urls"])
    fields = {"image_urls" if name == "input_image_urls" else name: value for name, value in body.items()}
    return {"image_urls": [], **fields, "model": MODEL}


def fal_call(fields: Mapping[str, object], kind: type[GenerationRequest]) -> ImageCall:
    """A request in the engine's words, as a call.

    Args:
        fields: from `fal_fields`.
        kind: the request class of this server.

    Raises:
        Refusal: 400 for what is outside the schema.
    """
    try:
        request = kind.model_validate(dict(fields))
    except ValidationError as error:
        raise invalid(error) from None
    return ImageCall("fal", request, STATUS, written_hosted)


def ticket(base_url: str, model: str, identifier: str, position: int | None) -> FalTicket:
    """What is told of a request at its acceptance."""
    return FalTicket(**_urls(base_url, model, identifier), queue_position=position)


def status_of(base_url: str, state: QueueState, identifier: str, position: int | None) -> FalStatus:
    """Where a request stands, in fal's words."""
    metrics = {} if state.seconds is None else {"inference_time": state.seconds}
    return FalStatus(
        **_urls(base_url, state.model, identifier),
        queue_position=position,
        status=state.status,
        metrics=metrics,
        error=state.error,
    )


def _urls(base_url: str, model: str, identifier: str) -> dict[str, str]:
    url = f"{base_url}/queue/{model}/requests/{identifier}"
    return {"request_id": identifier, "response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}
