"""The numbers that shape a FLUX transformer with USO's additions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FamilyName = Literal["uso", "uno"]
"""The models around this transformer; `uso_engine.sampling.family` has what distinguishes them."""


@dataclass(frozen=True)
class TransformerParams:
    """Sizes of the transformer; the defaults are FLUX.1-dev's.

    Args:
        in_channels: width of one packed latent token (16 channels x 2 x 2 cells); a multiple of 4.
        vec_in_dim: width of the pooled CLIP embedding.
        context_in_dim: width of a T5 token.
        hidden_size: width C of the residual streams.
        mlp_ratio: E / C, E the width of the feed-forward layers.
        num_heads: attention heads H; the head dimension is D = C / H.
        depth: number of double blocks.
        depth_single_blocks: number of single blocks.
        axes_dim: rotary dimensions of each position axis; they add up to D and each is even. The second counts rows and the
            third columns, so there are at least three.
        theta: rotary base.
        qkv_bias: whether the double blocks' q/k/v projections have a bias.
        guidance_embed: whether the guidance scale is an input (FLUX.1-dev, Krea-dev) or not (schnell).

    Raises:
        ValueError: the sizes contradict each other.
    """

    in_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self) -> None:
        for name in ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "depth", "depth_single_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.in_channels % 4:
            raise ValueError(f"in_channels {self.in_channels} is not a multiple of 4, the cells that a token packs")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if len(self.axes_dim) < 3:
            raise ValueError(
                f"axes_dim {self.axes_dim} must have at least 3 axes: rows are counted on the second, columns on the third"
            )
        if sum(self.axes_dim) != self.head_dim:
            raise ValueError(f"axes_dim {self.axes_dim} must add up to the head dimension {self.head_dim}")
        if any(d % 2 for d in self.axes_dim):
            raise ValueError(f"axes_dim {self.axes_dim} must be even: rotary embeddings turn pairs")

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: a token is 2 x 2 of its cells."""
        return self.in_channels // 4

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mlp_width(self) -> int:
        """E, the width of the feed-forward layers."""
        return int(self.hidden_size * self.mlp_ratio)
