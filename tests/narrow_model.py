"""The narrowest transformer with a layer of every kind: for tests of files and weights, in which nothing is computed."""

from __future__ import annotations

from torch import Tensor

from uso_engine.model.params import TransformerParams
from uso_engine.weights.model_shapes import transformer_shapes
from uso_engine.weights.recipe import draw

NARROW = TransformerParams(
    in_channels=8,
    vec_in_dim=12,
    context_in_dim=20,
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
)


def drawn_weights(params: TransformerParams) -> dict[str, Tensor]:
    """The reference recipe's weights under canonical keys."""
    return {key: draw(key, shape) for key, shape in transformer_shapes(params).items()}
