"""The inputs of a request: its images opened, which needs no model, and what the encoders make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageOps
from PIL.Image import Resampling
from torch import Tensor

from .api.request import GenerationRequest
from .api.research import ResearchOptions
from .conditioning.cache import tensor_bytes
from .conditioning.style import StyleTokens
from .conditioning.text import TextEmbedding
from .conditioning.text_padding import MergedText
from .imaging.open import ImageLimits, ImageSource, open_image
from .imaging.pixels import to_pixels
from .imaging.resize import resize_content
from .pipeline import Pipeline
from .sampling.admission import Conditions
from .sampling_settings import TextPadding

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Pictures:
    """The input images of a request, opened and resized: what of them the models take.

    Args:
        contents: RGB images at the request's content long side.
        styles: the style encoder's pixels, [1, 3, s, s] each.
        start: what the run starts from instead of noise, at the size of the output.
    """

    contents: tuple[Image, ...]
    styles: tuple[Tensor, ...]
    start: Image | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the opened images."""
        images = [*self.contents, *([] if self.start is None else [self.start])]
        return sum(3 * image.width * image.height for image in images) + sum(map(tensor_bytes, self.styles))


def with_reference_size(pipeline: Pipeline, request: GenerationRequest, options: ResearchOptions) -> GenerationRequest:
    """The request with the content long side that its model's family gives so many references; one that was set stays."""
    if "content_long_side" in request.model_fields_set:
        return request
    count, alone = int(request.content_image is not None) + len(options.content_images), request.content_long_side
    return request.model_copy(update={"content_long_side": pipeline.family.reference_long_side(count, alone)})


def open_pictures(
    pipeline: Pipeline, request: GenerationRequest, options: ResearchOptions, limits: ImageLimits
) -> tuple[Pictures, tuple[int, int]]:
    """Open and resize every input image of a request: a slow server holds up nobody else.

    Returns:
        The images, and width and height of the output, which may depend on the first.

    Raises:
        ImageError, FetchError, MissingFileError: an image that cannot be used, named by its place.
        BackendError: the engine lacks an encoder that the request needs.
    """

    def opened(source: ImageSource, name: str) -> Image:
        return open_image(source, limits=limits, name=name, alpha=options.alpha)

    contents = [] if request.content_image is None else [(request.content_image, "image_urls[0]")]
    contents += [(source, f"content_images[{i}]") for i, source in enumerate(options.content_images)]
    styles = [(source, f"image_urls[{i + 1}]") for i, source in enumerate(request.style_images)]
    styles += [(source, f"style_images[{i}]") for i, source in enumerate(options.style_images)]
    resized: list[Image] = []
    first: Image | None = None
    for source, name in contents:
        image = opened(source, name)
        first = image if first is None else first
        resized.append(resize_content(image, long_side=request.content_long_side))
    size = request.resolved_size(None if first is None else first.size)
    start = starting_picture(options, first, size)
    pixels = tuple(pipeline.style.preprocess(opened(source, name)) for source, name in styles)
    return Pictures(tuple(resized), pixels, start), size


def starting_picture(options: ResearchOptions, content: Image | None, size: tuple[int, int]) -> Image | None:
    """The content image at the output's size, scaled to cover it and cut at the centre; None where the run starts from noise.

    Raises:
        ValueError: a strength, and no content image.
    """
    if options.strength is None:
        return None
    if content is None:
        raise ValueError("research.strength starts from the content image, the first of images, but there is none")
    return ImageOps.fit(content, size, Resampling.LANCZOS)


def load_saved(pipeline: Pipeline, options: ResearchOptions) -> ResearchOptions:
    """The options with the contents of the files that they name.

    Raises:
        MissingFileError, CheckpointError: a file that is not there or does not fit the model.
    """
    text, styles = open_saved(pipeline, options)
    return replace(options, prompt_embedding=text, style_tokens=styles)


def open_saved(pipeline: Pipeline, options: ResearchOptions) -> tuple[TextEmbedding | None, tuple[StyleTokens, ...]]:
    """The prompt embedding and style tokens that were handed in, read from their files where they are paths.

    Raises:
        MissingFileError, CheckpointError: a file that is not there or does not fit the model.
    """
    params, text = pipeline.transformer.params, options.prompt_embedding
    if isinstance(text, str | Path):
        text = TextEmbedding.load(text, token_width=params.context_in_dim, pooled_width=params.vec_in_dim)
    styles = (
        StyleTokens.load(tokens, width=params.hidden_size) if isinstance(tokens, str | Path) else tokens
        for tokens in options.style_tokens
    )
    return text, tuple(styles)


@dataclass(frozen=True)
class Encoded:
    """What a request's inputs became.

    Args:
        conditions: of every image.
        negative: those of the negative prompt if it is used: same references, its text.
        text: the prompt's embedding, which knows whether the prompt was cut.
        negative_text: the negative prompt's, if it is used.
        saved_styles: the style tokens that were handed in.
        merged: both texts with their padding merged, where that was asked for.
    """

    conditions: Conditions
    negative: Conditions | None
    text: TextEmbedding
    negative_text: TextEmbedding | None
    saved_styles: tuple[StyleTokens, ...]
    merged: tuple[MergedText, ...] = ()


def encode_conditions(
    pipeline: Pipeline,
    request: GenerationRequest,
    options: ResearchOptions,
    pictures: Pictures,
    text_padding: TextPadding = "keep",
) -> Encoded:
    """Encode text, style and content.

    Raises:
        BackendError: the engine lacks an encoder that the request needs.
    """
    saved_text, saved_styles = open_saved(pipeline, options)
    text = pipeline.encode_prompt(request.prompt) if saved_text is None else saved_text
    styles = [*(pipeline.encode_style(pixels) for pixels in pictures.styles), *saved_styles]
    contents = [pipeline.encode_content(to_pixels(image), sample_seed=options.posterior_seed) for image in pictures.contents]
    scale, merges = request.style_scale, text_padding == "merge"
    merged = [text.merged()] if merges else []
    conditions = pipeline.conditions(text, styles, contents, style_scale=scale, merged=merged[0] if merges else None)
    negative = against = None
    # A scale of 1 is the prompt's velocity alone: the second sequence would be computed and multiplied by zero.
    if request.negative_prompt and request.true_cfg_scale != 1:
        against = pipeline.encode_prompt(request.negative_prompt)
        merged += [against.merged()] if merges else []
        negative = pipeline.conditions(against, styles, contents, style_scale=scale, merged=merged[1] if merges else None)
    return Encoded(conditions, negative, text, against, saved_styles, tuple(merged))
