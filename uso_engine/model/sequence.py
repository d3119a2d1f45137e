"""A sequence: one image being denoised, with everything that stays fixed while it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .keys import Merged
from .rope import Grid


@dataclass(frozen=True)
class Sequence:
    """The fixed part of one image: what its tokens look like and where they stand, but not its latent.

    Args:
        text: [L_txt, C], style tokens then text tokens, after ``txt_in``.
        content: [L_ref, C], tokens of all content images after ``img_in``; L_ref may be 0.
        grid: rows and columns of latent tokens of the image being made; L_img = rows * columns.
        cos: float32 [L_txt + L_img + L_ref, D / 2], rotary cosines in joint order: style, text, image, content.
        sin: likewise.
        modulation: [steps, vectors, C], see `uso_engine.model.modulation`; may be shared between sequences.
        merged: text rows that stand for several equal ones.

    Raises:
        ValueError: the parts do not fit together.
    """

    text: Tensor
    content: Tensor
    grid: Grid
    cos: Tensor
    sin: Tensor
    modulation: Tensor
    merged: Merged = ()

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise ValueError(f"an image needs at least one latent token per side, got a grid of {self.grid}")
        tokens = self.text_length + self.image_length + self.content_length
        if self.cos.shape[0] != tokens or self.sin.shape != self.cos.shape:
            raise ValueError(
                f"expected rotary tables for {tokens} tokens, got {tuple(self.cos.shape)} and {tuple(self.sin.shape)}"
            )
        widths = {self.text.shape[-1], self.content.shape[-1], self.modulation.shape[-1]}
        if len(widths) != 1:
            raise ValueError(f"text, content and modulation must have one width, got {sorted(widths)}")
        rows = [row for row, _ in self.merged]
        in_order = rows == sorted(set(rows)) and all(0 <= row < self.text_length for row in rows)
        if not in_order or any(count < 2 for _, count in self.merged):
            raise ValueError(
                f"merged rows must rise, be among the {self.text_length} of text and stand for 2 or more, got {self.merged}"
            )

    @property
    def text_length(self) -> int:
        """Style and text tokens."""
        return int(self.text.shape[0])

    @property
    def image_length(self) -> int:
        """Tokens of the image being made."""
        return self.grid[0] * self.grid[1]

    @property
    def content_length(self) -> int:
        """Tokens of the content images."""
        return int(self.content.shape[0])

    @property
    def length(self) -> int:
        """All tokens."""
        return self.text_length + self.image_length + self.content_length
