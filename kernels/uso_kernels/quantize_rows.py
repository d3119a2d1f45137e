"""Quantise each row of a matrix to 8 bits with a float32 scale of its own.

    amax = max(max|x|, 1e-30)      scale = amax / limit      q = round(x * (limit / amax))
    limit: 448 for float8_e4m3fn, 127 for int8

Each element of x is read once and one byte written for it. Source: row-wise dynamic scaling as in FBGEMM's and torchao's
``rowwise`` recipes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Config, Generation, Launch, generation_of, jit, power_of_two, tl
from .operands import check_matrix
from .scratch import Scratch

QUANTIZED_LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
LAUNCH_LIMITS = {**QUANTIZED_LIMITS, torch.float32: 448.0}
"""Also float32, in which the interpreter computes float8 values before PyTorch rounds them (see `uso_kernels.interpret`)."""
SMALLEST_AMAX = 1e-30
"""Below this a row counts as this large: its reciprocal stays finite, and a row of zeros stays zeros."""
SCALE_ROWS = 256
"""Row scales lie in buffers of a multiple of this many rows: fp8 GEMMs may read past the last (pytorch issue 133334)."""


def new_row_scales(rows: int, device: torch.device) -> Tensor:
    """Allocate float32 [rows] scales at the front of a buffer whose rows are a multiple of `SCALE_ROWS`."""
    return torch.empty(padded_scales(rows), dtype=torch.float32, device=device)[:rows]


def padded_scales(rows: int) -> int:
    """Float32 numbers that the buffer of `rows` row scales must hold."""
    return -(-rows // SCALE_ROWS) * SCALE_ROWS


def new_quantized(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate values and row scales.

    Raises:
        ValueError: not one of the two dtypes.
    """
    check_quantized_dtype(dtype)
    return torch.empty(rows, width, dtype=dtype, device=device), new_row_scales(rows, device)


