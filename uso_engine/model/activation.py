"""What one layer hands to the next: floats, or rows already quantised to what the next matrix multiplies.

A quantised matrix says by its attribute ``quantized_input`` which 8-bit type it takes; the kernel that makes its input then
ends in that type, and the separate pass that would quantise it is saved.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from uso_kernels.gated_residual import (
    gated_residual,
    gated_residual_layer_norm_modulate,
    gated_residual_layer_norm_modulate_quantized,
)
from uso_kernels.gelu_concat import gelu_concat, gelu_concat_quantized
from uso_kernels.layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_quantized
from uso_kernels.quantize_rows import lend_quantized
from uso_kernels.ragged import Ragged
from uso_kernels.scratch import Scratch

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


class Matrix(Protocol):
    """What `uso_engine.model.linear.Linear` and the quantised layers that replace it have in common."""

    out_features: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the results."""

    def __call__(self, x: Activation, outputs: slice, *, sequences: Ragged, out: Tensor, scratch: Scratch) -> Tensor:
        """Apply the selected columns of the layer."""


def input_dtype(layer: nn.Module) -> torch.dtype | None:
    """The 8-bit type that a matrix takes in place of floats, None for floats only."""
    return getattr(layer, "quantized_input", None)


def multiply(
    layer: nn.Module, x: Activation, sequences: Ragged, workspace: Workspace, name: str, outputs: slice = slice(None)
) -> Tensor:
    """Apply a matrix to every sequence by itself; the result goes to the memory `name`.

    Args:
        layer: a `Matrix`.
        x: [T, in_features].
        sequences: where the sequences lie in x.
        workspace: whose memory.
        name: of the memory.
        outputs: which output columns to compute.

    Returns:
        [T, selected out_features].
    """
    matrix = cast("Matrix", layer)
    rows, dtype = (x, x.dtype) if isinstance(x, Tensor) else (x.values, matrix.dtype)
    columns = len(range(*outputs.indices(matrix.out_features)))
    out = workspace.take(name, (rows.shape[0], columns), rows, dtype)
    return matrix(x, outputs, sequences=sequences, out=out, scratch=workspace.take)


def norm(x: Tensor, following: Norm, tiles: Tensor, workspace: Workspace, name: str) -> Stream:
    """Start a stream: x and its normalised, modulated form, the latter in the buffer `name`."""
    shift, scale, dtype = following
    if dtype is not None:
        rows = lend_quantized(workspace.take, f"{name}.normed", x.shape, x, dtype)
        return Stream(x, QuantizedRows(*layer_norm_modulate_quantized(x, shift, scale, tiles, dtype, out=rows)))
    out = workspace.take(f"{name}.normed", x.shape, x)
    return Stream(x, layer_norm_modulate(x, shift, scale, tiles, out=out))


def add_and_norm(
    x: Tensor, y: Tensor, gate: Tensor, tiles: Tensor, following: Norm | None, workspace: Workspace, name: str
) -> Stream:
    """Gated addition, together with the LayerNorm that follows it where one does; both results in buffers of `name`."""
    total = workspace.take(f"{name}.x", x.shape, x)
    if following is None:
        return Stream(gated_residual(x, y, gate, tiles, out=total), None)
    shift, scale, dtype = following
    if dtype is not None:
        out = total, lend_quantized(workspace.take, f"{name}.normed", x.shape, x, dtype)
        total, rows = gated_residual_layer_norm_modulate_quantized(x, y, gate, shift, scale, tiles, dtype, out=out)
        return Stream(total, QuantizedRows(*rows))
    normed = workspace.take(f"{name}.normed", x.shape, x)
    return Stream(*gated_residual_layer_norm_modulate(x, y, gate, shift, scale, tiles, out=(total, normed)))


def activate(
    attended: Tensor | None, hidden: Tensor, reader: nn.Module, workspace: Workspace, operand: Tensor | None = None
) -> Activation:
    """GELU of an MLP's hidden layer beside attention's output, as the matrix that reads it takes it.

    Args:
        attended: [T, C], or None for the activation alone.
        hidden: [T, E].
        reader: the matrix.
        workspace: lends quantised rows the memory `operand`.
        operand: [T, C + E], where floats go; `attended` may be its first columns.
    """
    dtype = input_dtype(reader)
    if dtype is not None:
        width = hidden.shape[1] + (0 if attended is None else attended.shape[1])
        rows = lend_quantized(workspace.take, "operand", (hidden.shape[0], width), hidden, dtype)
        return QuantizedRows(*gelu_concat_quantized(attended, hidden, dtype, out=rows))
    return gelu_concat(attended, hidden, out=operand)
