"""A request on its way into an engine: checked and completed, nothing opened or computed yet."""

from __future__ import annotations

from collections.abc import Mapping

from . import call_arguments
from .api.request import GenerationRequest
from .api.research import ResearchOptions
from .generation import Generation, LoadedParts
from .loading.lora_choice import choose_loras
from .loading.sampling_choice import with_quality


def prepare(
    parts: LoadedParts,
    kind: type[GenerationRequest],
    request: GenerationRequest | str | None,
    fields: Mapping[str, object],
    research: ResearchOptions | None,
    quality: object = None,
) -> Generation:
    """Check what `generate` was called with.

    Args:
        parts: of the engine.
        kind: the engine's own request class.
        request: a request, a prompt, or None.
        fields: of a request, given as keywords.
        research: additions.
        quality: a named point of the configuration; None is "reference".

    Raises:
        ValueError: a request outside the schema or this engine's limits, or another type; names field, limit and value.
        SafetyError: the checker is asked for, and there is none.
        MissingFileError, LoRAError: LoRAs of its own that cannot be read.
    """
    checked = call_arguments.request_of(request, fields, kind).with_seed()
    call_arguments.check_safety(checked, parts.config.safety, has_checker=parts.safety is not None)
    options = call_arguments.checked_options(research)
    checked, point = with_quality(parts.config, checked, options, quality)
    loras = None if options.loras is None else choose_loras(options.loras, parts.config)
    return Generation(parts, checked, options, loras, quality=point)
