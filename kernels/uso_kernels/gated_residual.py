"""Gated residual addition, alone or together with the LayerNorm and modulation that follow it.

    x' = x + gate[sequence] * y            z = LayerNorm(x') * (1 + scale[sequence]) + shift[sequence]

Together: x and y read once, x' and z written once (4C elements per row instead of 6C apart), z as floats or quantised by rows.
z is made from x' as it is stored, rounded to x's dtype. Source: FLUX.1's blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu import row_blocks, sequence_rows
from .example import Example, Size
from .launch import Generation, Launch, jit, needs_gradient, strided, tl
from .layer_norm_modulate import CONFIGS, EPS, check_norm_operands, norm_config, normalize, normalized, normalized_row
from .operands import check_matrix, check_tiles
from .operation import Fill, operation
from .ragged import TILE_ROWS, Ragged
from .rows import Rows, check_row_width, new_rows, parts, store_limit, store_row


def summed(x: Tensor, y: Tensor, gate: Tensor, tile_sequence: Tensor) -> Tensor:
    """The formula of x', in float32 or wider, as autograd records it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    tile_gate = gate.index_select(0, tile_sequence).to(wide)[:, None]
    tile_x, tile_y = (rows.reshape(-1, TILE_ROWS, x.shape[1]).to(wide) for rows in (x, y))
    return torch.addcmul(tile_x, tile_gate, tile_y).view_as(x)


def add_gated(x: Tensor, y: Tensor, gate: Tensor, tile_sequence: Tensor, total: Tensor) -> None:
    """Fill `total`, in plain PyTorch; on a CPU in one pass, which computes in float32 or wider and rounds once."""
    if not x.is_cpu:
        total.copy_(summed(x, y, gate, tile_sequence))
        return
    for sequence, rows in sequence_rows(tile_sequence):
        torch.addcmul(x[rows], y[rows], gate[sequence], out=total[rows])


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
        total = (x + gate * y).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * sum_stride + columns, total, mask=mask)
        if NORM:
            values = normalized_row(total.to(tl.float32), mask, width, eps) * factor + shift
            store_row(values, out_ptr, row_scale_ptr, row, out_stride, columns, mask, LIMIT)


def _launch(
    generation: Generation,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    tile_sequence: Tensor,
    total: Tensor,
    out: Tensor | None,
    row_scales: Tensor | None,
) -> Launch:
    config = norm_config(x.shape[1])
    arguments = strided(x=x, y=y, gate=gate, shift=shift, scale=scale, sum=total, out=out) | {
        "tile_sequence_ptr": tile_sequence,
        "row_scale_ptr": row_scales,
        "width": x.shape[1],
        "eps": EPS,
        "TILE": TILE_ROWS,
        "NORM": out is not None,
        "LIMIT": store_limit(out, row_scales),
    }
    return Launch("gated_residual", _gated_residual_kernel, (x.shape[0] // config.blocks["ROWS"],), arguments, config)


def _check_operands(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    tile_sequence: Tensor,
    total: Tensor,
    out: Tensor | None,
    row_scales: Tensor | None,
) -> None:
    check_matrix("x", x)
    check_row_width(x.shape[1])
    check_matrix("y", y, width=x.shape[1], like=x)
    check_matrix("gate", gate, width=x.shape[1], like=x)
    if y.shape != x.shape:
        raise ValueError(f"y must be {tuple(x.shape)} like x, got {tuple(y.shape)}")
    check_tiles(tile_sequence, x.shape[0], x.device)
    if shift is not None and scale is not None:
        check_norm_operands(x, shift, scale, tile_sequence)


@operation(writes=("total", "out", "row_scales"), launch=_launch, check=_check_operands)
def gated_residual_into(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    tile_sequence: Tensor,
    total: Tensor,
    out: Tensor | None,
    row_scales: Tensor | None,
) -> None:
    """Fill `total`, and `out` where there is one, quantised where there are row scales."""
    for block in row_blocks(x, x.shape[1]):
        tiles = tile_sequence[block.start // TILE_ROWS : block.stop // TILE_ROWS]
        add_gated(x[block], y[block], gate, tiles, total[block])
        if out is not None and shift is not None and scale is not None:
            normalize(total[block], shift, scale, tiles, out[block], None if row_scales is None else row_scales[block])


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    tile_sequence: Tensor,
    norm: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    *,
    call: Fill = gated_residual_into,
) -> tuple[Tensor, Rows | None]:
    """Add a block's gated output to its input, then normalise and modulate the sum where a LayerNorm follows.

    Args:
        x: [T, C], the residual stream.
        y: [T, C], the block's output.
        gate: [S, C], of this block; may be a strided view.
        tile_sequence: int32 [T / TILE_ROWS].
        norm: shift and scale of the normalisation that follows, [S, C] each; None where none does.
        dtype: what the reader of the second result takes, see `uso_kernels.layer_norm_modulate`.
        call: the operation, or a `CallSite` of it.

    Returns:
        The new residual stream [T, C], x + gate * y in x's dtype, summed in float32; and its normalised, modulated form [T, C],
        None without a norm.

    Raises:
        ValueError: operands that do not fit together.
    """
    if dtype is None and needs_gradient(x, y, gate, *(norm or ())):
        total = summed(x, y, gate, tile_sequence).to(x.dtype)
        return total, None if norm is None else normalized(total, *norm, tile_sequence).to(x.dtype)
    total = torch.empty_like(x)
    if norm is None:
        call(x, y, gate, None, None, tile_sequence, total, None, None)
        return total, None
    out = new_rows(x.shape[0], x.shape[-1], x, dtype)
    call(x, y, gate, *norm, tile_sequence, total, *parts(out))
    return total, out


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """A step's additions with the norm that follows, every other power of two, and the last double block's without a norm."""
    tiles = Ragged.pack([size.rows], size.device).tile_sequence
    for width in dict.fromkeys((size.width, 256, *CONFIGS)):
        is_hot = width == size.width
        x, y = size.normal(2, size.rows, width)
        gate, shift, scale = size.normal(1, 3, width).unbind(1)
        total = size.unwritten(size.rows, width)
        for ending, out in size.endings(generation, size.rows, width):
            if is_hot or isinstance(out, Tensor):
                operands = (x, y, gate, shift, scale, tiles, total, *parts(out))
                name = "gated_residual norm" + ("" if is_hot else f" of {width}")
                yield Example(f"{name} {ending}", gated_residual_into, operands, is_hot=is_hot)
        if is_hot:
            alone = (x, y, gate, None, None, tiles, total, None, None)
            yield Example("gated_residual", gated_residual_into, alone)
