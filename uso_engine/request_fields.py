"""The fields of a request: their types, bounds and descriptions, and the checks that bounds cannot say."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from PIL.Image import Image
from pydantic import BeforeValidator, Field, WithJsonSchema

from uso_engine.imaging.sizes import PRESETS, ImageSize, SizePreset
from uso_engine.imaging.source import ImageSource
from uso_engine.request_messages import shown

MODEL: Final = "bytedance/uso"
MAX_SEED = 2**53 - 1
"""The largest whole number that JSON carries safely."""
MAX_IMAGES = 3

_WIRE_URL = re.compile(r"https?://[^\s/\\]|data:[^,]*,", re.IGNORECASE)


def image_seeds(seed: int, count: int) -> tuple[int, ...]:
    """The seed of each image of a request: ``seed``, the next one and so on; after the last legal seed comes 1.

    So a request with any legal seed can ask for several images, and every seed that is reported gives that image alone.
    """
    return tuple(1 + (seed - 1 + j) % MAX_SEED for j in range(count))


def plain_whole(value: object) -> object:
    """2.0 is 2 (JSON has one kind of number), and numpy's integers are integers; everything else is judged as it is."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return value


def plain_real(value: object) -> object:
    """Numpy's floats are floats; everything else is judged as it is."""
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, (bool, int, float)) else value


# Last in each type, so that the bounds before it are checked on the number and shown in the JSON schema.
WHOLE = BeforeValidator(plain_whole)
REAL = BeforeValidator(plain_real)

ModelName: TypeAlias = Annotated[Literal["bytedance/uso"], Field(description="The model's name.")]
Images: TypeAlias = Annotated[
    Sequence[ImageSource | None],
    WithJsonSchema(
        {
            "type": "array",
            "prefixItems": [{"anyOf": [{"type": "string", "format": "uri"}, {"type": "null"}, {"const": ""}]}],
            "items": {"type": "string", "format": "uri"},
            "maxItems": MAX_IMAGES,
        }
    ),
    Field(
        description="The content image, then up to two style references: http(s) URLs or data URIs. Extension: null or an "
        "empty string in the first place for style alone, an empty list for text alone."
    ),
]
Size: TypeAlias = Annotated[
    SizePreset | ImageSize,
    WithJsonSchema({}),  # request limits decide: __get_pydantic_json_schema__
    Field(description="A name, or width and height; those are rounded down to multiples of 16."),
]
Steps: TypeAlias = Annotated[int, Field(ge=1, le=50, description="Denoising steps."), WHOLE]
Guidance: TypeAlias = Annotated[float, Field(ge=1, le=20, description="How strictly the prompt is followed."), REAL]
Count: TypeAlias = Annotated[
    int,
    Field(ge=1, le=4, description="How many images; image j is made from seed + j (after the last seed comes 1)."),
    WHOLE,
]
TrueCfgScale: TypeAlias = Annotated[
    float,
    Field(
        ge=1, le=20, description="Extension: weight of the prompt against a non-empty negative_prompt; 1 ignores the latter."
    ),
    REAL,
]
StyleScale: TypeAlias = Annotated[
    float, Field(ge=0, le=4, description="Extension: strength of the style references; 1 is the reference's."), REAL
]
Seed: TypeAlias = Annotated[
    int | None,
    Field(ge=1, le=MAX_SEED, description="The same seed and prompt give the same image; left out, one is drawn and returned."),
    WHOLE,
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MAX_SEED}),
]
ContentLongSide: TypeAlias = Annotated[
    int, Field(ge=64, le=1024, description="Extension: long side that the content image is resized to, in pixels."), WHOLE
]


def image_problem(place: int, image: object, *, wire: bool) -> str | None:
    """What is wrong with one entry of ``image_urls``, or None.

    Args:
        place: its index; only the first may be left out.
        image: what was given.
        wire: whether it came over HTTP, where there are no paths or objects.
    """
    expected = "an http(s) URL or a data URI" if wire else "a path, URL, data URI, bytes, binary file or PIL image"
    if image is None or (isinstance(image, str) and not image):
        if place == 0:
            return None
        return f"image_urls[{place}] must be {expected}, got {shown(image)}; only the first, the content image, may be left out"
    if isinstance(image, str):
        usable = not wire or _WIRE_URL.match(image) is not None
    else:
        usable = not wire and (isinstance(image, (Path, bytes, Image)) or callable(getattr(image, "read", None)))
    return None if usable else f"image_urls[{place}] must be {expected}, got {shown(image)}"


def own_size(value: object) -> tuple[ImageSize, list[str]]:
    """Width and height given as an object, and what is wrong with it."""
    given = {"width": value.width, "height": value.height} if isinstance(value, ImageSize) else value
    if not isinstance(given, Mapping):
        named = ", ".join(PRESETS)
        return ImageSize(0, 0), [f"image_size must be one of {named}, or an object with width and height, got {shown(value)}"]
    problems = [
        f"image_size.{str(key)[:60]} is not a field; known: width, height" for key in given if key not in ("width", "height")
    ]
    sides = []
    for side in ("width", "height"):
        number = plain_whole(given.get(side))
        if side not in given:
            problems.append(f"image_size.{side} is required")
        elif not isinstance(number, int) or isinstance(number, bool):
            problems.append(f"image_size.{side} must be a whole number, got {shown(given[side])}")
        else:
            sides.append(number)
    return ImageSize(*sides) if not problems else ImageSize(0, 0), problems
