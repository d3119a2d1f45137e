"""Gated residual addition, alone or together with the LayerNorm and modulation that always follow it.

    x' = x + gate[sequence] * y            z = LayerNorm(x') * (1 + scale[sequence]) + shift[sequence]

Together: x and y read once, x' and z written once (4C elements per row instead of 6C apart), z as floats or quantised by rows.
z is made from x' as it is stored, rounded to x's dtype. Source: FLUX.1's blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Generation, Launch, generation_of, jit, needs_gradient, tl
from .layer_norm_modulate import (
    check_norm_operands,
    layer_norm_modulate_reference,
    norm_config,
    normalized_row,
    normalized_wide,
    store_row,
    wide_dtype,
)
from .operands import check_matrix, check_tiles, result_like
from .quantize_rows import LAUNCH_LIMITS, check_row_width, quantize_rows_reference, quantized_result
from .ragged import TILE_ROWS


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor, tile_sequence: Tensor) -> Tensor:
    """Plain PyTorch version of `gated_residual`, with the same arguments."""
    return _summed_wide(x, y, gate, tile_sequence).to(x.dtype)


def _summed_wide(x: Tensor, y: Tensor, gate: Tensor, tile_sequence: Tensor) -> Tensor:
    """The reference's result before it is rounded to x's dtype."""
    width, wide = x.shape[1], wide_dtype(x.dtype)
    tile_gate = gate.index_select(0, tile_sequence).to(wide)[:, None]
    tiles = y.reshape(-1, TILE_ROWS, width).to(wide) * tile_gate
    return tiles.add_(x.reshape(-1, TILE_ROWS, width)).view_as(x)


@jit
def _gated_residual_kernel(
    x_ptr,  # [T, width]
    x_stride,
    y_ptr,  # [T, width]
    y_stride,
    gate_ptr,  # [S, width]
    gate_stride,
    shift_ptr,  # [S, width], or None
    shift_stride,
    scale_ptr,  # [S, width], or None
    scale_stride,
    tile_sequence_ptr,  # [T / TILE] int32
    sum_ptr,  # [T, width]
    sum_stride,
    out_ptr,  # [T, width], or None
    out_stride,
    row_scale_ptr,  # [T] float32, or None
    width,
    eps,
    TILE: tl.constexpr,
    NORM: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    sequence = tl.load(tile_sequence_ptr + first // TILE).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    mask = columns < width
    gate = tl.load(gate_ptr + sequence * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        factor = 1.0 + tl.load(scale_ptr + sequence * scale_stride + columns, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + sequence * shift_stride + columns, mask=mask, other=0.0).to(tl.float32)
    for i in range(ROWS):
        row = first + i
        x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_stride + columns, mask=mask, other=0.0).to(tl.float32)
        summed = (x + gate * y).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * sum_stride + columns, summed, mask=mask)
        if NORM:
            values = normalized_row(summed.to(tl.float32), mask, width, eps) * factor + shift
            store_row(values, out_ptr, row_scale_ptr, row, out_stride, columns, mask, LIMIT)


def gated_residual_launch(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    tile_sequence: Tensor,
    eps: float,
    summed: Tensor,
    out: Tensor | None,
    row_scales: Tensor | None,
    generation: Generation,
) -> Launch:
    """Describe the launch that fills `summed`, and `out` if there is one, quantised if there are row scales."""
    config = norm_config(generation, x.shape[1])
    arguments = {
        "x_ptr": x,
        "x_stride": x.stride(0),
        "y_ptr": y,
        "y_stride": y.stride(0),
        "gate_ptr": gate,
        "gate_stride": gate.stride(0),
        "shift_ptr": shift,
        "shift_stride": 0 if shift is None else shift.stride(0),
        "scale_ptr": scale,
        "scale_stride": 0 if scale is None else scale.stride(0),
        "tile_sequence_ptr": tile_sequence,
        "sum_ptr": summed,
        "sum_stride": summed.stride(0),
        "out_ptr": out,
        "out_stride": 0 if out is None else out.stride(0),
        "row_scale_ptr": row_scales,
        "width": x.shape[1],
        "eps": eps,
        "TILE": TILE_ROWS,
        "NORM": out is not None,
        "LIMIT": 0.0 if out is None or row_scales is None else LAUNCH_LIMITS[out.dtype],
    }
    grid = (x.shape[0] // config.blocks["ROWS"],)
    return Launch("gated_residual", _gated_residual_kernel, grid, arguments, config)


def _launch(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    tile_sequence: Tensor,
    eps: float,
    summed: Tensor,
    out: Tensor | None,
    row_scales: Tensor | None,
) -> None:
    generation = generation_of(x)
    gated_residual_launch(x, y, gate, shift, scale, tile_sequence, eps, summed, out, row_scales, generation).run()


@torch.library.custom_op("uso_kernels::gated_residual", mutates_args=("summed", "out", "row_scales"))
def gated_residual_op(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    tile_sequence: Tensor,
    eps: float,
    summed: Tensor,
    out: Tensor | None,
    row_scales: Tensor | None,
) -> None:
    """Fill `summed`, and `out` and the row scales if there are any."""
    summed.copy_(_summed_wide(x, y, gate, tile_sequence))
    if out is None or shift is None or scale is None:
        return
    values = normalized_wide(summed, shift, scale, tile_sequence, eps)
    if row_scales is None:
        out.copy_(values)
    else:
        quantized_values, scales = quantize_rows_reference(values, out.dtype)
        out.copy_(quantized_values)
        row_scales.copy_(scales)


gated_residual_op.register_kernel("cuda")(_launch)


@gated_residual_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    tile_sequence: Tensor,
    eps: float,
    summed: Tensor,
    out: Tensor | None,
    row_scales: Tensor | None,
) -> None:
    pass


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, tile_sequence: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Add a block's gated output to its input.

    Args:
        x: [T, C], the residual stream.
        y: [T, C], the block's output.
        gate: [S, C], may be a strided view.
        tile_sequence: int32 [T / TILE_ROWS].
        out: [T, C], where the sum goes; may be x itself.

    Returns:
        [T, C], x + gate * y in x's dtype, summed in float32.

    Raises:
        ValueError: operands that do not fit together.
    """
    if needs_gradient(x, y, gate):
        return gated_residual_reference(x, y, gate, tile_sequence)
    _check_operands(x, y, gate, tile_sequence)
    out = result_like(x, out)
    gated_residual_op(x, y, gate, None, None, tile_sequence, 0.0, out, None, None)
    return out


