"""LayerNorm without weights, then a shift and scale per sequence; the result as floats or quantised by rows.

    y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale[sequence]) + shift[sequence]

Each element of x is read once and each of y written once (one byte and a scale per row when quantised); shift and scale are one
row per sequence. Source: adaLN of DiT (Peebles and Xie 2022), as in FLUX.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import Config, Generation, Launch, generation_of, jit, needs_gradient, power_of_two, tl
from .operands import check_matrix, check_tiles, result_like
from .quantize_rows import LAUNCH_LIMITS, check_row_width, quantize_rows_reference, quantized, quantized_result, row_amax
from .ragged import TILE_ROWS


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalized_wide(x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor, eps: float) -> Tensor:
    """The reference's result before it is rounded to x's dtype."""
    wide = wide_dtype(x.dtype)
    rows, width = x.shape
    normed = F.layer_norm(x.to(wide), (width,), eps=eps).view(-1, TILE_ROWS, width)
    tile_scale = 1 + scale.index_select(0, tile_sequence).to(wide)
    tile_shift = shift.index_select(0, tile_sequence).to(wide)
    return torch.addcmul(tile_shift[:, None], normed, tile_scale[:, None]).view(rows, width)


def layer_norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor, eps: float = 1e-6) -> Tensor:
    """Plain PyTorch version of `layer_norm_modulate`, with the same arguments."""
    return normalized_wide(x, shift, scale, tile_sequence, eps).to(x.dtype)


@jit
def normalized_row(values, mask, width, eps):
    """One row of float32 values, zero outside the mask, to mean 0 and variance 1."""
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(mask, values - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    return centred * (1.0 / tl.sqrt_rn(variance + eps))


@jit
def store_row(values, out_ptr, row_scale_ptr, row, stride, columns, mask, LIMIT: tl.constexpr):
    """Write one row of float32 values as they are (LIMIT 0) or quantised with its scale."""
    if LIMIT > 0:
        amax = row_amax(tl.where(mask, values, 0.0))
        tl.store(row_scale_ptr + row, tl.div_rn(amax, LIMIT))
        result = quantized(values, tl.div_rn(LIMIT, amax), LIMIT, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * stride + columns, result, mask=mask)
    else:
        tl.store(out_ptr + row * stride + columns, values.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _layer_norm_modulate_kernel(
    x_ptr,  # [T, width]
    x_stride,
    shift_ptr,  # [S, width]
    shift_stride,
    scale_ptr,  # [S, width]
    scale_stride,
    tile_sequence_ptr,  # [T / TILE] int32
    out_ptr,  # [T, width]
    out_stride,
    row_scale_ptr,  # [T] float32, or None
    width,
    eps,
    TILE: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    sequence = tl.load(tile_sequence_ptr + first // TILE).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    mask = columns < width
    factor = 1.0 + tl.load(scale_ptr + sequence * scale_stride + columns, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + sequence * shift_stride + columns, mask=mask, other=0.0).to(tl.float32)
    for i in range(ROWS):
        row = first + i
        values = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        values = normalized_row(values, mask, width, eps) * factor + shift
        store_row(values, out_ptr, row_scale_ptr, row, out_stride, columns, mask, LIMIT)


NORM_CONFIGS = {1024: (2, 4), 2048: (4, 4), 4096: (8, 4), 8192: (8, 2), 16384: (32, 1)}
"""Warps, and rows a program takes one after another with one load of shift and scale, by the power of two that holds a row, on
every generation: 16 to 32 numbers of a row a thread. Reasoned and compiled without spills, not yet measured."""


def norm_config(generation: Generation, width: int) -> Config:
    """Configuration of the normalising kernels for rows of `width` numbers."""
    block = power_of_two(width)
    num_warps, rows = NORM_CONFIGS.get(block, (1, 4))
    return Config(num_warps=num_warps, num_stages=1, blocks={"BLOCK_C": block, "ROWS": rows})


def layer_norm_modulate_launch(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    tile_sequence: Tensor,
    eps: float,
    out: Tensor,
    row_scales: Tensor | None,
    generation: Generation,
) -> Launch:
    """Describe the launch that fills `out`, quantised if there are row scales."""
    config = norm_config(generation, x.shape[1])
    arguments = {
        "x_ptr": x,
        "x_stride": x.stride(0),
        "shift_ptr": shift,
        "shift_stride": shift.stride(0),
        "scale_ptr": scale,
        "scale_stride": scale.stride(0),
        "tile_sequence_ptr": tile_sequence,
        "out_ptr": out,
        "out_stride": out.stride(0),
        "row_scale_ptr": row_scales,
        "width": x.shape[1],
        "eps": eps,
        "TILE": TILE_ROWS,
        "LIMIT": 0.0 if row_scales is None else LAUNCH_LIMITS[out.dtype],
    }
    grid = (x.shape[0] // config.blocks["ROWS"],)
    return Launch("layer_norm_modulate", _layer_norm_modulate_kernel, grid, arguments, config)


def _launch(
    x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor, eps: float, out: Tensor, row_scales: Tensor | None
) -> None:
    layer_norm_modulate_launch(x, shift, scale, tile_sequence, eps, out, row_scales, generation_of(x)).run()


@torch.library.custom_op("uso_kernels::layer_norm_modulate", mutates_args=("out", "row_scales"))
def layer_norm_modulate_op(
    x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor, eps: float, out: Tensor, row_scales: Tensor | None
) -> None:
    """Fill `out`, and the row scales if there are any."""
    values = normalized_wide(x, shift, scale, tile_sequence, eps)
    if row_scales is None:
        out.copy_(values)
    else:
        quantized_values, scales = quantize_rows_reference(values, out.dtype)
        out.copy_(quantized_values)
        row_scales.copy_(scales)


layer_norm_modulate_op.register_kernel("cuda")(_launch)


@layer_norm_modulate_op.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor, eps: float, out: Tensor, row_scales: Tensor | None
) -> None:
    pass


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor, eps: float = 1e-6, *, out: Tensor | None = None
) -> Tensor:
    """Normalise every row of a packed tensor, then apply its sequence's shift and scale.

    Args:
        x: [T, C], columns contiguous; C at most 16384.
        shift: [S, C], x's dtype; may be a strided view of a larger table.
        scale: [S, C], likewise.
        tile_sequence: int32 [T / TILE_ROWS], the sequence of each tile of rows.
        eps: added to the variance.
        out: [T, C], where the result goes; may be x itself.

    Returns:
        [T, C] in x's dtype; sums are kept in float32.

    Raises:
        ValueError: operands that do not fit together.
    """
    if needs_gradient(x, shift, scale):
        return layer_norm_modulate_reference(x, shift, scale, tile_sequence, eps)
    check_norm_operands(x, shift, scale, tile_sequence)
    out = result_like(x, out)
    layer_norm_modulate_op(x, shift, scale, tile_sequence, eps, out, None)
    return out


def layer_norm_modulate_quantized(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    tile_sequence: Tensor,
    dtype: torch.dtype,
    eps: float = 1e-6,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm_modulate` whose result is quantised by rows without being rounded to x's dtype first.

    Args:
        x: [T, C], columns contiguous; C at most 16384.
        shift: [S, C], x's dtype.
        scale: [S, C], x's dtype.
        tile_sequence: int32 [T / TILE_ROWS].
        dtype: `torch.float8_e4m3fn` or `torch.int8`.
        eps: added to the variance.
        out: where values and row scales go.

    Returns:
        Values [T, C] and row scales [T], see `uso_kernels.quantize_rows.quantize_rows`.

    Raises:
        ValueError: operands that do not fit together.
    """
    check_norm_operands(x, shift, scale, tile_sequence)
    values, row_scales = quantized_result(x.shape[0], x.shape[1], dtype, x.device, out)
    layer_norm_modulate_op(x, shift, scale, tile_sequence, eps, values, row_scales)
    return values, row_scales


def check_norm_operands(x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor) -> None:
    """Check the operands of a modulated LayerNorm.

    Raises:
        ValueError: operands that do not fit together.
    """
    check_matrix("x", x)
    check_row_width(x.shape[1])
    check_matrix("shift", shift, width=x.shape[1], like=x)
    check_matrix("scale", scale, width=x.shape[1], like=x)
    if shift.shape[0] != scale.shape[0]:
        raise ValueError(f"shift and scale must have one row per sequence, got {shift.shape[0]} and {scale.shape[0]}")
    check_tiles(tile_sequence, x.shape[0], x.device)
