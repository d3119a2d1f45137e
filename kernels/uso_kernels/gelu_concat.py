"""Activate the hidden layer of an MLP and put it beside attention's output: the operand of a single block's second matrix.

    out = [attended | gelu(hidden)]      gelu(x) = x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), the tanh form

C + E elements read and written per row (E where attention wrote its part into `out` itself), or one byte per element written
when quantised: row scales need whole rows, which neither an attention program nor a tile of a matrix product sees, so this
pass is where they are made. Source: FLUX.1's SingleStreamBlock.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import Generation, Launch, generation_of, jit, needs_gradient, tl
from .layer_norm_modulate import store_row, wide_dtype
from .operands import check_matrix, result_like
from .quantize_rows import LAUNCH_LIMITS, check_row_width, quantize_rows_reference, quantized_result, row_config


def gelu_concat_reference(attended: Tensor | None, hidden: Tensor) -> Tensor:
    """Plain PyTorch version of `gelu_concat`, with the same arguments."""
    activated = F.gelu(hidden, approximate="tanh")
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


def gelu_concat_launch(
    attended: Tensor | None, hidden: Tensor, out: Tensor, row_scales: Tensor | None, generation: Generation
) -> Launch:
    """Describe the launch that fills `out`, quantised if there are row scales; without `attended` its columns stay as they
    are.
    """
    width = out.shape[1]
    arguments = {
        "attended_ptr": attended,
        "attended_stride": 0 if attended is None else attended.stride(0),
        "hidden_ptr": hidden,
        "hidden_stride": hidden.stride(0),
        "out_ptr": out,
        "out_stride": out.stride(0),
        "row_scale_ptr": row_scales,
        "attended_width": width - hidden.shape[1],
        "width": width,
        "HAS_ATTENDED": attended is not None,
        "LIMIT": 0.0 if row_scales is None else LAUNCH_LIMITS[out.dtype],
    }
    return Launch("gelu_concat", _gelu_concat_kernel, (out.shape[0],), arguments, row_config(generation, width))


def _launch(attended: Tensor | None, hidden: Tensor, out: Tensor, row_scales: Tensor | None) -> None:
    gelu_concat_launch(attended, hidden, out, row_scales, generation_of(hidden)).run()


@torch.library.custom_op("uso_kernels::gelu_concat", mutates_args=("out", "row_scales"))
def gelu_concat_op(attended: Tensor | None, hidden: Tensor, out: Tensor, row_scales: Tensor | None) -> None:
    """Fill `out`, and the row scales if there are any; without `attended` its columns stay as they are."""
    if row_scales is not None:
        wide = hidden.to(wide_dtype(hidden.dtype))
        values, scales = quantize_rows_reference(
            gelu_concat_reference(None if attended is None else attended.to(wide.dtype), wide), out.dtype
        )
        out.copy_(values)
        row_scales.copy_(scales)
        return
    start = out.shape[1] - hidden.shape[1]
    if attended is not None:
        out[:, :start].copy_(attended)
    torch.ops.aten.gelu.out(hidden, approximate="tanh", out=out[:, start:])


gelu_concat_op.register_kernel("cuda")(_launch)


@gelu_concat_op.register_fake
def _(attended: Tensor | None, hidden: Tensor, out: Tensor, row_scales: Tensor | None) -> None:
    pass


def gelu_concat(attended: Tensor | None, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Activate the hidden layer of an MLP and put it beside attention's output.

    Args:
        attended: [T, C], columns contiguous; None for the activation alone.
        hidden: [T, E], attended's dtype, columns contiguous; C + E at most 16384.
        out: [T, C + E], where the result goes; where `attended` is its first C columns they are not copied.

    Returns:
        [T, C + E] in hidden's dtype.

    Raises:
        ValueError: operands that do not fit together.
    """
    if needs_gradient(attended, hidden):
        return gelu_concat_reference(attended, hidden)
    width = _check_operands(attended, hidden)
    out = result_like(hidden, out, (hidden.shape[0], width))
    in_place = attended is not None and attended.data_ptr() == out.data_ptr() and attended.stride(0) == out.stride(0)
    gelu_concat_op(None if in_place else attended, hidden, out, None)
    return out


def gelu_concat_quantized(
    attended: Tensor | None, hidden: Tensor, dtype: torch.dtype, *, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """`gelu_concat` whose result is quantised by rows, without being rounded to hidden's dtype first.

    Args:
        attended: [T, C], columns contiguous; None for the activation alone.
        hidden: [T, E], attended's dtype, columns contiguous; C + E at most 16384.
        dtype: `torch.float8_e4m3fn` or `torch.int8`.
        out: where values and row scales go.

    Returns:
        Values [T, C + E] and row scales [T], see `uso_kernels.quantize_rows.quantize_rows`.

    Raises:
        ValueError: operands that do not fit together.
    """
    width = _check_operands(attended, hidden)
    values, row_scales = quantized_result(hidden.shape[0], width, dtype, hidden.device, out)
    gelu_concat_op(attended, hidden, values, row_scales)
    return values, row_scales


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
