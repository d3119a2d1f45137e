"""Noise, and the two shapes of a latent: an image [16, h / 8, w / 8] and packed tokens [L, 64]."""

from __future__ import annotations

import torch
from torch import Tensor

from uso_engine.model.rope import Grid

from .noise import draw_normal

LATENT_CHANNELS = 16
PIXELS_PER_TOKEN = 16


def token_grid(width: int, height: int) -> Grid:
    """Rows and columns of latent tokens of an image; each token is 16 x 16 pixels.

    Raises:
        ValueError: a side that is not a positive multiple of 16.
    """
    if width < PIXELS_PER_TOKEN or height < PIXELS_PER_TOKEN or width % PIXELS_PER_TOKEN or height % PIXELS_PER_TOKEN:
        raise ValueError(f"width and height must be positive multiples of {PIXELS_PER_TOKEN}, got {width}x{height}")
    return height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN


def draw_noise(width: int, height: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw the starting latent of one image.

    Drawn in float32 on the CPU whatever the device, so that a seed means the same image everywhere.

    Args:
        width: in pixels, a multiple of 16.
        height: in pixels, a multiple of 16.
        seed: see `uso_engine.sampling.noise`.
        dtype: the result is rounded to it.

    Returns:
        [16, height / 8, width / 8] on the CPU.
    """
    rows, columns = token_grid(width, height)
    return draw_normal((LATENT_CHANNELS, 2 * rows, 2 * columns), seed).to(dtype)


def pack_latent(latent: Tensor) -> Tensor:
    """Turn [..., 16, 2 * rows, 2 * columns] into tokens [..., rows * columns, 64], 2 x 2 patches, channels first.

    Raises:
        ValueError: an odd height or width.
    """
    *lead, channels, height, width = latent.shape
    if height % 2 or width % 2:
        raise ValueError(f"a latent must have even height and width to be packed in 2x2 patches, got {height}x{width}")
    patches = latent.reshape(*lead, channels, height // 2, 2, width // 2, 2)
    order = (*range(len(lead)), *(len(lead) + axis for axis in (1, 3, 0, 2, 4)))
    return patches.permute(order).reshape(*lead, (height // 2) * (width // 2), channels * 4)


def unpack_latent(tokens: Tensor, grid: Grid) -> Tensor:
    """Turn tokens [..., rows * columns, 64] back into [..., 16, 2 * rows, 2 * columns].

    Raises:
        ValueError: the number of tokens is not that of the grid.
    """
    *lead, length, width = tokens.shape
    rows, columns = grid
    if length != rows * columns:
        raise ValueError(f"a grid of {rows}x{columns} has {rows * columns} tokens, got {length}")
    patches = tokens.reshape(*lead, rows, columns, width // 4, 2, 2)
    order = (*range(len(lead)), *(len(lead) + axis for axis in (2, 0, 3, 1, 4)))
    return patches.permute(order).reshape(*lead, width // 4, 2 * rows, 2 * columns)
