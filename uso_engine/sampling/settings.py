"""How to get from noise to latents, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from uso_engine.model.rope import PositionOffset

from .sampler import SamplerName


@dataclass(frozen=True)
class DenoiseSettings:
    """How to get from noise to latents.

    Args:
        width: of the images, in pixels, a multiple of 16.
        height: likewise.
        steps: denoising steps; not read where `sigmas` are given.
        guidance: guidance scale.
        seeds: one per image; image j's noise is drawn from seeds[j].
        sigmas: a schedule of one's own, falling, steps + 1 numbers; None for the authors'.
        latents: starting latents [n, latent channels, h / 8, w / 8] instead of noise.
        true_cfg_scale: weight of the prompt against the negative prompt.
        reference_numerics: keep time, noise and latents in the model's dtype, as the authors do.
        position_offset: how content images are placed; None for what the family was trained with.
        sampler: what makes a step of the velocity.
    """

    width: int
    height: int
    seeds: tuple[int, ...]
    steps: int = 28
    guidance: float = 4.0
    sigmas: tuple[float, ...] | None = None
    latents: Tensor | None = field(default=None, repr=False)
    true_cfg_scale: float = 2.0
    reference_numerics: bool = False
    position_offset: PositionOffset | None = None
    sampler: SamplerName = "euler"


@dataclass(frozen=True)
class Denoised:
    """What came out of a run.

    Args:
        latents: [n, latent channels, h / 8, w / 8], float32.
        steps: steps taken (fewer than asked for where `on_step` stopped it).
        tokens: transformer tokens, summed over the steps taken.
        attention: the attention backends that computed it.
    """

    latents: Tensor
    steps: int
    tokens: int
    attention: tuple[str, ...]
