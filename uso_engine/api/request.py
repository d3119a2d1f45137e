"""What a caller asks for: the hosted API's request schema, with its limits and a few optional extensions.

One class for two entries. In Python ``GenerationRequest(prompt=…, images=[…])`` takes pictures as paths, bytes, file objects or
Pillow images besides URLs, and the model has a default. Over HTTP ``request_model(…, wire=True)`` is the hosted contract:
``model`` and ``image_urls`` are required and pictures are URLs or data URIs. A configuration's own limits and defaults make a
subclass whose JSON schema shows them. Importing this needs no torch.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from uso_engine.imaging.resize import keep_size
from uso_engine.imaging.sizes import ImageSize, SizeLimits, SizePreset, preset_of, preset_size
from uso_engine.imaging.source import ImageSource, describe_source, is_same_source

from .fields import (
    ANY_SIZE,
    MAX_PROMPT,
    MODEL,
    ContentLongSide,
    Count,
    Guidance,
    HostedSeed,
    Images,
    ModelName,
    Seed,
    Size,
    Steps,
    StyleScale,
    Switch,
    TrueCfgScale,
    checked_images,
    checked_size,
)
from .fields import RequestDefaults as RequestDefaults
from .messages import explained, refusal, validation_messages

HOSTED_LIMITS = SizeLimits()
"""The hosted API's limits on sizes."""


PictureArgument: TypeAlias = ImageSource | Sequence[ImageSource | None]


