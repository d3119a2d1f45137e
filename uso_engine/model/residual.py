"""Residual streams with the normalised form that the next layer reads: a gated addition and the next LayerNorm are one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from uso_kernels.gated_residual import gated_residual, gated_residual_into
from uso_kernels.layer_norm_modulate import layer_norm_modulate
from uso_kernels.operation import CallSite
from uso_kernels.ragged import Ragged
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


Add = Callable[[Tensor, Tensor, Tensor, NextNorm | None], Residual]


def begin(x: Tensor, norm: NextNorm, tiles: Tensor) -> Residual:
    """A residual stream from its tokens."""
    return Residual(x, layer_norm_modulate(x, norm.shift, norm.scale, tiles, norm.dtype))


def prepare_addition(layout: Ragged) -> Add:
    """The gated addition of a layer's output at one place of a step, with the LayerNorm that follows where one does.

    Args:
        layout: of the stream.

    Returns:
        A function of the stream x [T, C], the output y [T, C], its gate [S, C] and the norm that follows, None where none does:
        x + gate y, and LayerNorm(x + gate y) (1 + scale) + shift.
    """
    tiles, call = layout.tile_sequence, CallSite(gated_residual_into)

    def add(x: Tensor, y: Tensor, gate: Tensor, norm: NextNorm | None) -> Residual:
        if norm is None:
            total, _ = gated_residual(x, y, gate, tiles, call=call)
            return Residual(total, total)
        total, normed = gated_residual(x, y, gate, tiles, norm[:2], norm.dtype, call=call)
        assert normed is not None
        return Residual(total, normed)

    return add
