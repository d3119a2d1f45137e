"""Activate the hidden layer of an MLP and put it beside attention's output: the operand of a single block's second matrix.

    out = [attended | gelu(hidden)]      gelu(x) = x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the tanh form

C + E elements read and written per row, or one byte per element written when quantised: row scales need whole rows, which
neither an attention program nor a tile of a matrix product sees, so this pass is where they are made. Source: FLUX.1's
SingleStreamBlock.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu import row_blocks
from .example import Example, Size
from .launch import Generation, Launch, jit, needs_gradient, strided, tl
from .operands import check_matrix, result_like
from .operation import operation
from .rows import Rows, check_row_width, new_rows, parts, row_config, store_limit, store_row, write_rows
from .whole_vectors import gelu


def joined(attended: Tensor | None, hidden: Tensor) -> Tensor:
    """The formula, in hidden's dtype."""
    activated = gelu(hidden)
    return activated if attended is None else torch.cat((attended, activated), dim=-1)


@jit
def _gelu_concat_kernel(
    attended_ptr,  # [T, attended_width], or None
    attended_stride,
    hidden_ptr,  # [T, width - attended_width]
    hidden_stride,
    out_ptr,  # [T, width]
    out_stride,
    row_scale_ptr,  # [T] float32, or None
    attended_width,
    width,
    HAS_ATTENDED: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    is_hidden = (columns >= attended_width) & (columns < width)
    x = tl.load(hidden_ptr + row * hidden_stride + columns - attended_width, mask=is_hidden, other=0.0).to(tl.float32)
    # 1.5957691216 is 2 sqrt(2 / pi); the exponential overflows to infinity where the sigmoid is 0, as it should.
    values = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    mask = is_hidden
    if HAS_ATTENDED:
        is_attended = columns < attended_width
        attended = tl.load(attended_ptr + row * attended_stride + columns, mask=is_attended, other=0.0).to(tl.float32)
        values = tl.where(is_attended, attended, values)
        mask = columns < width
    store_row(values, out_ptr, row_scale_ptr, row, out_stride, columns, mask, LIMIT)


def _launch(generation: Generation, attended: Tensor | None, hidden: Tensor, out: Tensor, row_scales: Tensor | None) -> Launch:
    width = out.shape[1]
    arguments = strided(attended=attended, hidden=hidden, out=out) | {
        "row_scale_ptr": row_scales,
        "attended_width": width - hidden.shape[1],
        "width": width,
        "HAS_ATTENDED": attended is not None,
        "LIMIT": store_limit(out, row_scales),
    }
    return Launch("gelu_concat", _gelu_concat_kernel, (out.shape[0],), arguments, row_config(width))


@operation(writes=("out", "row_scales"), launch=_launch)
def gelu_concat_into(attended: Tensor | None, hidden: Tensor, out: Tensor, row_scales: Tensor | None) -> None:
    """Fill `out`, quantised where there are row scales; without `attended` its columns stay as they are."""
    if row_scales is not None:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        for block in row_blocks(hidden, out.shape[1]):
            beside = None if attended is None else attended[block].to(wide)
            write_rows(joined(beside, hidden[block].to(wide)), out[block], row_scales[block])
        return
    start = out.shape[1] - hidden.shape[1]
    if attended is not None:
        out[:, :start].copy_(attended)
    for block in row_blocks(hidden, hidden.shape[1]):
        gelu(hidden[block], out[block, start:])


def gelu_concat(
    attended: Tensor | None, hidden: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> Rows:
    """Activate the hidden layer of an MLP and put it beside attention's output.

    Args:
        attended: [T, C], columns contiguous; None for the activation alone.
        hidden: [T, E], attended's dtype, columns contiguous; C + E at most 16384.
        dtype: what the reader of the rows takes: `torch.float8_e4m3fn`, `torch.int8`, or None for floats of hidden's dtype.
        out: [T, C + E], where floats go; it may be `hidden` where that is all.

    Returns:
        [T, C + E]; 8-bit rows are not rounded to hidden's dtype first.

    Raises:
        ValueError: operands that do not fit together.
    """
    if dtype is None and needs_gradient(attended, hidden):
        return joined(attended, hidden)
    shape = (hidden.shape[0], _check_operands(attended, hidden))
    rows = new_rows(*shape, hidden, dtype) if out is None or dtype is not None else result_like(hidden, out, shape)
    gelu_concat_into(attended, hidden, *parts(rows))
    return rows


def _check_operands(attended: Tensor | None, hidden: Tensor) -> int:
    """Check, and return the result's width."""
    check_matrix("hidden", hidden)
    width = hidden.shape[1]
    if attended is not None:
        check_matrix("attended", attended, like=hidden)
        if attended.shape[0] != hidden.shape[0]:
            raise ValueError(f"attended must have {hidden.shape[0]} rows like hidden, got {attended.shape[0]}")
        width += attended.shape[1]
    check_row_width(width)
    return width


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """A double block's activation alone, and a single block's beside attention."""
    for attended_width, kind in ((0, "alone"), (size.width, "beside attention")):
        attended = size.normal(size.rows, attended_width) if attended_width else None
        hidden = size.normal(size.rows, 4 * size.width)
        for ending, out in size.endings(generation, size.rows, attended_width + 4 * size.width):
            yield Example(f"gelu_concat {kind} {ending}", gelu_concat_into, (attended, hidden, *parts(out)))
