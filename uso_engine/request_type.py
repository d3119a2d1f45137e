"""The request class of a configuration: its sizes and its defaults. Needs no torch, so that a request can be checked first."""

from __future__ import annotations

from uso_engine.api.request import GenerationRequest, RequestDefaults, request_model
from uso_engine.config import EngineConfig
from uso_engine.errors import ConfigError


def request_type_of(config: EngineConfig) -> type[GenerationRequest]:
    """The requests that an engine of a configuration takes.

    Raises:
        ConfigError: defaults that the configuration's own limits refuse.
    """
    defaults = config.defaults
    try:
        return request_model(
            config.limits.sizes,
            RequestDefaults(defaults.width, defaults.height, defaults.steps, defaults.guidance, config.content.long_side),
        )
    except ValueError as error:
        raise ConfigError(f"{config.name}: [defaults] and [content] do not fit [limits]: {error}") from error
