"""From conditions to pictures: encode (cached), admit, denoise, decode. Knows nothing of requests, files or the network.

What it computes does not depend on autocast, default types and the like in the caller's process (`uso_engine.process_state`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from uso_kernels.attention import BackendUnavailable

from .conditioning.cache import ByteCache, CacheLimits, tensor_bytes
from .conditioning.cache_statistics import CacheStatistics
from .conditioning.content import Autoencoder
from .conditioning.style import StyleEncoder, StyleTokens, scale_style
from .conditioning.text import TextEmbedding, TextEncoders
from .conditioning.text_padding import MergedText
from .errors import BackendError
from .model.packing import PackedBatch
from .model.transformer import Observer, Transformer
from .offload.autoencoder_sizes import Cut
from .offload.placement import Placement, decoding_of, strips_of
from .parallel.leader import Leader
from .process_state import clean_process_state
from .sampling.admission import Conditions, admit
from .sampling.family import FAMILIES, Family
from .sampling.job import ImageJob
from .sampling.latents import starting_latents, token_grid
from .sampling.run import DenoisingRun
from .sampling.schedule import check_sigmas
from .sampling.settings import Denoised, DenoiseSettings
from .sampling.step import OnStep
from .weights.loaded import LoadedTransformer
from .weights.lora import LoRASet

if TYPE_CHECKING:
    from PIL.Image import Image

Present = TypeVar("Present")


class Pipeline:
    """The loaded parts of an engine.

    Args:
        loaded: the transformer with its weights.
        text: the prompt encoders, if there are any.
        style: the style encoder, if there is one.
        autoencoder: if there is one.
        limits: bounds of the caches.
        loras: names and strengths of the configured LoRAs.
        placement: what brings the parts to the GPU, where not all of them stay there; cached conditions then stay on the host.
        family: whose rules place content images and choose sigmas.
        others: the other processes that compute every step with this one.
    """

    def __init__(
        self,
        loaded: LoadedTransformer,
        *,
        text: TextEncoders | None = None,
        style: StyleEncoder | None = None,
        autoencoder: Autoencoder | None = None,
        limits: CacheLimits | None = None,
        loras: Sequence[tuple[str, float]] = (),
        placement: Placement | None = None,
        family: Family = FAMILIES["uso"],
        others: Leader | None = None,
    ) -> None:
        limits = limits if limits is not None else CacheLimits()
        self.loaded = loaded
        self.placement = placement
        self.family = family
        self.others = others
        self.transformer: Transformer = loaded.module
        self._configured_loras = tuple(loras)
        self.loras = self._configured_loras
        """Names and strengths of the LoRAs that are in the weights."""
        self._text, self._style, self._autoencoder = text, style, autoencoder
        self._prompts: ByteCache[TextEmbedding] = ByteCache(limits.prompt_bytes, lambda value: value.size_bytes)
        self._styles: ByteCache[StyleTokens] = ByteCache(limits.style_bytes, lambda value: value.size_bytes)
        self._contents: ByteCache[Tensor] = ByteCache(limits.content_bytes, tensor_bytes)

    @property
    def text(self) -> TextEncoders:
        """The prompt encoders; BackendError where this engine has none."""
        return _present(self._text, "text encoders ([t5] and [clip])")

    @property
    def style(self) -> StyleEncoder:
        """The style encoder; BackendError where this engine has none."""
        return _present(self._style, "style encoder ([vision] and [projector])")

    @property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder; BackendError where this engine has none."""
        return _present(self._autoencoder, "autoencoder ([autoencoder])")

    @clean_process_state()
    def encode_prompt(self, prompt: str) -> TextEmbedding:
        """Embed a prompt, or take it from the cache."""

        def encode() -> TextEmbedding:
            made = self.text.encode(prompt)
            return replace(made, tokens=self._kept(made.tokens), pooled=self._kept(made.pooled))

        return self._prompts.get_or_compute(self.text.hash_prompt(prompt), encode)

    @clean_process_state()
    def encode_style(self, image: Image | Tensor) -> StyleTokens:
        """Turn a style image (or its preprocessed pixels) into style tokens, or take them from the cache."""

        def encode() -> StyleTokens:
            made = self.style.encode(image)
            return replace(made, tokens=self._kept(made.tokens))

        return self._styles.get_or_compute(self.style.hash_source(image), encode)

    @clean_process_state()
    def encode_content(self, pixels: Tensor, *, sample_seed: int | None = None) -> Tensor:
        """Turn a content image's pixels [1, 3, h, w] into its latent [16, h / 8, w / 8], or take it from the cache."""
        key = self.autoencoder.hash_pixels(pixels, sample_seed)

        def encode() -> Tensor:
            return self._kept(self.autoencoder.encode(pixels, sample_seed=sample_seed))

        return self._contents.get_or_compute(key, encode)

    def cache_statistics(self) -> dict[str, CacheStatistics]:
        """Hits, misses and sizes of the prompt, style and content caches."""
        return {
            "prompt": self._prompts.statistics(),
            "style": self._styles.statistics(),
            "content": self._contents.statistics(),
        }

    @staticmethod
    def conditions(
        text: TextEmbedding,
        style: Sequence[StyleTokens] = (),
        content: Sequence[Tensor] = (),
        *,
        style_scale: float = 1.0,
        merged: MergedText | None = None,
    ) -> Conditions:
        """Put together what an image is to be like; `merged` is the text with fewer rows, where it is to have them."""
        tokens = tuple(scale_style(entry.tokens, style_scale) for entry in style)
        if merged is not None:
            return Conditions(merged.tokens, text.pooled, tokens, tuple(content), merged.merged)
        return Conditions(text.tokens, text.pooled, tokens, tuple(content))

    @clean_process_state()
    def denoise(
        self,
        conditions: Conditions,
        settings: DenoiseSettings,
        *,
        negative: Conditions | None = None,
        on_step: OnStep | None = None,
        observer: Observer | None = None,
    ) -> Denoised:
        """Make latents.

        Args:
            conditions: of every image; they differ only in their noise.
            settings: sizes, steps, seeds.
            negative: the same with the negative prompt's text; costs as much again.
            on_step: called after each step.
            observer: sees the intermediate tensors of the first step.

        Returns:
            One latent per seed.

        Raises:
            ValueError: sizes, sigmas or latents that do not fit.
            BackendError: the attention backend that was asked for cannot compute these sequences.
        """
        try:
            images = self.admit(conditions, settings, negative)
            run = DenoisingRun(self.transformer, images, reference_numerics=settings.reference_numerics)
            # Asked for before the first step: whether a backend takes a batch depends on its lengths.
            attention = self.attention_backends(run.batch)
            run.run(on_step, observer)
            return Denoised(torch.stack(run.latents()), run.index, run.index * run.tokens_per_step, attention)
        finally:
            if self.placement is not None:
                self.placement.end_denoising()

    def attention_backends(self, batch: PackedBatch) -> tuple[str, ...]:
        """The attention backends that compute a batch.

        Raises:
            BackendError: the one that was asked for cannot compute these sequences.
        """
        try:
            return self.transformer.attention_backends(batch)
        except BackendUnavailable as error:
            raise BackendError(str(error)) from error

    @clean_process_state()
    def admit(self, conditions: Conditions, settings: DenoiseSettings, negative: Conditions | None = None) -> list[ImageJob]:
        """Compute what no step changes, with the LoRAs that are in the weights now.

        Args:
            conditions: of every image; they differ only in their noise.
            settings: sizes, steps, seeds.
            negative: the same with the negative prompt's text.

        Returns:
            One image for each seed, to be denoised.

        Raises:
            ValueError: no seeds, or sizes, sigmas or latents that do not fit.
        """
        if not settings.seeds:
            raise ValueError("expected at least one seed, got none")
        sigmas = (
            self.family.counted_sigmas(settings.steps, settings.width, settings.height)
            if settings.sigmas is None
            else check_sigmas(settings.sigmas)
        )
        grid = token_grid(settings.width, settings.height)
        dtype = self.transformer.img_in.weight.dtype if settings.reference_numerics else torch.float32
        channels = self.transformer.params.latent_channels
        size = settings.width, settings.height
        starts = starting_latents(*size, settings.seeds, dtype, channels=channels, given=settings.latents)
        sequences = [
            admit(
                self.transformer,
                entry,
                grid,
                sigmas,
                settings.guidance,
                reference_numerics=settings.reference_numerics,
                position_offset=settings.position_offset,
                family=self.family,
            )
            for entry in ([conditions] if negative is None else [conditions, negative])
        ]
        against = None if negative is None else sequences[1]
        shared = tuple(sigmas), against, settings.true_cfg_scale, settings.sampler
        return [ImageJob(sequences[0], start, *shared) for start in starts]

    @clean_process_state()
    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents [n, 16, h / 8, w / 8] into pixels [n, 3, h, w] around -1..1."""
        return self.autoencoder.decode(latents, strips_of(self.decoding(latents), self.autoencoder))

    def decoding(self, latents: Tensor) -> Cut:
        """How `decode` does it: whole, or in strips, whose results differ by rounding."""
        return decoding_of(latents, self.autoencoder, self.placement)

    @clean_process_state()
    def set_loras(self, loras: LoRASet, *, keep_configured: bool = True) -> None:
        """Merge other LoRAs into the transformer, wherever its weights are."""
        try:
            self.loaded.set_loras(loras, keep_configured=keep_configured)
            kept = self._configured_loras if keep_configured else ()
            if self.others is not None:
                self.others.set_loras(loras, keep_configured=keep_configured)
            self.loras = (*kept, *((lora.name, strength) for lora, strength in loras))
        finally:
            # Also after a failure: the weights have then been computed back.
            if self.placement is not None:
                self.placement.take_over_weights()

    def close(self) -> None:
        """Let go of weight files, cached conditions and other processes."""
        if self.others is not None:
            self.others.close()
        self.loaded.close()
        if self.placement is not None:
            self.placement.close()
        self.clear_caches()

    def clear_caches(self) -> None:
        """Let go of cached conditions: the next request encodes everything that it names."""
        self._prompts.clear()
        self._styles.clear()
        self._contents.clear()

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor if self.placement is None else tensor.cpu()


def _present(part: Present | None, name: str) -> Present:
    if part is None:
        raise BackendError(f"this engine has no {name}: its configuration does not name one")
    return part
