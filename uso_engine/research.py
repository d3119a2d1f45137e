"""What a researcher may change in a generation that no request schema offers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .imaging.open import ImageSource
from .imaging.rgb import Alpha

if TYPE_CHECKING:
    from torch import Tensor

    from .conditioning.style import StyleTokens
    from .conditioning.text import TextEmbedding


@dataclass(frozen=True)
class ResearchOptions:
    """Additions to a request, from Python only.

    Args:
        latents: [n, 16, h / 8, w / 8] to start from instead of noise; n is the request's number of images.
        sigmas: a schedule of one's own: steps + 1 strictly falling numbers between 1 and 0; the request's steps are not read.
        prompt_embedding: instead of encoding the request's prompt; a path is loaded.
        style_tokens: after the request's style images; paths are loaded.
        content_images: more content images after the request's.
        style_images: more style images after the request's.
        posterior_seed: draw content latents from the autoencoder's posterior with this seed instead of taking its mean.
        alpha: what becomes of transparent pixels in the pictures: "white" lays them on white, "drop" takes the colours stored
            beneath, as the authors do.
        reference_numerics: keep time, noise and latents in the model's dtype, as the authors do.
    """

    latents: Tensor | None = None
    sigmas: tuple[float, ...] | None = None
    prompt_embedding: TextEmbedding | str | Path | None = None
    style_tokens: tuple[StyleTokens | str | Path, ...] = ()
    content_images: tuple[ImageSource, ...] = ()
    style_images: tuple[ImageSource, ...] = ()
    posterior_seed: int | None = None
    alpha: Alpha = "white"
    reference_numerics: bool = False
