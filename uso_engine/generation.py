"""The stages of one request: opened, encoded, admitted, denoised by whoever schedules it, decoded, screened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .api.fields import image_seeds
from .api.request import GenerationRequest
from .api.research import ResearchOptions
from .api.result import GenerationResult
from .conditioning.cache import tensor_bytes
from .conditioning.style import StyleTokens
from .conditioning.text import TextEmbedding
from .conditioning.text_padding import check_padding
from .config import EngineConfig
from .generated import Generated
from .imaging.open import ImageLimits
from .imaging.pixels import from_pixels, to_pixels
from .inputs import Encoded, Pictures, encode_conditions, load_saved, open_pictures, with_reference_size
from .loading.lora_choice import ChosenLoRAs
from .loading.sampling_choice import choose_sampling
from .offload.budget import usual_request_size
from .offload.sizes import RequestSize
from .pipeline import Pipeline
from .process_state import clean_process_state
from .provenance import result_of
from .sampling.job import ImageJob, Job
from .sampling.settings import Denoised, DenoiseSettings
from .sampling.step import Step
from .sampling.strength import noised
from .sampling.watched_steps import WatchedSteps
from .sampling_settings import QualityName
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from PIL.Image import Image

    from .safety.checker import SafetyChecker

PREVIEW_CELLS = 32


@dataclass(frozen=True)
class LoadedParts:
    """What requests are made with.

    Args:
        config: of the engine.
        pipeline: its models.
        safety: its safety checker, if it has one.
        device: where they run.
        image_limits: what is accepted as an input image, and from where.
    """

    config: EngineConfig
    pipeline: Pipeline
    safety: SafetyChecker | None
    device: torch.device
    image_limits: ImageLimits


class Generation:
    """One request and what became of it so far. Its stages are called once each, in the order in which they stand here.

    Args:
        parts: what it is made with.
        request: within the engine's limits, with its seed.
        options: of the request.
        loras: what has to be in the weights; None for what the engine has.
        quality: the configuration's point that it asks for; the request has its steps already.

    Raises:
        ValueError: options of sampling that exclude each other.
    """

    def __init__(
        self,
        parts: LoadedParts,
        request: GenerationRequest,
        options: ResearchOptions,
        loras: ChosenLoRAs | None = None,
        *,
        quality: QualityName = "reference",
    ) -> None:
        assert request.seed is not None
        self.parts, self.request, self.options, self.loras = parts, request, options, loras
        self.sampling = choose_sampling(parts.config, options, quality)
        self.watch = Stopwatch(parts.device)
        self.seeds = image_seeds(request.seed, request.num_images)
        self.watched: WatchedSteps | None = None
        """What the caller's `on_step` goes through, if there is one."""
        self._pictures = Pictures((), ())
        self._size = (0, 0)
        self._sigmas: tuple[float, ...] = ()
        self._encoded: Encoded | None = None
        self._start: Tensor | None = None
        self._loras_used: tuple[tuple[str, float], ...] = ()

    def open(self) -> None:
        """Open everything that the request names; needs no model, so a slow server holds up nobody else.

        Raises:
            ImageError, FetchError, MissingFileError, CheckpointError: an input that cannot be used, named by its place.
            BackendError: the engine lacks an encoder that the request needs.
            MemoryBudgetError: it needs more than the memory that was set as a budget.
            ValueError: sigmas or a strength that do not fit, or that the sampler cannot take; padding to be merged that is not
                known.
        """
        pipeline = self.parts.pipeline
        with self.watch.stage("images", on_device=False):
            self.options = load_saved(pipeline, self.options)
            saved = self.options.prompt_embedding
            if self.sampling.text_padding == "merge" and isinstance(saved, TextEmbedding):
                check_padding(saved.padding)
            self.request = with_reference_size(pipeline, self.request, self.options)
            self._pictures, self._size = open_pictures(pipeline, self.request, self.options, self.parts.image_limits)
            with clean_process_state():
                self._sigmas = self.sampling.schedule(self.request.num_inference_steps, self._size, pipeline.family)
        if pipeline.placement is not None:
            pipeline.placement.require(self.size())

    @property
    def steps(self) -> int:
        """Denoising steps that it takes."""
        return len(self._sigmas) - 1

    @property
    def size_bytes(self) -> int:
        """Bytes of the opened images and of latents that were given."""
        given = self.options.latents
        return self._pictures.size_bytes + (0 if given is None else tensor_bytes(given))

    def size(self) -> RequestSize:
        """What it asks of the memory and of a step."""
        request, options, pictures = self.request, self.options, self._pictures
        usual = usual_request_size(self.parts.config)
        text = options.prompt_embedding
        tokens = len(text.tokens) if isinstance(text, TextEmbedding) else usual.text_tokens
        saved = sum(len(style.tokens) for style in options.style_tokens if isinstance(style, StyleTokens))
        return replace(
            usual,
            text_tokens=tokens + saved,
            width=self._size[0],
            height=self._size[1],
            images=request.num_images,
            steps=self.steps,
            contents=len(pictures.contents),
            content_side=request.content_long_side,
            start_pixels=0 if pictures.start is None else self._size[0] * self._size[1],
            styles=len(pictures.styles),
            negative=bool(request.negative_prompt) and request.true_cfg_scale != 1,
        )

    @clean_process_state()
    def encode(self) -> None:
        """Encode text, style and content.

        Raises:
            PromptError: a prompt that cannot be encoded.
            BackendError: the engine lacks an encoder that the request needs.
        """
        pipeline, options = self.parts.pipeline, self.options
        with self.watch.stage("encode"):
            text_padding = self.sampling.text_padding
            self._encoded = encode_conditions(pipeline, self.request, options, self._pictures, text_padding)
            if self._pictures.start is not None:
                self._start = pipeline.encode_content(to_pixels(self._pictures.start), sample_seed=options.posterior_seed)

    def admit(self) -> list[ImageJob]:
        """Compute what no step changes, with the LoRAs that are in the weights now.

        Raises:
            ValueError: latents or sigmas that do not fit.
        """
        assert self._encoded is not None
        pipeline, options = self.parts.pipeline, self.options
        self._loras_used = pipeline.loras
        latents = options.latents
        if self._start is not None:
            latents = noised(self._start, self._sigmas[0], self.seeds)
        settings = DenoiseSettings(
            width=self._size[0],
            height=self._size[1],
            seeds=self.seeds,
            guidance=self.request.guidance_scale,
            sigmas=self._sigmas,
            latents=latents,
            true_cfg_scale=self.request.true_cfg_scale,
            reference_numerics=options.reference_numerics,
            position_offset=options.position_offset,
            sampler=self.sampling.sampler,
        )
        return pipeline.admit(self._encoded.conditions, settings, self._encoded.negative)

    @clean_process_state()
    def finish(self, jobs: Sequence[Job], attention: tuple[str, ...]) -> GenerationResult:
        """Decode the latents and let the safety checker see the images.

        Args:
            jobs: the images after their last step.
            attention: the backends that computed them.

        Raises:
            SafetyError: the safety checker was asked for and could not run; the images are withheld.
            ValueError: latents that are not numbers.
        """
        steps = jobs[0].index
        tokens = steps * sum(job.image.tokens for job in jobs)
        denoised = Denoised(torch.stack([job.unpacked() for job in jobs]), steps, tokens, attention)
        pipeline, safety = self.parts.pipeline, self.parts.safety
        with self.watch.stage("decode"):
            pixels = pipeline.decode(denoised.latents)
            images = from_pixels(pixels, latents=denoised.latents, tier=pipeline.loaded.tier)
        made = self._generated(denoised, images)
        flags = (False,) * len(images)
        if self.request.enable_safety_checker and safety is not None:
            with self.watch.stage("safety"):
                images, flags = safety.screen(images)
        return result_of(
            self.parts.config,
            pipeline,
            self.request,
            self.options,
            made,
            seeds=self.seeds,
            images=images,
            flags=flags,
            seconds=self.watch.seconds(),
        )

    def preview(self, step: Step) -> Image:
        """Where the first image is heading, small."""
        return preview(self.parts.pipeline, step.estimated_clean(0))

    def release(self) -> None:
        """Let go of pictures and tensors; nothing of it can be computed afterwards."""
        self._pictures, self._encoded, self._start, self.watched = Pictures((), ()), None, None, None
        self.options = ResearchOptions()

    def _generated(self, denoised: Denoised, images: list[Image]) -> Generated:
        assert self._encoded is not None
        return Generated(
            images,
            denoised,
            self._size,
            self._pictures,
            self._encoded.text,
            negative_text=self._encoded.negative_text,
            saved_styles=self._encoded.saved_styles,
            loras=self._loras_used,
            latents_changed=self.watched is not None and self.watched.changed,
            sampling=self.sampling,
            merged=self._encoded.merged,
        )


@clean_process_state()
def preview(pipeline: Pipeline, latent: Tensor) -> Image:
    """Decode a latent cheaply, at a fraction of its size.

    Args:
        pipeline: whose autoencoder decodes.
        latent: [16, h / 8, w / 8]; it is averaged down until no side has more than `PREVIEW_CELLS` cells.

    Returns:
        A small picture.
    """
    height, width = latent.shape[-2:]
    factor = max(1, -(-max(height, width) // PREVIEW_CELLS))
    # Whole pairs of cells: the decoder wants an even latent as the transformer made it.
    cells = (max(2, height // factor // 2 * 2), max(2, width // factor // 2 * 2))
    small = latent[None].float() if factor == 1 else torch.nn.functional.adaptive_avg_pool2d(latent[None].float(), cells)
    return from_pixels(pipeline.decode(small))[0]
