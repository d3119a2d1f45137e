"""One request on its way through a pipeline: images, conditions, latents, pixels, safety; timed stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import ImageOps
from PIL.Image import Resampling
from torch import Tensor

from .api.request import GenerationRequest
from .api.research import ResearchOptions
from .conditioning.style import StyleTokens
from .conditioning.text import TextEmbedding
from .imaging.open import ImageLimits, ImageSource, open_image
from .imaging.pixels import from_pixels, to_pixels
from .imaging.resize import resize_content
from .offload.sizes import RequestSize
from .pipeline import Denoised, DenoiseSettings, Pipeline
from .sampling.admission import Conditions
from .sampling.denoiser import OnStep
from .sampling.family import Family
from .sampling.schedule import check_sigmas
from .sampling.strength import last_steps, noised
from .sampling.watched_steps import WatchedSteps
from .stopwatch import Stopwatch

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


def with_reference_size(pipeline: Pipeline, request: GenerationRequest, options: ResearchOptions) -> GenerationRequest:
    """The request with the content long side that its model's family gives so many references; one that was set stays."""
    if "content_long_side" in request.model_fields_set:
        return request
    count, alone = int(request.content_image is not None) + len(options.content_images), request.content_long_side
    return request.model_copy(update={"content_long_side": pipeline.family.reference_long_side(count, alone)})


def open_pictures(
    pipeline: Pipeline, request: GenerationRequest, options: ResearchOptions, limits: ImageLimits, watch: Stopwatch
) -> tuple[Pictures, tuple[int, int]]:
    """Open and resize every input image of a request. Needs no model, so it needs no turn: a slow server holds up nobody else.

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
    with watch.stage("images", on_device=False):
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
    """The options with the contents of the files that they name. Needs no model, so it needs no turn.

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
    """

    conditions: Conditions
    negative: Conditions | None
    text: TextEmbedding
    negative_text: TextEmbedding | None
    saved_styles: tuple[StyleTokens, ...]


def encode_conditions(pipeline: Pipeline, request: GenerationRequest, options: ResearchOptions, pictures: Pictures) -> Encoded:
    """Encode text, style and content.

    Raises:
        BackendError: the engine lacks an encoder that the request needs.
    """
    saved_text, saved_styles = open_saved(pipeline, options)
    text = pipeline.encode_prompt(request.prompt) if saved_text is None else saved_text
    styles = [*(pipeline.encode_style(pixels) for pixels in pictures.styles), *saved_styles]
    contents = [pipeline.encode_content(to_pixels(image), sample_seed=options.posterior_seed) for image in pictures.contents]
    conditions = pipeline.conditions(text, styles, contents, style_scale=request.style_scale)
    negative = against = None
    # A scale of 1 is the prompt's velocity alone: the second sequence would be computed and multiplied by zero.
    if request.negative_prompt and request.true_cfg_scale != 1:
        against = pipeline.encode_prompt(request.negative_prompt)
        negative = pipeline.conditions(against, styles, contents, style_scale=request.style_scale)
    return Encoded(conditions, negative, text, against, saved_styles)


def denoise_settings(
    request: GenerationRequest,
    options: ResearchOptions,
    size: tuple[int, int],
    seeds: tuple[int, ...],
    family: Family,
    start: Tensor | None = None,
) -> DenoiseSettings:
    """The settings of a request's run; `start` is the latent of the picture that it starts from, if it does."""
    sigmas, latents = None if options.sigmas is None else tuple(options.sigmas), options.latents
    if start is not None and options.strength is not None:
        whole = family.sigmas(request.num_inference_steps, *size) if sigmas is None else check_sigmas(sigmas)
        sigmas = last_steps(whole, options.strength)
        latents = noised(start, sigmas[0], seeds)
    return DenoiseSettings(
        width=size[0],
        height=size[1],
        seeds=seeds,
        steps=request.num_inference_steps,
        guidance=request.guidance_scale,
        sigmas=sigmas,
        latents=latents,
        true_cfg_scale=request.true_cfg_scale,
        reference_numerics=options.reference_numerics,
        position_offset=options.position_offset,
    )