class GenerationRequest(BaseModel):
    """One to four images from a prompt, a content image and style images.

    Frozen and checked when made; what is wrong is a pydantic ``ValidationError`` (a ``ValueError``) that lists everything. This
    class takes every size that some engine takes; an engine's own limits decide when the request is fitted to it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True, hide_input_in_errors=True)
    limits: ClassVar[SizeLimits] = ANY_SIZE
    defaults: ClassVar[RequestDefaults] = RequestDefaults()
    wire: ClassVar[bool] = False

    model: ModelName = MODEL
    prompt: str = Field(max_length=MAX_PROMPT, description="What to make; empty for stylisation that preserves the layout.")
    image_urls: Images = ()
    image_size: Size = "square_hd"
    negative_prompt: str = Field(
        "", max_length=MAX_PROMPT, description="What to stay away from; costs a second sequence for each image."
    )
    num_inference_steps: Steps = 28
    guidance_scale: Guidance = 4.0
    keep_size: Switch = Field(
        False, description="Keep the content image's shape: its size at the content long side, times 2; image_size is not used."
    )
    num_images: Count = 1
    seed: Seed = None
    sync_mode: Switch = Field(False, description="Return the images themselves instead of URLs.")
    enable_safety_checker: Switch = Field(True, description="Replace unsafe images by black ones.")
    output_format: Literal["png", "jpeg"] = Field("png", description="How images are encoded.")

    true_cfg_scale: TrueCfgScale = 2.0
    style_scale: StyleScale = 1.0
    content_long_side: ContentLongSide = 512

    if TYPE_CHECKING:
        # What type checkers see, with or without pydantic's plugin: defaults, ``images``, and sizes as plain objects.
        def __init__(
            self,
            *,
            prompt: str,
            model: str = ...,
            images: PictureArgument = ...,
            image_urls: PictureArgument = ...,
            image_size: SizePreset | ImageSize | Mapping[str, int] = ...,
            negative_prompt: str = ...,
            num_inference_steps: int = ...,
            guidance_scale: float = ...,
            keep_size: bool = ...,
            num_images: int = ...,
            seed: int | None = ...,
            sync_mode: bool = ...,
            enable_safety_checker: bool = ...,
            output_format: Literal["png", "jpeg"] = ...,
            true_cfg_scale: float = ...,
            style_scale: float = ...,
            content_long_side: int = ...,
        ) -> None: ...

    @property
    def content_image(self) -> ImageSource | None:
        """The first image, or None for style alone and text alone."""
        return self.image_urls[0] if self.image_urls else None

    @property
    def style_images(self) -> tuple[ImageSource, ...]:
        """The style references, in order."""
        return tuple(image for image in self.image_urls[1:] if image is not None)

    def resolved_size(self, content_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Width and height of the output, in pixels.

        Args:
            content_size: width and height of the upright content image as it was given; needed where ``keep_size`` is set.

        Returns:
            Multiples of 16.

        Raises:
            ImageError: ``keep_size`` with a shape one side of which would fall under 16 pixels.
            ValueError: ``keep_size`` without ``content_size``.
        """
        if not self.keep_size:
            size = self.image_size if isinstance(self.image_size, ImageSize) else preset_size(self.image_size)
            return size.on_grid()
        if content_size is None:
            raise ValueError("keep_size needs the content image's size, got None")
        output_long_side = 2 * self.defaults.content_long_side
        return keep_size(*content_size, long_side=self.content_long_side, output_long_side=output_long_side)

    def with_seed(self) -> GenerationRequest:
        """This request if it has a seed, otherwise a copy with one drawn from 1 to 2^31 - 1."""
        if self.seed is not None:
            return self
        return self.model_copy(update={"seed": 1 + secrets.randbelow(2**31 - 1)})

    def fitted_to(self, kind: type[GenerationRequest]) -> GenerationRequest:
        """What was set here under the limits of another model; what was not set takes that model's defaults.

        Args:
            kind: from ``request_model``.

        Returns:
            A request of that kind.

        Raises:
            pydantic.ValidationError: something is outside the other limits.
        """
        if type(self) is kind:
            return self
        return kind.model_validate({name: getattr(self, name) for name in self.model_fields_set})

    def parameters(self, *, seed: int, width: int, height: int) -> dict[str, object]:
        """What made the images, for their metadata: plain JSON, without the pictures.

        Args:
            seed: the one that was used.
            width: of the output.
            height: of the output.

        Returns:
            Names and values; those of an unused negative prompt are left out.
        """
        names = ["model", "prompt", "num_inference_steps", "guidance_scale", "num_images", "style_scale", "content_long_side"]
        names += ["negative_prompt", "true_cfg_scale"] if self.negative_prompt else []
        values: dict[str, object] = {name: getattr(self, name) for name in names}
        return values | {"seed": seed, "width": width, "height": height}

    def __eq__(self, other: object) -> bool:
        """Whether everything is the same, pictures by their contents; arrays would answer with one answer per pixel."""
        if not isinstance(other, GenerationRequest) or type(self) is not type(other):
            return NotImplemented
        pictures, others = self.image_urls, other.image_urls
        return (
            all(getattr(self, name) == getattr(other, name) for name in type(self).model_fields if name != "image_urls")
            and len(pictures) == len(others)
            and all(map(is_same_source, pictures, others))
        )

    def __repr_args__(self) -> Iterator[tuple[str | None, object]]:
        """Pictures in a few words instead of their bytes, data URIs and object addresses."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            yield (
                name,
                [None if image is None else describe_source(image) for image in value] if name == "image_urls" else value,
            )

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, data: object, handler: ModelWrapValidatorHandler[GenerationRequest]) -> GenerationRequest:
        """Take ``images`` for ``image_urls`` in Python, put errors into our words, and check what fields say together."""
        names = [*cls.model_fields, *([] if cls.wire else ["images"])]
        if isinstance(data, Mapping) and "images" in data and not cls.wire:
            if "image_urls" in data:
                raise refusal("images and image_urls are the same field; give one of them")
            data = {"image_urls" if name == "images" else name: value for name, value in data.items()}
        try:
            request = handler(data)
        except ValidationError as error:
            raise explained(error, cls, names) from None
        if request.keep_size and request.content_image is None:
            raise refusal("keep_size is true, but there is no content image (the first of image_urls) whose size could be kept")
        return request

    @field_validator("image_urls", mode="plain")
    @classmethod
    def _check_images(cls, value: object) -> tuple[ImageSource | None, ...]:
        return checked_images(value, wire=cls.wire)

    @field_validator("image_size", mode="plain")
    @classmethod
    def _check_size(cls, value: object) -> SizePreset | ImageSize:
        return checked_size(value, cls.limits)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema with this class's limits in it."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        properties["image_size"] |= cls.limits.json_schema()
        del properties["seed"]["default"]  # null is accepted, but the contract is: leave it out
        return schema


class _ConfiguredRequest(GenerationRequest):
    """A request of a class that was made by `request_model`; pickle finds the class by what it was made from."""

    def __reduce__(self) -> tuple[object, ...]:
        return _unfilled, (self.limits, self.defaults, self.wire), self.__getstate__()


def _unfilled(limits: SizeLimits, defaults: RequestDefaults, wire: bool) -> GenerationRequest:
    kind = _configured(limits, defaults, wire)
    return kind.__new__(kind)


def request_model(
    limits: SizeLimits = HOSTED_LIMITS, defaults: RequestDefaults = GenerationRequest.defaults, *, wire: bool = False
) -> type[GenerationRequest]:
    """The request class of one configuration, and of HTTP.

    Args:
        limits: which output sizes are accepted.
        defaults: what a request gets that does not say.
        wire: the hosted contract: ``model`` and ``image_urls`` are required, pictures are URLs or data URIs only.

    Returns:
        A subclass of ``GenerationRequest``, the same one for the same arguments; its JSON schema shows limits and defaults.

    Raises:
        ValueError: defaults outside the limits.
    """
    if not isinstance(limits, SizeLimits) or not isinstance(defaults, RequestDefaults) or not isinstance(wire, bool):
        found = ", ".join(type(value).__name__ for value in (limits, defaults, wire))
        raise ValueError(f"expected SizeLimits, RequestDefaults and True or False, got {found}")
    return _configured(limits, defaults, wire)


@cache
def _configured(limits: SizeLimits, defaults: RequestDefaults, wire: bool) -> type[GenerationRequest]:
    size = ImageSize(defaults.width, defaults.height)
    fields: dict[str, tuple[object, object]] = {
        "image_size": (Size, preset_of(size) or size),
        "num_inference_steps": (Steps, defaults.steps),
        "guidance_scale": (Guidance, defaults.guidance),
        "content_long_side": (ContentLongSide, defaults.content_long_side),
    }
    required: dict[str, object] = {"model": (ModelName, ...), "image_urls": (Images, ...), "seed": (HostedSeed, None)}
    kind: type[GenerationRequest] = create_model(  # type: ignore[call-overload]
        "GenerationRequest", __base__=_ConfiguredRequest, __module__=__name__, **fields, **(required if wire else {})
    )
    kind.limits, kind.defaults, kind.wire = limits, defaults, wire
    own = {name: size if name == "image_size" else default for name, (_, default) in fields.items()}
    try:
        kind.model_validate({"model": MODEL, "prompt": "", "image_urls": [], **own})
    except ValidationError as error:
        raise ValueError(f"defaults outside the limits: {'; '.join(validation_messages(error))}") from error
    return kind
