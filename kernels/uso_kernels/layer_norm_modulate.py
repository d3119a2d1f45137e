"""LayerNorm without weights, then a shift and scale per sequence; the result as floats or quantised by rows.

    y = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale[sequence]) + shift[sequence]

Each element of x is read once and each of y written once (one byte and a scale per row when quantised); shift and scale are one
row per sequence. Source: adaLN of DiT (Peebles and Xie 2022), as in FLUX.1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu import row_blocks, sequence_rows
from .example import Example, Size
from .launch import Config, Generation, Launch, jit, needs_gradient, power_of_two, strided, tl
from .operands import check_matrix, check_tiles
from .operation import operation
from .ragged import TILE_ROWS, Ragged
from .rows import Rows, check_row_width, new_rows, parts, store_limit, store_row, write_rows

EPS = 1e-6
"""Added to the variance, as the authors do."""


def normalized(x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor) -> Tensor:
    """The formula, in float32 or wider, as autograd records it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), x.shape[1:], eps=EPS).view(-1, TILE_ROWS, x.shape[1])
    tile_shift, tile_scale = (table.index_select(0, tile_sequence).to(wide)[:, None] for table in (shift, scale))
    return torch.addcmul(tile_shift, normed, 1 + tile_scale).view_as(x)


def normalize(x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor, out: Tensor, row_scales: Tensor | None) -> None:
    """What the kernel does, in plain PyTorch.

    On a CPU a sequence's factor and shift are weight and bias of PyTorch's LayerNorm: one pass, which reads x's type, computes
    in float32 or wider and rounds once.
    """
    if not x.is_cpu:
        write_rows(normalized(x, shift, scale, tile_sequence), out, row_scales)
        return
    wide = torch.promote_types(x.dtype, torch.float32)
    for sequence, rows in sequence_rows(tile_sequence):
        factor, added = 1 + scale[sequence].to(wide), shift[sequence].to(wide)
        source = x[rows] if row_scales is None else x[rows].to(wide)
        values = F.layer_norm(source, x.shape[1:], factor, added, EPS)
        write_rows(values, out[rows], None if row_scales is None else row_scales[rows])


@jit
def normalized_row(values, mask, width, eps):
    """One row of float32 values, zero outside the mask, to mean 0 and variance 1."""
    mean = tl.sum(values, axis=0) / width
    centred = tl.where(mask, values - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    return centred * (1.0 / tl.sqrt_rn(variance + eps))


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


CONFIGS = {1024: (2, 4), 2048: (4, 4), 4096: (8, 4), 8192: (8, 2), 16384: (32, 1)}
"""Warps, and rows a program takes one after another with one load of shift and scale, by the power of two that holds a row, on
every generation: 16 to 32 numbers of a row a thread. Reasoned and compiled without spills, not yet measured."""


def norm_config(width: int) -> Config:
    """Configuration of the normalising kernels for rows of `width` numbers, on every generation."""
    block = power_of_two(width)
    num_warps, rows = CONFIGS.get(block, (1, 4))
    return Config(num_warps=num_warps, num_stages=1, blocks={"BLOCK_C": block, "ROWS": rows})


def _launch(
    generation: Generation,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    tile_sequence: Tensor,
    out: Tensor,
    row_scales: Tensor | None,
) -> Launch:
    config = norm_config(x.shape[1])
    arguments = strided(x=x, shift=shift, scale=scale, out=out) | {
        "tile_sequence_ptr": tile_sequence,
        "row_scale_ptr": row_scales,
        "width": x.shape[1],
        "eps": EPS,
        "TILE": TILE_ROWS,
        "LIMIT": store_limit(out, row_scales),
    }
    grid = (x.shape[0] // config.blocks["ROWS"],)
    return Launch("layer_norm_modulate", _layer_norm_modulate_kernel, grid, arguments, config)


@operation(writes=("out", "row_scales"), launch=_launch)
def layer_norm_modulate_into(
    x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor, out: Tensor, row_scales: Tensor | None
) -> None:
    """Fill `out`, quantised where there are row scales."""
    for block in row_blocks(x, x.shape[1]):
        tiles = tile_sequence[block.start // TILE_ROWS : block.stop // TILE_ROWS]
        normalize(x[block], shift, scale, tiles, out[block], None if row_scales is None else row_scales[block])


def layer_norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, tile_sequence: Tensor, dtype: torch.dtype | None = None
) -> Rows:
    """Normalise every row of a packed tensor, then apply its sequence's shift and scale.

    Args:
        x: [T, C], columns contiguous; C at most 16384.
        shift: [S, C], x's dtype; may be a strided view of a larger table.
        scale: [S, C], likewise.
        tile_sequence: int32 [T / TILE_ROWS], the sequence of each tile of rows.
        dtype: what the reader of the rows takes: `torch.float8_e4m3fn`, `torch.int8`, or None for floats of x's dtype.

    Returns:
        [T, C]; sums are kept in float32, and 8-bit rows are not rounded to x's dtype first.

    Raises:
        ValueError: operands that do not fit together.
    """
    if dtype is None and needs_gradient(x, shift, scale):
        return normalized(x, shift, scale, tile_sequence).to(x.dtype)
    check_norm_operands(x, shift, scale, tile_sequence)
    out = new_rows(x.shape[0], x.shape[1], x, dtype)
    layer_norm_modulate_into(x, shift, scale, tile_sequence, *parts(out))
    return out


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


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """A step's norms, and every other power of two."""
    tiles = Ragged.pack([size.rows], size.device).tile_sequence
    for width in dict.fromkeys((size.width, 256, *CONFIGS)):
        is_hot = width == size.width
        x, (shift, scale) = size.normal(size.rows, width), size.normal(1, 2, width).unbind(1)
        for ending, out in size.endings(generation, size.rows, width):
            if is_hot or isinstance(out, Tensor):
                operands = (x, shift, scale, tiles, *parts(out))
                name = "layer_norm_modulate" + ("" if is_hot else f" of {width}")
                yield Example(f"{name} {ending}", layer_norm_modulate_into, operands, is_hot=is_hot)
