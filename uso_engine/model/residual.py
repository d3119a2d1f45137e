"""Residual streams with the normalised form that the next layer reads: a gated addition and the next LayerNorm are one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from uso_kernels.gated_residual import gated_residual, gated_residual_layer_norm_modulate
from uso_kernels.layer_norm_modulate import layer_norm_modulate
from uso_kernels.operation import CallSite
from uso_kernels.rows import Rows


class NextNorm(NamedTuple):
    """The LayerNorm that follows: shift and scale [S, C], and the 8-bit type that its reader takes, None for floats."""

    shift: Tensor
    scale: Tensor
    dtype: torch.dtype | None


class Residual(NamedTuple):
    """A residual stream [T, C], and its normalised, modulated form for the layer that reads it next (x itself: none does)."""

    x: Tensor
    normed: Rows


def begin(x: Tensor, norm: NextNorm, tiles: Tensor) -> Residual:
    """A residual stream from its tokens."""
    return Residual(x, layer_norm_modulate(x, norm.shift, norm.scale, tiles, norm.dtype))


def proceed(x: Tensor, y: Tensor, gate: Tensor, tiles: Tensor, norm: NextNorm | None, call: CallSite) -> Residual:
    """A residual stream after the gated addition of y, with the LayerNorm that follows where one does.

    Args:
        x: [T, C], the stream.
        y: [T, C].
        gate: [S, C].
        tiles: the sequence of each tile of rows.
        norm: what follows, None where nothing does.
        call: of `gated_residual_into`, for this place.
    """
    if norm is None:
        total = gated_residual(x, y, gate, tiles, call=call)
        return Residual(total, total)
    shift, scale, dtype = norm
    return Residual(*gated_residual_layer_norm_modulate(x, y, gate, shift, scale, tiles, dtype, call=call))
