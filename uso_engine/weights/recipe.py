"""Seeded random weights: the recipe of the reference cases, also used for the embedded demonstration model.

A tensor's values depend on its key, its shape and a salt alone, so any part of a model can be drawn by itself.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from uso_engine.weights.files.tensor_source import RecipeSource

_NORM_ENDINGS = (
    ".scale",
    "norm.weight",
    "norm1.weight",
    "norm2.weight",
    "norm_out.weight",
    "layernorm.weight",
    "layer_norm1.weight",
    "layer_norm2.weight",
)


def draw(key: str, shape: Sequence[int], salt: str = "", dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw one weight tensor.

    Norm scales lie around 1 with deviation 0.1, matrices have deviation 1 / sqrt(fan-in), biases 0.02.

    Args:
        key: the tensor's name; with ``salt`` before it, its CRC-32 seeds the generator.
        shape: of the tensor.
        salt: text that makes another set of weights.
        dtype: what the float32 values are rounded to.

    Returns:
        The tensor, on the CPU.
    """
    generator = torch.Generator().manual_seed(zlib.crc32((salt + key).encode()))
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
    if key.endswith(_NORM_ENDINGS):
        values = 1 + 0.1 * values
    elif len(shape) >= 2:
        values = values / math.sqrt(math.prod(shape[1:]))
    else:
        values = 0.02 * values
    return values.to(dtype)


def recipe_source(
    shapes: Mapping[str, Sequence[int]], *, salt: str = "", dtype: torch.dtype = torch.float32, draw_prefix: str = ""
) -> RecipeSource:
    """Offer a whole set of drawn weights as a tensor source.

    Args:
        shapes: shape of every key.
        salt: see :func:`draw`.
        dtype: what the values are rounded to.
        draw_prefix: put before a key when its values are drawn, ``ae.`` for the autoencoder's.
    """

    def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
        return draw(draw_prefix + key, shape, salt)

    return RecipeSource(shapes, drawn, dtype=dtype, name=f"weights drawn by the recipe with salt {salt!r}")