@dataclass(frozen=True)
class Generated:
    """What a run made, before the safety checker.

    Args:
        images: one per seed.
        denoised: the latents and what they cost.
        size: width and height in pixels.
        pictures: the opened input images.
        text: the prompt's embedding, which knows whether the prompt was cut.
        negative_text: the negative prompt's, if it was used.
        saved_styles: the style tokens that were handed in.
        loras: names and strengths of the LoRAs that were in the weights.
        latents_changed: whether `on_step` changed latents.
    """

    images: list[Image]
    denoised: Denoised
    size: tuple[int, int]
    pictures: Pictures
    text: TextEmbedding
    negative_text: TextEmbedding | None = None
    saved_styles: tuple[StyleTokens, ...] = ()
    loras: tuple[tuple[str, float], ...] = ()
    latents_changed: bool = False


def run(
    pipeline: Pipeline,
    request: GenerationRequest,
    options: ResearchOptions,
    pictures: Pictures,
    size: tuple[int, int],
    seeds: tuple[int, ...],
    watch: Stopwatch,
    *,
    on_step: OnStep | None,
) -> Generated:
    """Make a request's images."""
    if pipeline.placement is not None:
        pipeline.placement.require(request_size(pipeline, request, options, pictures, size))
    with watch.stage("encode"):
        encoded = encode_conditions(pipeline, request, options, pictures)
        start = None
        if pictures.start is not None:
            start = pipeline.encode_content(to_pixels(pictures.start), sample_seed=options.posterior_seed)
    steps = None if on_step is None else WatchedSteps(on_step)
    with watch.stage("denoise"):
        settings = denoise_settings(request, options, size, seeds, pipeline.family, start)
        denoised = pipeline.denoise(encoded.conditions, settings, negative=encoded.negative, on_step=steps)
    with watch.stage("decode"):
        images = from_pixels(pipeline.decode(denoised.latents))
    return Generated(
        images,
        denoised,
        size,
        pictures,
        encoded.text,
        negative_text=encoded.negative_text,
        saved_styles=encoded.saved_styles,
        loras=pipeline.loras,
        latents_changed=steps is not None and steps.changed,
    )


def request_size(
    pipeline: Pipeline, request: GenerationRequest, options: ResearchOptions, pictures: Pictures, size: tuple[int, int]
) -> RequestSize:
    """What a request asks of the memory."""
    assert pipeline.placement is not None
    usual = pipeline.placement.usual
    text, styles = open_saved(pipeline, options)
    tokens = usual.text_tokens if text is None else len(text.tokens)
    return replace(
        usual,
        text_tokens=tokens + sum(len(style.tokens) for style in styles),
        width=size[0],
        height=size[1],
        images=request.num_images,
        steps=request.num_inference_steps if options.sigmas is None else len(options.sigmas) - 1,
        contents=len(pictures.contents),
        content_side=request.content_long_side,
        start_pixels=0 if pictures.start is None else size[0] * size[1],
        styles=len(pictures.styles),
        negative=bool(request.negative_prompt) and request.true_cfg_scale != 1,
    )


def preview(pipeline: Pipeline, latent: Tensor, max_cells: int = 32) -> Image:
    """Decode a latent cheaply, at a fraction of its size.

    Args:
        pipeline: whose autoencoder decodes.
        latent: [16, h / 8, w / 8].
        max_cells: the latent is averaged down until no side has more cells than this.

    Returns:
        A small picture.
    """
    height, width = latent.shape[-2:]
    factor = max(1, -(-max(height, width) // max_cells))
    # Whole pairs of cells: the decoder wants an even latent as the transformer made it.
    cells = (max(2, height // factor // 2 * 2), max(2, width // factor // 2 * 2))
    small = latent[None].float() if factor == 1 else torch.nn.functional.adaptive_avg_pool2d(latent[None].float(), cells)
    return from_pixels(pipeline.decode(small))[0]