def gated_residual_layer_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    tile_sequence: Tensor,
    eps: float = 1e-6,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a block's gated output, then normalise and modulate the sum for the next one.

    Args:
        x: [T, C], the residual stream.
        y: [T, C], the block's output.
        gate: [S, C], of this block.
        shift: [S, C], of the next normalisation.
        scale: [S, C], of the next normalisation.
        tile_sequence: int32 [T / TILE_ROWS].
        eps: added to the variance.
        out: where both results go, [T, C] each; the first may be x itself.

    Returns:
        The new residual stream and its normalised, modulated form, both [T, C] in x's dtype.

    Raises:
        ValueError: operands that do not fit together.
    """
    if needs_gradient(x, y, gate, shift, scale):
        total = gated_residual_reference(x, y, gate, tile_sequence)
        return total, layer_norm_modulate_reference(total, shift, scale, tile_sequence, eps)
    _check_operands(x, y, gate, tile_sequence)
    check_norm_operands(x, shift, scale, tile_sequence)
    summed, normed = (result_like(x, None if out is None else target) for target in (out or (None, None)))
    gated_residual_op(x, y, gate, shift, scale, tile_sequence, eps, summed, normed, None)
    return summed, normed


def gated_residual_layer_norm_modulate_quantized(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    tile_sequence: Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    *,
    out: tuple[Tensor, tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`gated_residual_layer_norm_modulate` whose second result is quantised by rows, without being rounded to x's dtype first.

    Args:
        x: [T, C], the residual stream.
        y: [T, C], the block's output.
        gate: [S, C], of this block.
        shift: [S, C], of the next normalisation.
        scale: [S, C], of the next normalisation.
        tile_sequence: int32 [T / TILE_ROWS].
        dtype: `torch.float8_e4m3fn` or `torch.int8`.
        eps: added to the variance.
        out: where the results go: the sum, [T, C], which may be x itself; values and row scales.

    Returns:
        The new residual stream, and values [T, C] with row scales [T] as `uso_kernels.quantize_rows.quantize_rows` gives them.

    Raises:
        ValueError: operands that do not fit together.
    """
    _check_operands(x, y, gate, tile_sequence)
    check_norm_operands(x, shift, scale, tile_sequence)
    total, rows = out or (None, None)
    summed = result_like(x, total)
    values, row_scales = quantized_result(x.shape[0], x.shape[1], dtype, x.device, rows)
    gated_residual_op(x, y, gate, shift, scale, tile_sequence, eps, summed, values, row_scales)
    return summed, (values, row_scales)


def _check_operands(x: Tensor, y: Tensor, gate: Tensor, tile_sequence: Tensor) -> None:
    check_matrix("x", x)
    check_row_width(x.shape[1])
    check_matrix("y", y, width=x.shape[1], like=x)
    check_matrix("gate", gate, width=x.shape[1], like=x)
    if y.shape != x.shape:
        raise ValueError(f"y must be {tuple(x.shape)} like x, got {tuple(y.shape)}")
    check_tiles(tile_sequence, x.shape[0], x.device)
