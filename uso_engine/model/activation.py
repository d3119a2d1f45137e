"""What one layer hands to the next: floats, or rows already quantised to what the next matrix multiplies.

A quantised matrix says by its attribute ``quantized_input`` which 8-bit type it takes; the kernel that makes its input then
ends in that type, and the separate pass that would quantise it is saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from uso_kernels.gated_residual import (
    gated_residual,
    gated_residual_layer_norm_modulate,
    gated_residual_layer_norm_modulate_quantized,
)
from uso_kernels.gelu_concat import gelu_concat, gelu_concat_quantized
from uso_kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_quantized

from .workspace import Workspace


class QuantizedRows(NamedTuple):
    """Values [T, C] in 8 bits and their float32 row scales [T]."""

    values: Tensor
    scale: Tensor


Activation = Tensor | QuantizedRows


class Norm(NamedTuple):
    """The LayerNorm that follows: shift and scale [S, C], and the 8-bit type its reader takes, None for floats."""

    shift: Tensor
    scale: Tensor
    dtype: torch.dtype | None = None


class Stream(NamedTuple):
    """A residual stream [T, C] and what the next block reads: its normalised, modulated form (None where nothing follows)."""

    x: Tensor
    normed: Activation | None


def input_dtype(layer: nn.Module) -> torch.dtype | None:
    """The 8-bit type that a matrix takes in place of floats, None for floats only."""
    return getattr(layer, "quantized_input", None)


def norm(x: Tensor, following: Norm, tiles: Tensor, workspace: Workspace, name: str) -> Stream:
    """Start a stream: x and its normalised, modulated form, the latter in the buffer `name`."""
    if following.dtype is not None:
        values = layer_norm_modulate_quantized(x, following.shift, following.scale, tiles, following.dtype)
        return Stream(x, QuantizedRows(*values))
    out = workspace.take(f"{name}.normed", x.shape, x)
    return Stream(x, layer_norm_modulate(x, following.shift, following.scale, tiles, out=out))


def add_and_norm(
    x: Tensor, y: Tensor, gate: Tensor, tiles: Tensor, following: Norm | None, workspace: Workspace, name: str
) -> Stream:
    """Gated addition, together with the LayerNorm that follows it where one does; both results in buffers of `name`."""
    total = workspace.take(f"{name}.x", x.shape, x)
    if following is None:
        return Stream(gated_residual(x, y, gate, tiles, out=total), None)
    shift, scale, dtype = following
    if dtype is not None:
        total, rows = gated_residual_layer_norm_modulate_quantized(x, y, gate, shift, scale, tiles, dtype, out=total)
        return Stream(total, QuantizedRows(*rows))
    normed = workspace.take(f"{name}.normed", x.shape, x)
    return Stream(*gated_residual_layer_norm_modulate(x, y, gate, shift, scale, tiles, out=(total, normed)))


def activate(attended: Tensor | None, hidden: Tensor, reader: nn.Module, operand: Tensor | None = None) -> Activation:
    """GELU of an MLP's hidden layer beside attention's output, as the matrix that reads it takes it.

    Args:
        attended: [T, C], or None for the activation alone.
        hidden: [T, E].
        reader: the matrix.
        operand: [T, C + E], where floats go; `attended` may be its first columns.
    """
    dtype = input_dtype(reader)
    if dtype is not None:
        return QuantizedRows(*gelu_concat_quantized(attended, hidden, dtype))
    return gelu_concat(attended, hidden, out=operand)
