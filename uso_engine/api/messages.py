"""What is wrong with a request, in sentences that name the field, the rule and the value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

_BOUND_ERRORS = {"greater_than_equal", "less_than_equal"}
# What other interfaces call these fields.
_OTHER_NAMES = {
    "images": "image_urls",
    "image": "image_urls",
    "image_url": "image_urls",
    "content_image": "image_urls",
    "style_image": "image_urls",
    "style_images": "image_urls",
    "width": "image_size",
    "height": "image_size",
    "size": "image_size",
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "n": "num_images",
    "num_images_per_prompt": "num_images",
    "batch_size": "num_images",
    "generator": "seed",
}
_DRAWN = "; leave it out to have one drawn"
_HINTS = {"image_size": " It takes a name or {'width': …, 'height': …}"}


def suggested(name: str, known: Sequence[str]) -> str | None:
    """The field that a caller may have meant by another name, and how it is written where that is not plain.

    Args:
        name: what was given.
        known: the names that are taken.
    """
    meant = _OTHER_NAMES.get(name, "")
    near = [meant] if meant in known else difflib.get_close_matches(name, known, n=1)
    if not near:
        return None
    return f"{near[0]!r}?" + _HINTS.get(near[0], "")


def validation_messages(error: ValidationError) -> list[str]:
    """Every message of a refused request.

    Args:
        error: what pydantic raised for a request.

    Returns:
        One sentence for each thing that is wrong.
    """
    return [str(details["msg"]) for details in error.errors(include_url=False, include_context=False, include_input=False)]


def explained(error: ValidationError, model: type[BaseModel], known: Sequence[str]) -> ValidationError:
    """The same errors in our words.

    Args:
        error: pydantic's own.
        model: the model that was validated, for the ranges of its fields.
        known: names that a caller may use, for suggestions.

    Returns:
        An error to raise in its place.
    """
    lines = [
        InitErrorDetails(type=refusal(_sentence(details, model, known)), loc=details["loc"], input=details["input"])
        for details in error.errors(include_url=False)
    ]
    return ValidationError.from_exception_data(error.title, lines, hide_input=True)


def refusal(text: str) -> PydanticCustomError:
    """An error to raise in a validator, whose message is the text as it stands."""
    # Custom errors format {name} in their text from a context; without one, braces in values stay as they are.
    return PydanticCustomError("refused", text)


def shown(value: object) -> str:
    """A value for a message: JSON's spelling, cut where it is long, without addresses or contents of pictures."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:40]!r}… ({len(value)} characters)"
    if isinstance(value, int):
        return str(value) if value.bit_length() < 200 else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return str(value) if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(sorted(str(key)[:20] for key in value)[:5]) or 'nothing'}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"{type(value).__name__}"


def _sentence(details: ErrorDetails, model: type[BaseModel], known: Sequence[str]) -> str:
    kind, value = details["type"], shown(details["input"])
    field = ".".join(str(part) for part in details["loc"])
    context = details.get("ctx", {})
    if kind == "missing":
        return f"{field} is required" + (" (it may be the empty string)" if field == "prompt" else "")
    if kind == "extra_forbidden":
        near = suggested(field, known)
        return f"{field[:60]!r} is not a field of a request; " + (
            f"did you mean {near}" if near else f"known: {', '.join(known)}"
        )
    if kind == "string_too_long":
        return f"{field} must have at most {context['max_length']} characters, got {len(str(details['input']))}"
    if kind.startswith(("int_", "float_")) or kind in _BOUND_ERRORS:
        return f"{field} must be {_range(model, field)}, got {value}" + (_DRAWN if (field, value) == ("seed", "-1") else "")
    if kind.startswith("bool_"):
        return f"{field} must be true or false, got {value}"
    if kind == "string_type":
        return f"{field} must be a string, got {value}"
    if kind == "string_unicode":
        return f"{field} must be text; it holds half of a surrogate pair"
    if kind == "literal_error":
        return f"{field} must be {context['expected']}, got {value}"
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        return f"the request must be an object with fields, got {value}"
    return str(details["msg"])


def _range(model: type[BaseModel], field: str) -> str:
    """What kind of number a field takes, from its own constraints."""
    info = model.model_fields[field]
    bounds = {name: getattr(item, name) for item in info.metadata for name in ("ge", "le") if hasattr(item, name)}
    whole = "int" in str(info.annotation)
    return f"a {'whole ' if whole else ''}number from {bounds['ge']} to {bounds['le']}"
