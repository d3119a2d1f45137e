"""LayerNorm without weights, then a shift and scale per sequence.

    y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale[sequence]) + shift[sequence]

Each element of x is read once and each of y written once; shift and scale are one row per sequence. Source: adaLN of DiT
(Peebles and Xie 2022), as in FLUX.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .ragged import TILE_ROWS


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layer_norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain PyTorch version of `layer_norm_modulate`, with the same arguments."""
    wide = wide_dtype(x.dtype)
    rows, width = x.shape
    normed = F.layer_norm(x.to(wide), (width,), eps=eps).view(-1, TILE_ROWS, width)
    tile_scale = 1 + scale.index_select(0, tile_sequence).to(wide)
    tile_shift = shift.index_select(0, tile_sequence).to(wide)
    return torch.addcmul(tile_shift[:, None], normed, tile_scale[:, None]).view(rows, width).to(x.dtype)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise every row of a packed tensor, then apply its sequence's shift and scale.

    Args:
        x: [T, C], rows contiguous.
        shift: [S, C], x's dtype; may be a strided view of a larger table.
        scale: [S, C], likewise.
        tile_sequence: int32 [T / TILE_ROWS], the sequence of each tile of rows.
        eps: added to the variance.

    Returns:
        [T, C] in x's dtype; sums are kept in float32.
    """
    return layer_norm_modulate_reference(x, shift, scale, tile_sequence, eps)
