"""The fields of a request: their types, bounds, defaults and descriptions, and the checks that bounds cannot say."""

from __future__ import annotations

import numbers
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from uso_engine.imaging.sizes import PRESETS, ImageSize, SizeLimits, SizePreset
from uso_engine.imaging.source import EXPECTED_SOURCE, ImageSource, describe_source, is_image_source

from .messages import refusal, shown

MODEL: Final = "bytedance/uso"
MAX_SEED = 2**53 - 1
"""The largest whole number that JSON carries safely."""
LARGEST_SEED = 2**64 - 1
"""The largest seed that Python and the shell take."""
MAX_IMAGES = 3
MAX_PROMPT = 4000
"""Characters of a prompt, and of a negative one."""
ANY_SIZE = SizeLimits(min_side=16, max_side=65_535, max_pixels=65_535**2)
"""What some engine may take, for requests made without one; longer sides no JPEG holds."""

_WIRE_URL = re.compile(r"https?://[^\s/\\]|data:[^,]*,", re.IGNORECASE)


@dataclass(frozen=True)
class RequestDefaults:
    """What a request gets that does not say; the defaults are the hosted API's.

    Args:
        width: of the output, in pixels.
        height: of the output, in pixels.
        steps: denoising steps.
        guidance: guidance scale.
        content_long_side: long side that content images are resized to; ``keep_size`` gives an output twice as large.
    """

    width: int = 1024
    height: int = 1024
    steps: int = 28
    guidance: float = 4.0
    content_long_side: int = 512


def asks_for_a_seed(value: object) -> bool:
    """Whether a seed is -1, by which shells and diffusers' callers ask for one to be drawn; a request leaves its seed out."""
    number = plain_whole(value)
    return isinstance(number, int) and not isinstance(number, bool) and number == -1


def image_seeds(seed: int, count: int) -> tuple[int, ...]:
    """The seed of each image of a request: ``seed``, the next one and so on; after the last legal seed comes 1.

    So a request with any legal seed can ask for several images, and every seed that is reported gives that image alone. Of
    seeds that only Python takes the last one is 2^64 - 1, after which comes 0.
    """
    if 1 <= seed <= MAX_SEED:
        return tuple(1 + (seed - 1 + j) % MAX_SEED for j in range(count))
    return tuple((seed + j) % (LARGEST_SEED + 1) for j in range(count))


def plain_whole(value: object) -> object:
    """2.0 is 2 (JSON has one kind of number), and numpy's numbers are numbers; everything else is judged as it is."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    number = plain_real(value)
    return int(number) if isinstance(number, float) and number.is_integer() else value


def plain_real(value: object) -> object:
    """Numpy's numbers are numbers, of Python's own types; everything else is judged as it is."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    try:
        return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value
    except OverflowError:  # a fraction beyond every float
        return value


def plain_switch(value: object) -> object:
    """Numpy's True and False are Python's; everything else is judged as it is."""
    numpy = sys.modules.get("numpy")
    return bool(value) if numpy is not None and isinstance(value, numpy.bool_) else value


