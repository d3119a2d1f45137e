"""Rotary position tables and the position ids they come from.

A token has one position number per axis: (0, row, column) on the latent's 2x2-patch grid, and 0 on every further axis. Text and
style tokens stand at 0 on all of them.
Content images lie diagonally beyond the target and beyond each other ("d"), so that no two images share a place.
Source: FLUX.1's EmbedND; the offsets are USO's (inherited from UNO).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

PositionOffset = Literal["d", "h", "w", "o"]
POSITION_OFFSETS: tuple[PositionOffset, ...] = get_args(PositionOffset)
Grid = tuple[int, int]


def grid_positions(grid: Grid, offset: Grid = (0, 0), *, axes: int = 3) -> Tensor:
    """Position ids of a grid of tokens, row by row.

    Args:
        grid: rows and columns of 2x2 latent patches.
        offset: added to the row and column numbers.
        axes: position numbers per token.

    Returns:
        float32 [rows * columns, axes].
    """
    rows, columns = grid
    ids = torch.zeros(rows, columns, axes, dtype=torch.float32)
    ids[..., 1] = (torch.arange(rows) + offset[0])[:, None]
    ids[..., 2] = (torch.arange(columns) + offset[1])[None, :]
    return ids.view(-1, axes)


def content_positions(target: Grid, contents: Sequence[Grid], mode: PositionOffset = "d", *, axes: int = 3) -> list[Tensor]:
    """Position ids of content images, offset by the target's size and by all earlier content images.

    Args:
        target: rows and columns of the image being made.
        contents: rows and columns of each content image, in order.
        mode: which axes are offset: both ("d"), rows ("h"), columns ("w") or none ("o").
        axes: position numbers per token.

    Returns:
        One float32 [rows * columns, axes] per content image.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in POSITION_OFFSETS:
        raise ValueError(f"position offset must be one of {', '.join(map(repr, POSITION_OFFSETS))}, got {mode!r}")
    shift_rows, shift_columns = target
    ids = []
    for rows, columns in contents:
        offset = (shift_rows if mode in ("d", "h") else 0, shift_columns if mode in ("d", "w") else 0)
        ids.append(grid_positions((rows, columns), offset, axes=axes))
        shift_rows += rows
        shift_columns += columns
    return ids


def rope_tables(positions: Tensor, axes_dim: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's rotation angles.

    Args:
        positions: [L, axes].
        axes_dim: columns of a head turned by each axis; they add up to D.
        theta: base of the frequencies.

    Returns:
        cos and sin, float32 [L, D / 2] on the positions' device; angles are computed in float64, as the authors do.
    """
    angles = []
    for axis, width in enumerate(axes_dim):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        angles.append(positions[:, axis, None].to(torch.float64) * (1.0 / theta**exponent))
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()
