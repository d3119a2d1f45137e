"""Quantise each row of a matrix to 8 bits with a float32 scale of its own, where no kernel before it could end in such rows.

The formula is `uso_kernels.rows`'. Each element of x is read once and one byte written for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu import row_blocks
from .example import Example, Size
from .launch import Generation, Launch, jit, strided, tl
from .operands import check_matrix
from .operation import operation
from .rows import (
    ROW_WARPS,
    QuantizedRows,
    check_row_width,
    new_quantized,
    quantized_dtypes,
    row_config,
    store_limit,
    store_row,
    write_rows,
)


@jit
def _quantize_rows_kernel(
    x_ptr,  # [rows, width]
    x_stride,
    out_ptr,  # [rows, width], 8 bits
    out_stride,
    row_scale_ptr,  # [rows] float32
    width,
    LIMIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    mask = columns < width
    values = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    store_row(values, out_ptr, row_scale_ptr, row, out_stride, columns, mask, LIMIT)


def _launch(generation: Generation, x: Tensor, values: Tensor, row_scales: Tensor) -> Launch:
    width = x.shape[1]
    arguments = strided(x=x, out=values) | {
        "row_scale_ptr": row_scales,
        "width": width,
        "LIMIT": store_limit(values, row_scales),
    }
    return Launch("quantize_rows", _quantize_rows_kernel, (x.shape[0],), arguments, row_config(width))


@operation(writes=("values", "row_scales"), launch=_launch)
def quantize_rows_into(x: Tensor, values: Tensor, row_scales: Tensor) -> None:
    """Fill `values` and `row_scales`."""
    for block in row_blocks(x, x.shape[1]):
        write_rows(x[block], values[block], row_scales[block])


def quantize_rows(x: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Quantise every row with its own scale.

    Args:
        x: [T, C], columns contiguous; float32, bfloat16 or float16; C at most 16384.
        dtype: `torch.float8_e4m3fn` or `torch.int8`. Triton has float8_e4m3fn from compute capability 8.9 on.

    Returns:
        The values, [T, C] in `dtype`, and the row scales, float32 [T]: values * scale[:, None] is x, rounded. A row of zeros
        gives zeros. A row with a NaN or an infinity gives NaN when it is multiplied out. The scales lie at the front of a
        buffer padded to a multiple of 256 rows.

    Raises:
        ValueError: another dtype, or x is not a matrix of floats with contiguous columns.
    """
    check_matrix("x", x)
    check_row_width(x.shape[1])
    rows = new_quantized(x.shape[0], x.shape[1], dtype, x.device)
    quantize_rows_into(x, *rows)
    return rows


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """The rows in front of the last single block and of weight files, and every other power of two."""
    hot = {"": size.width, " of an operand": 5 * size.width}
    for kind, width in {**hot, **{f" of {width}": width for width in ROW_WARPS}}.items():
        x = size.normal(size.rows, width)
        for dtype in quantized_dtypes(generation) if kind in hot else (torch.int8,):
            out = size.unwritten(size.rows, width, dtype=dtype), size.unwritten(size.rows, dtype=torch.float32)
            name = f"quantize_rows{kind} {str(dtype).removeprefix('torch.')}"
            yield Example(name, quantize_rows_into, (x, *out), is_hot=kind in hot)