def checked_switch(name: str, value: object) -> bool:
    """True or False; ValueError for anything else: "no" would be a yes."""
    switch = plain_switch(value)
    if not isinstance(switch, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return switch


# Last in each type, so that the bounds before it are checked on the number and shown in the JSON schema.
WHOLE = BeforeValidator(plain_whole)
REAL = BeforeValidator(plain_real)
SWITCH = BeforeValidator(plain_switch)


def images_as_json(images: Sequence[ImageSource | None]) -> list[str | None]:
    """The pictures of a request that JSON can hold: URLs, data URIs and paths; ValueError for others."""
    for place, image in enumerate(images):
        if not isinstance(image, (str, Path, type(None))):
            raise ValueError(
                f"image_urls[{place}] is {describe_source(image)}; JSON holds URLs, data URIs and paths only, "
                "so give it as a data URI"
            )
    return [None if image is None else str(image) for image in images]


def size_as_plain(size: SizePreset | ImageSize) -> str | dict[str, int]:
    """A name, or width and height, as JSON has them."""
    return size if isinstance(size, str) else {"width": size.width, "height": size.height}


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
    PlainSerializer(images_as_json, when_used="json"),
    Field(
        description="The content image, then up to two style references: http(s) URLs or data URIs. Extension: null or an "
        "empty string in the first place for style alone, an empty list for text alone."
    ),
]
Size: TypeAlias = Annotated[
    SizePreset | ImageSize,
    PlainSerializer(size_as_plain),
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
_SEED_MEANS = "The same seed and prompt give the same image; left out, one is drawn and returned."
Seed: TypeAlias = Annotated[
    int | None,
    Field(ge=0, le=LARGEST_SEED, description=_SEED_MEANS),
    WHOLE,
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": LARGEST_SEED}),
]
HostedSeed: TypeAlias = Annotated[
    int | None,
    Field(ge=1, le=MAX_SEED, description=_SEED_MEANS),
    WHOLE,
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MAX_SEED}),
]
Switch: TypeAlias = Annotated[bool, SWITCH]
ContentLongSide: TypeAlias = Annotated[
    int, Field(ge=64, le=1024, description="Extension: long side that the content image is resized to, in pixels."), WHOLE
]


def image_problem(name: str, image: object, *, wire: bool = False) -> str | None:
    """What is wrong with what was given as a picture, or None.

    Args:
        name: what the message calls it.
        image: what was given.
        wire: whether it came over HTTP, where there are no paths or objects.
    """
    if isinstance(image, str):
        usable = bool(image) and (not wire or _WIRE_URL.match(image) is not None)
    else:
        usable = not wire and is_image_source(image)
    expected = "an http(s) URL or a data URI" if wire else EXPECTED_SOURCE
    return None if usable else f"{name} must be {expected}, got {shown(image)}"


def checked_image(image: ImageSource) -> ImageSource:
    """A picture as it is kept: of a buffer that the caller may write to again, its bytes now."""
    return bytes(image) if isinstance(image, (bytearray, memoryview)) else image


def checked_images(value: object, *, wire: bool) -> tuple[ImageSource | None, ...]:
    """The pictures of a request.

    Args:
        value: a list or tuple; in Python also one picture.
        wire: whether it came over HTTP.

    Raises:
        PydanticCustomError: something else; names the place.
    """
    if not isinstance(value, (list, tuple)):
        if wire or value is None or image_problem("", value) is not None:
            alone = "" if wire else f" pictures, or one picture ({EXPECTED_SOURCE})"
            raise refusal(f"image_urls must be a list of at most {MAX_IMAGES}{alone}, got {shown(value)}")
        value = (value,)
    if len(value) > MAX_IMAGES:
        raise refusal(f"image_urls must have at most {MAX_IMAGES} images, got {len(value)}")
    problems, images = [], list[ImageSource | None]()
    for place, image in enumerate(value):
        missing = image is None or (isinstance(image, str) and not image)
        problem = None if missing and place == 0 else image_problem(f"image_urls[{place}]", image, wire=wire)
        if problem is not None:
            problems.append(problem + ("; only the first, the content image, may be left out" if missing else ""))
        images.append(None if missing else checked_image(image))
    if problems:
        raise refusal("; ".join(problems))
    return tuple(images)


def checked_size(value: object, limits: SizeLimits) -> SizePreset | ImageSize:
    """An output size under limits.

    Raises:
        PydanticCustomError: another name, no size, or outside the limits.
    """
    for preset in PRESETS:
        # Not ==: an array would compare each of its entries.
        if isinstance(value, str) and value == preset:
            problems = limits.preset_problems(preset)
            if problems:
                raise refusal("; ".join(problems))
            return preset
    size, problems = own_size(value)
    problems = problems or limits.problems(size)
    if problems:
        raise refusal("; ".join(problems))
    return size


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
