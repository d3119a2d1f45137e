"""The request class that one server takes: the hosted contract under the configuration's and the operator's limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError, create_model

from uso_engine.api.fields import MODEL, WHOLE
from uso_engine.api.messages import validation_messages
from uso_engine.api.request import GenerationRequest, RequestDefaults, request_model
from uso_engine.config import EngineConfig
from uso_engine.errors import ConfigError
from uso_engine.imaging.sizes import SizeLimits

from .refusal import bad_request
from .settings import RequestBounds


def wire_request(config: EngineConfig, bounds: RequestBounds) -> type[GenerationRequest]:
    """The request class; its JSON schema shows every limit.

    Args:
        config: of the engine, for sizes and defaults.
        bounds: the operator's own.

    Raises:
        ConfigError: the configuration's defaults are outside the limits.
    """
    limits, defaults = config.limits, config.defaults
    steps = min(defaults.steps, bounds.max_steps)
    most = limits.max_pixels if bounds.max_pixels is None else min(limits.max_pixels, bounds.max_pixels)
    try:
        kind = request_model(
            SizeLimits(limits.min_side, limits.max_side, most),
            RequestDefaults(defaults.width, defaults.height, steps, defaults.guidance, config.content.long_side),
            wire=True,
        )
        narrowed = _narrowed(kind, bounds, forbids_disabling=config.safety is not None and config.safety.forbid_disabling)
        narrowed.model_validate({"model": MODEL, "prompt": "", "image_urls": []})
    except ValidationError as error:
        found = "; ".join(validation_messages(error))
        raise ConfigError(f"{config.name}: its defaults do not fit the server's limits: {found}") from error
    except ValueError as error:
        raise ConfigError(f"{config.name}: its defaults do not fit the server's limits: {error}") from error
    return narrowed


def _narrowed(kind: type[GenerationRequest], bounds: RequestBounds, *, forbids_disabling: bool) -> type[GenerationRequest]:
    fields: dict[str, tuple[object, object]] = {}
    for name, most in (("num_inference_steps", bounds.max_steps), ("num_images", bounds.max_images)):
        known = kind.model_fields[name]
        fields[name] = (Annotated[int, Field(ge=1, le=most, description=known.description), WHOLE], known.default)
    if forbids_disabling:
        description = "Replace unsafe images by black ones; the operator does not allow switching it off."
        fields["enable_safety_checker"] = (Annotated[Literal[True], Field(description=description)], True)
    made: type[GenerationRequest] = create_model(  # type: ignore[call-overload]
        "GenerationRequest", __base__=kind, __module__=__name__, **fields
    )
    return made


def engine_request(request: GenerationRequest, config: EngineConfig) -> GenerationRequest:
    """A request as the engine is to run it, unless it could only refuse it, after it has waited in a queue.

    Args:
        request: of the server's class.
        config: of the engine.

    Returns:
        It, with what the server's default is said in so many words: the engine's own may be above the operator's limit.

    Raises:
        Refusal: 400.
    """
    if request.enable_safety_checker and config.safety is None:
        raise bad_request(
            "enable_safety_checker is true, but this server has no safety checker; set it to false",
            fields=["enable_safety_checker"],
        )
    return request.model_copy(update={"num_inference_steps": request.num_inference_steps})