def lend_quantized(
    scratch: Scratch, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`new_quantized` of a shape [rows, width], in memory lent under two names that begin with `name`."""
    row_scales = scratch(f"{name}.row_scales", (padded_scales(shape[0]),), like, torch.float32)
    return scratch(f"{name}.values", shape, like, dtype), row_scales[: shape[0]]


def quantized_result(
    rows: int, width: int, dtype: torch.dtype, device: torch.device, out: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The values and row scales that a result goes to: new ones, or the caller's after a check.

    Raises:
        ValueError: not one of the two dtypes, or the caller's have another shape, dtype or device, or strided columns.
    """
    if out is None:
        return new_quantized(rows, width, dtype, device)
    check_quantized_dtype(dtype)
    values, scales = out
    if values.shape != (rows, width) or values.dtype != dtype or values.device != device or values.stride(1) != 1:
        found = f"{values.dtype} of shape {tuple(values.shape)} and strides {values.stride()} on {values.device}"
        expected = f"{dtype} of shape {(rows, width)} with contiguous columns on {device}"
        raise ValueError(f"out's values must be {expected}, got {found}")
    if scales.shape != (rows,) or scales.dtype != torch.float32 or scales.device != device or not scales.is_contiguous():
        found = f"{scales.dtype} of shape {tuple(scales.shape)} on {scales.device}"
        raise ValueError(f"out's row scales must be contiguous float32 of shape {(rows,)} on {device}, got {found}")
    return values, scales


def check_quantized_dtype(dtype: torch.dtype) -> None:
    """Check a target dtype.

    Raises:
        ValueError: not one of the two.
    """
    if dtype not in QUANTIZED_LIMITS:
        raise ValueError(f"rows can be quantised to {sorted(map(str, QUANTIZED_LIMITS))}, got {dtype}")


def quantize_rows_reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Plain PyTorch version of `quantize_rows`, with the same arguments."""
    limit = QUANTIZED_LIMITS[dtype]
    wide = x.float()
    amax = wide.abs().amax(dim=-1).clamp(min=SMALLEST_AMAX)
    scale = new_row_scales(x.shape[0], x.device)
    # Tensor by tensor, as the kernel divides. On CUDA a tensor over a number is the tensor times the number's reciprocal, and a
    # number over a tensor is, everywhere, the number times the tensor's: one rounding more.
    limits = torch.full_like(amax, limit)
    torch.div(amax, limits, out=scale)
    inverse = limits / amax
    scaled = (wide * inverse[:, None]).clamp(-limit, limit)
    if dtype == torch.int8:
        # The integer of a NaN is undefined; its row's scale is NaN and carries it.
        scaled = scaled.round().nan_to_num(0.0)
    return scaled.to(dtype), scale


@jit
def row_amax(values):
    """Largest magnitude of float32 values of one row, NaN where any is, at least `SMALLEST_AMAX`."""
    amax = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-30)
    # A plain maximum drops NaN; a broken row must not come out looking sound.
    is_nan = tl.max((values != values).to(tl.int32), axis=0)
    return tl.where(is_nan > 0, float("nan"), amax)


@jit
def quantized(values, inverse, LIMIT: tl.constexpr, DTYPE: tl.constexpr):
    """Float32 values times the row's inverse scale, as 8-bit numbers."""
    scaled = tl.minimum(tl.maximum(values * inverse, -LIMIT), LIMIT)
    if DTYPE.is_int8():
        # Adding and taking away 1.5 * 2^23 rounds to the nearest even integer.
        result = tl.where(scaled != scaled, 0.0, (scaled + 12582912.0) - 12582912.0)
    else:
        # Plain maxima turn NaN into a number.
        result = tl.where(inverse != inverse, float("nan"), scaled)
    return result.to(DTYPE)


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
    amax = row_amax(values)
    tl.store(row_scale_ptr + row, tl.div_rn(amax, LIMIT))
    result = quantized(values, tl.div_rn(LIMIT, amax), LIMIT, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + columns, result, mask=mask)


ROW_WARPS = {1024: 2, 2048: 4, 4096: 8, 8192: 8, 16384: 16}
"""Warps by the power of two that holds a row, on every generation: 16 to 32 numbers a thread. Reasoned, not yet measured."""
MAX_ROW_WIDTH = 16384


def row_config(generation: Generation, width: int) -> Config:
    """Configuration of a kernel that holds one row of `width` numbers in registers."""
    block = power_of_two(width)
    return Config(num_warps=ROW_WARPS.get(block, 1), num_stages=1, blocks={"BLOCK_C": block})


def quantize_rows_launch(x: Tensor, values: Tensor, row_scales: Tensor, generation: Generation) -> Launch:
    """Describe the launch that fills `values` and `row_scales`."""
    arguments = {
        "x_ptr": x,
        "x_stride": x.stride(0),
        "out_ptr": values,
        "out_stride": values.stride(0),
        "row_scale_ptr": row_scales,
        "width": x.shape[1],
        "LIMIT": LAUNCH_LIMITS[values.dtype],
    }
    return Launch("quantize_rows", _quantize_rows_kernel, (x.shape[0],), arguments, row_config(generation, x.shape[1]))


def _launch(x: Tensor, values: Tensor, row_scales: Tensor) -> None:
    quantize_rows_launch(x, values, row_scales, generation_of(x)).run()


@torch.library.custom_op("uso_kernels::quantize_rows", mutates_args=("values", "row_scales"))
def quantize_rows_op(x: Tensor, values: Tensor, row_scales: Tensor) -> None:
    """Fill `values` and `row_scales`."""
    result, scales = quantize_rows_reference(x, values.dtype)
    values.copy_(result)
    row_scales.copy_(scales)


quantize_rows_op.register_kernel("cuda")(_launch)


@quantize_rows_op.register_fake
def _(x: Tensor, values: Tensor, row_scales: Tensor) -> None:
    pass


def quantize_rows(x: Tensor, dtype: torch.dtype, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Quantise every row with its own scale.

    Args:
        x: [T, C], columns contiguous; float32, bfloat16 or float16; C at most 16384.
        dtype: `torch.float8_e4m3fn` or `torch.int8`. Triton has float8_e4m3fn from compute capability 8.9 on.
        out: where values and row scales go.

    Returns:
        The values, [T, C] in `dtype`, and the row scales, float32 [T]: values * scale[:, None] is x, rounded. A row of zeros
        gives zeros. A row with a NaN or an infinity gives NaN when it is multiplied out. The scales lie at the front of a
        buffer padded to a multiple of 256 rows.

    Raises:
        ValueError: another dtype, or x is not a matrix of floats with contiguous columns.
    """
    check_matrix("x", x)
    check_row_width(x.shape[1])
    values, row_scales = quantized_result(x.shape[0], x.shape[1], dtype, x.device, out)
    quantize_rows_op(x, values, row_scales)
    return values, row_scales


def check_row_width(width: int) -> None:
    """Check that a row fits a program's registers.

    Raises:
        ValueError: it does not, or is empty.
    """
    if not 1 <= width <= MAX_ROW_WIDTH:
        raise ValueError(f"rows of 1 to {MAX_ROW_WIDTH} columns are supported, got {width}")
