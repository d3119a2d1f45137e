"""What a request's run made, with what made it: from this its record is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .conditioning.style import StyleTokens
from .conditioning.text import TextEmbedding
from .conditioning.text_padding import MergedText
from .inputs import Pictures
from .loading.sampling_choice import ChosenSampling
from .sampling.settings import Denoised

if TYPE_CHECKING:
    from PIL.Image import Image


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
        sampling: how it got from noise to latents.
        merged: what became of the padding of the prompt, and of the negative one's if it was used; nothing where it was kept.
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
    sampling: ChosenSampling = field(default_factory=ChosenSampling)
    merged: tuple[MergedText, ...] = ()
