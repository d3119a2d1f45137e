"""Multiply two row-quantised 8-bit float matrices.

    y[m, n] = x_scale[m] * weight_scale[n] * sum_k x[m, k] * weight[n, k] + bias[n]

2 M N K operations on tensor cores; M K + N K bytes read and 2 M N written. Both scales belong to whole rows, so they leave
the sum and are applied once per output. On a GPU this is torch's own row-wise fp8 product; on a CPU the same quantised
values are multiplied in float32, so the error is that of the tier, not of the machine. Source: row-wise scaling as in
FBGEMM's ``f8f8bf16_rowwise``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

from uso_kernels.example import Example, Size
from uso_kernels.launch import Generation
from uso_kernels.operands import result_like
from uso_kernels.operation import operation
from uso_kernels.ragged import Ragged
from uso_kernels.rows import SCALE_ROWS, new_row_scales, quantized_dtypes

from .linear import rows_of

ALIGNMENT = 16
"""Tensor cores take 8-bit operands whose K and N are multiples of this."""
_ROW_WISE = [ScalingType.RowWise.value]


def scaled(sums: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """How a product of quantised matrices ends: float32 sums [M, N] times both scales, plus the bias, in place."""
    sums.mul_(x_scale[:, None]).mul_(weight_scale)
    return sums if bias is None else sums.add_(bias)


def _padded(scale: Tensor) -> Tensor:
    """The same scales where 256 can be read at a time: some row-wise kernels read past the last (pytorch issue 133334)."""
    rows = scale.shape[0]
    needed = scale.storage_offset() + -(-rows // SCALE_ROWS) * SCALE_ROWS
    if scale.is_contiguous() and scale.untyped_storage().nbytes() >= needed * scale.itemsize:
        return scale
    return new_row_scales(rows, scale.device).copy_(scale)


def _library_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    scales = [_padded(x_scale)[:, None]], [_padded(weight_scale)[None, :]]
    # What `torch.nn.functional.scaled_mm` calls, which has no `out`.
    torch._scaled_mm_v2(x, weight.t(), scales[0], _ROW_WISE, [], scales[1], _ROW_WISE, [], bias, y.dtype, [], True, out=y)


@operation(writes=("y",), library=_library_product)
def scaled_matmul_into(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor
) -> None:
    """Fill `y`."""
    y.copy_(scaled(x.float() @ weight.float().t(), x_scale, weight_scale, bias))


def check_quantized_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, element: torch.dtype
) -> None:
    """Check the operands of a product of two row-quantised matrices.

    Raises:
        ValueError: types or shapes that do not belong together; the message lists all of them.
    """
    problems = []
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype != element or tensor.ndim != 2:
            problems.append(f"{name} must be a matrix of {element}, got {tensor.dtype} of shape {tuple(tensor.shape)}")
        elif tensor.stride(1) != 1:
            problems.append(f"the rows of {name} must be contiguous, got strides {tensor.stride()}")
    if not problems:
        if x.shape[1] != weight.shape[1] or x.shape[1] % ALIGNMENT or weight.shape[0] % ALIGNMENT:
            problems.append(
                f"x [M, K] and weight [N, K] must share K, and K and N be multiples of {ALIGNMENT}, "
                f"got {tuple(x.shape)} and {tuple(weight.shape)}"
            )
        for name, scale, rows in (("x_scale", x_scale, x.shape[0]), ("weight_scale", weight_scale, weight.shape[0])):
            if scale.dtype != torch.float32 or scale.shape != (rows,):
                problems.append(f"{name} must be float32 of shape ({rows},), got {scale.dtype} of shape {tuple(scale.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            problems.append(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if problems:
        raise ValueError("; ".join(problems))


def scaled_matmul(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    sequences: Ragged | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply activations by a weight, both `torch.float8_e4m3fn` with a scale per row.

    Args:
        x: [M, K], rows contiguous.
        x_scale: float32 [M], best in a buffer padded to 256 rows (`quantize_rows` makes such); others are copied on a GPU.
        weight: [N, K], rows contiguous; K and N multiples of 16.
        weight_scale: float32 [N].
        bias: [N] or None; on a GPU in `dtype`.
        dtype: of the result; on a GPU bfloat16 only.
        sequences: where the sequences of a packed x lie, each a product of its own (see `uso_kernels.matmul.linear`).
        out: [M, N] in `dtype`, where the result goes.

    Returns:
        [M, N] in `dtype`; sums are kept in float32.

    Raises:
        ValueError: types or shapes that do not belong together.
    """
    check_quantized_product(x, x_scale, weight, weight_scale, bias, torch.float8_e4m3fn)
    if x.is_cuda and dtype != torch.bfloat16:
        raise ValueError(f"row-wise fp8 products give bfloat16 on a GPU, got {dtype}")
    y = result_like(x, out, (x.shape[0], weight.shape[0]), dtype)
    for rows in rows_of(sequences, x.shape[0]):
        scaled_matmul_into(x[rows], x_scale[rows], weight, weight_scale, bias, y[rows])
    return y


def examples(generation: Generation, size: Size) -> Iterator[Example]:
    """The product for q, k and v, where a GPU has float8."""
    if torch.float8_e4m3fn not in quantized_dtypes(generation):
        return
    columns = 3 * size.width
    x, weight = (size.normal(n, size.width).to(torch.float8_e4m3fn) for n in (size.rows, columns))
    x_scale, weight_scale = (
        new_row_scales(n, x.device).copy_(size.normal(n, dtype=torch.float32) / size.width) for n in (size.rows, columns)
    )
    operands = (x, x_scale, weight, weight_scale, size.normal(columns), size.unwritten(size.rows, columns))
    yield Example("scaled_matmul", scaled_matmul_into, operands, 2 * size.rows * size.width * columns)
