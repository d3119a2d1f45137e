"""Style projector: three depths of the vision tower become style tokens of the transformer's width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uso_engine.model.linear import Linear

LEVELS = ("high", "mid", "low")


class StyleProjector(nn.Module):
    """For each level: mix the patches into a few tokens, normalise their features, widen them to the transformer's C.

    Parameter names are the checkpoint's without its ``feature_embedder.`` prefix.

    Args:
        vision_tokens: patches P of the vision tower (729 for SigLIP so400m at 384 pixels).
        vision_width: width W of the vision tower (1152).
        style_tokens: tokens n that each of the three levels gives (64).
        hidden_size: width C of the transformer.
        device: where the parameters are made; usually ``meta``, for the loader to fill.
        dtype: of the parameters.
    """

    def __init__(
        self,
        vision_tokens: int,
        vision_width: int,
        style_tokens: int,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.vision_tokens = vision_tokens
        self.vision_width = vision_width
        self.style_tokens = style_tokens
        self.hidden_size = hidden_size
        for level in LEVELS:
            mix = nn.Sequential(Linear(vision_tokens, style_tokens, device=device, dtype=dtype), nn.SiLU())
            self.add_module(f"{level}_embedding_linear", mix)
            self.add_module(f"{level}_layer_norm", nn.LayerNorm(vision_width, device=device, dtype=dtype))
            self.add_module(f"{level}_projection", Linear(vision_width, hidden_size, device=device, dtype=dtype))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Project the hidden states of several images.

        Args:
            levels: hidden states -2, -11 and -20 of the vision tower, in that order, each [n, P, W]; any floating dtype, they
                are brought to the parameters' first.

        Returns:
            [n, 3 * style_tokens, C], the high level's tokens first.

        Raises:
            ValueError: not three levels, or a level of another shape.
        """
        if len(levels) != len(LEVELS):
            raise ValueError(f"expected {len(LEVELS)} levels of hidden states, got {len(levels)}")
        expected = (self.vision_tokens, self.vision_width)
        wrong = [f"{name} {tuple(x.shape)}" for name, x in zip(LEVELS, levels, strict=True) if tuple(x.shape[1:]) != expected]
        if wrong:
            raise ValueError(f"expected levels of shape [n, {expected[0]}, {expected[1]}], got {', '.join(wrong)}")
        return torch.cat([self._project(name, x) for name, x in zip(LEVELS, levels, strict=True)], dim=1)

    def _project(self, level: str, states: Tensor) -> Tensor:
        projection = self.get_submodule(f"{level}_projection")
        assert isinstance(projection, Linear)
        # The first layer mixes over patches, so features and patches change places around it.
        patches_last = states.to(projection.weight.dtype).transpose(1, 2)
        tokens: Tensor = self.get_submodule(f"{level}_embedding_linear")(patches_last).transpose(1, 2)
        projected: Tensor = projection(self.get_submodule(f"{level}_layer_norm")(tokens))
        return projected
